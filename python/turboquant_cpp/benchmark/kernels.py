"""Decode attention beside torch's own attention over an uncompressed cache, and encoding.

Every contender is given the layers of one model: as many buffers of its own as it takes for the
packed codes alone to be twice the last-level cache, so that all of them read from memory, as a
model's decode step does. Contenders take turns, so a disturbance meets all of them; the median
over the turns is reported.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from turboquant_cpp.layer_store import LayerStore
from turboquant_cpp.spec import CacheConfig

__all__ = ["KernelTiming", "Shape", "measure_read_bandwidth", "time_decode", "time_encode"]

#: Bytes of codes that contenders rotate through: twice the 32 MiB of last-level cache that eight
#: cores of a server share.
_ROTATION_BYTES = 64 << 20
_MAX_LAYERS = 128
_BANDWIDTH_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """One decode step of one layer: a query token against `tokens` cached ones.

    Examples
    --------
    >>> Shape(query_heads=32, kv_heads=8, head_dim=128, tokens=4096).label
    '32/8 heads, 4096 tokens'
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    tokens: int

    @property
    def label(self) -> str:
        """Heads and tokens as a table shows them."""
        return f"{self.query_heads}/{self.kv_heads} heads, {self.tokens} tokens"


@dataclasses.dataclass(frozen=True)
class KernelTiming:
    """What one contender needed for one call.

    Attributes
    ----------
    kernel : str
        ``torch fp32``, ``torch bf16`` or the widths of ours, ``4+4``.
    microseconds : float
        Median of the turns.
    bytes_read : int
        Bytes of keys and values (codes, scales and means) that one call has to read.
    """

    kernel: str
    microseconds: float
    bytes_read: int

    @property
    def gigabytes_per_second(self) -> float:
        """`bytes_read` over the time."""
        return self.bytes_read / self.microseconds / 1e3


def measure_read_bandwidth() -> float:
    """Gigabytes per second that summing a large tensor reads with torch's threads."""
    numbers = torch.ones(_BANDWIDTH_BYTES // 4)
    seconds = [_seconds(numbers.sum) for _ in range(5)]
    return _BANDWIDTH_BYTES / min(seconds[1:]) / 1e9


def time_decode(
    shape: Shape,
    widths: Sequence[tuple[int, int]],
    *,
    turns: int = 15,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[KernelTiming]:
    """Time one query token over a cache of `shape`: torch in float32 and bfloat16, and ours.

    Parameters
    ----------
    shape : Shape
        Heads, head_dim and tokens; one sequence.
    widths : sequence of (int, int)
        Key and value bits of ours.
    turns : int
        Rounds in which every contender runs through its layers once.
    progress : callable, optional
        Called with (turns done, `turns`).

    Returns
    -------
    list of KernelTiming
        torch's two first, then ours in the order of `widths`.
    """
    tokens, dim = shape.tokens, shape.head_dim
    code_bytes = min(k + v for k, v in widths) * shape.kv_heads * tokens * dim // 8
    layers = max(1, min(_MAX_LAYERS, -(-_ROTATION_BYTES // code_bytes)))
    query = torch.randn(1, shape.query_heads, 1, dim)
    keys, values = torch.randn(2, 1, shape.kv_heads, tokens, dim)
    contenders: dict[str, list[Callable[[], object]]] = {}
    sizes: dict[str, int] = {}
    for name, dtype in (("torch fp32", torch.float32), ("torch bf16", torch.bfloat16)):
        contenders[name] = [_sdpa(query, keys, values, dtype) for _ in range(layers)]
        sizes[name] = 2 * shape.kv_heads * tokens * dim * dtype.itemsize
    for k_bits, v_bits in widths:
        name = f"{k_bits}+{v_bits}"
        config = CacheConfig(k_bits=k_bits, v_bits=v_bits)
        stores = [_filled_store(config, layer, keys, values) for layer in range(layers)]
        contenders[name] = [_packed(store, query) for store in stores]
        held = stores[0].nbytes()
        sizes[name] = held["pages"] + held["exact"]

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, calls in contenders.items():
            taken = _seconds(lambda calls=calls: [call() for call in calls])  # type: ignore[misc]
            if turn > 0:  # the first one warms up
                seconds[name].append(taken / layers)
        progress(turn, turns)
    return [
        KernelTiming(name, 1e6 * statistics.median(taken), sizes[name])
        for name, taken in seconds.items()
    ]


def time_encode(head_dim: int, k_bits: int, v_bits: int, *, turns: int = 7) -> float:
    """Coordinates encoded per second and thread: a prefill of 4,096 tokens and 8 heads."""
    heads, tokens = 8, 4096
    keys, values = torch.randn(2, 1, heads, tokens, head_dim)
    config = CacheConfig(k_bits=k_bits, v_bits=v_bits)
    threads = torch.get_num_threads()
    seconds = [_seconds(lambda: _filled_store(config, 0, keys, values)) for _ in range(turns + 1)]
    return float(2 * keys.numel() / statistics.median(seconds[1:]) / threads)


def _sdpa(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
) -> Callable[[], object]:
    # clone: every layer has memory of its own, whatever `to` shares.
    q, k, v = (states.to(dtype).clone() for states in (query, keys, values))
    return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _filled_store(
    config: CacheConfig, layer: int, keys: torch.Tensor, values: torch.Tensor
) -> LayerStore:
    _, heads, _, dim = keys.shape
    store = LayerStore(
        config.layer_spec(layer, dim, heads), batch_size=1, dtype=keys.dtype, device=keys.device
    )
    store.append(keys, values)
    return store


def _packed(store: LayerStore, query: torch.Tensor) -> Callable[[], object]:
    return lambda: store.attend(query, scaling=query.shape[-1] ** -0.5)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
