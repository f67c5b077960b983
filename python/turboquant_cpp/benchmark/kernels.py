"""Decode attention beside torch's own attention over an uncompressed cache, and encoding.

Every contender is given the layers of one model: as many buffers of its own as it takes for the
packed codes alone to be twice the last-level cache, so that all of them read from memory, as a
model's decode step does. Contenders take turns, so a disturbance meets all of them; the median
over the turns is reported. On a GPU a contender's calls are one CUDA graph: the time is the
device's, not Python's.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from turboquant_cpp.layer_store import LayerStore
from turboquant_cpp.spec import CacheConfig

__all__ = [
    "KernelTiming",
    "PackedLayers",
    "Shape",
    "baselines",
    "layers_to_rotate",
    "measure_read_bandwidth",
    "packed_layers",
    "random_states",
    "take_turns",
    "time_decode",
    "time_encode",
]

#: Bytes of codes that contenders rotate through on a CPU: twice the 32 MiB of last-level cache that
#: eight cores of a server share. On a GPU it is twice the device's L2.
_ROTATION_BYTES = 64 << 20
_MAX_LAYERS = 128
_BANDWIDTH_BYTES = 512 << 20
_CUDA_BANDWIDTH_BYTES = 4 << 30
#: Calls in a CUDA graph, at least: a graph's own launch is then lost in them.
_GRAPH_CALLS = 16


@dataclasses.dataclass(frozen=True)
class _Baseline:
    """Torch's attention over an uncompressed cache, by one backend."""

    dtype: torch.dtype
    backend: SDPBackend | None = None


_CPU_BASELINES = {
    "torch fp32": _Baseline(torch.float32),
    "torch bf16": _Baseline(torch.bfloat16),
}
_CUDA_BASELINES = {
    "cuDNN bf16": _Baseline(torch.bfloat16, SDPBackend.CUDNN_ATTENTION),
    "flash bf16": _Baseline(torch.bfloat16, SDPBackend.FLASH_ATTENTION),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One decode step of one layer: a query token of each row against `tokens` cached ones.

    Examples
    --------
    >>> Shape(query_heads=32, kv_heads=8, head_dim=128, tokens=4096).label
    '32/8 heads, 4096 tokens'
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    batch: int = 1

    @property
    def label(self) -> str:
        """Rows, heads and tokens as a table shows them."""
        rows = f"{self.batch} x " if self.batch > 1 else ""
        return f"{rows}{self.query_heads}/{self.kv_heads} heads, {self.tokens} tokens"


@dataclasses.dataclass(frozen=True)
class KernelTiming:
    """What one contender needed for one call.

    Attributes
    ----------
    kernel : str
        A name of `baselines` or the widths of ours, ``4+4``.
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


@dataclasses.dataclass(frozen=True)
class PackedLayers:
    """Decode attention over as many of our caches as keep the processor's caches cold.

    Attributes
    ----------
    run : callable
        Attends to all of them.
    calls : int
        Calls of the attention that a run makes.
    nbytes : int
        Bytes of keys and values that one call reads.
    """

    run: Callable[[], object]
    calls: int
    nbytes: int


def baselines(device: torch.device) -> tuple[str, ...]:
    """Names of torch's contenders on a device, the strongest last on a CPU, first on a GPU.

    Examples
    --------
    >>> baselines(torch.device("cuda"))
    ('cuDNN bf16', 'flash bf16')
    """
    return tuple(_baselines(device))


def measure_read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Gigabytes per second that summing a large tensor reads with all of torch's threads."""
    device = torch.device(device)
    size = _CUDA_BANDWIDTH_BYTES if device.type == "cuda" else _BANDWIDTH_BYTES
    numbers = torch.ones(size // 4, device=device)
    seconds = [_seconds(numbers.sum, device) for _ in range(5)]
    return size / min(seconds[1:]) / 1e9


def time_decode(
    shape: Shape,
    widths: Sequence[tuple[int, int]],
    *,
    device: torch.device | str = "cpu",
    turns: int = 15,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[KernelTiming]:
    """Time one query token over a cache of `shape`: torch's attention and ours.

    Parameters
    ----------
    shape : Shape
        Rows, heads, head_dim and tokens.
    widths : sequence of (int, int)
        Key and value bits of ours.
    device : torch.device or str
        CPU (float32 caches) or CUDA (bfloat16 ones).
    turns : int
        Rounds in which every contender runs through its layers once.
    progress : callable, optional
        Called with (turns done, `turns`).

    Returns
    -------
    list of KernelTiming
        Those of `baselines` first, then ours in the order of `widths`.
    """
    device = torch.device(device)
    layers = layers_to_rotate(shape, min(k + v for k, v in widths), device)
    states = query, keys, values = random_states(shape, device)
    runs: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    for name, baseline in _baselines(device).items():
        calls = [_sdpa(query, keys, values, baseline.dtype) for _ in range(layers)]
        backend = nullcontext() if baseline.backend is None else sdpa_kernel(baseline.backend)
        with backend:
            runs[name] = _run_of(calls, device)
        sizes[name] = 2 * keys.numel() * baseline.dtype.itemsize
    configs = {f"{k}+{v}": CacheConfig(k_bits=k, v_bits=v) for k, v in widths}
    for name, ours in packed_layers(configs, layers, states).items():
        runs[name], sizes[name] = ours.run, ours.nbytes

    seconds = take_turns(runs, device, turns, progress)
    calls_made = layers * _rounds(layers, device)
    return [
        KernelTiming(name, 1e6 * statistics.median(taken) / calls_made, sizes[name])
        for name, taken in seconds.items()
    ]


def time_encode(
    head_dim: int,
    k_bits: int,
    v_bits: int,
    *,
    device: torch.device | str = "cpu",
    turns: int = 7,
) -> float:
    """Coordinates encoded per second: a prefill of 4,096 tokens and 8 heads (CUDA: 32 K tokens)."""
    device = torch.device(device)
    heads, tokens = 8, 32768 if device.type == "cuda" else 4096
    keys, values = torch.randn(
        2, 1, heads, tokens, head_dim, device=device, dtype=_states_dtype(device)
    )
    config = CacheConfig(k_bits=k_bits, v_bits=v_bits)
    seconds = [
        _seconds(lambda: _filled_store(config, 0, keys, values), device) for _ in range(turns + 1)
    ]
    return float(2 * keys.numel() / statistics.median(seconds[1:]))


def layers_to_rotate(shape: Shape, bits: int, device: torch.device) -> int:
    """How many layers hold so many codes, of `bits` key and value bits, that none stays cached."""
    code_bytes = bits * shape.batch * shape.kv_heads * shape.tokens * shape.head_dim // 8
    return max(1, min(_MAX_LAYERS, -(-_rotation_bytes(device) // code_bytes)))


def random_states(
    shape: Shape, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries ``[B, Hq, 1, D]``, keys and values ``[B, H, T, D]`` of normal numbers."""
    kind: dict[str, Any] = {"device": device, "dtype": _states_dtype(device)}
    query = torch.randn(shape.batch, shape.query_heads, 1, shape.head_dim, **kind)
    keys, values = torch.randn(2, shape.batch, shape.kv_heads, shape.tokens, shape.head_dim, **kind)
    return query, keys, values


def packed_layers(
    configs: Mapping[str, CacheConfig],
    layers: int,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> dict[str, PackedLayers]:
    """Give layers of our caches keys and values, and attend to each with the query.

    The configs' layers are made in turn: where memory lies is worth a few percent, and should not
    tell one config from another.
    """
    query, keys, values = states
    stores: dict[str, list[LayerStore]] = {name: [] for name in configs}
    for layer in range(layers):
        for name, config in configs.items():
            stores[name].append(_filled_store(config, layer, keys, values))
    calls = layers * _rounds(layers, query.device)
    made = {}
    for name, of_config in stores.items():
        held = of_config[0].nbytes()
        run = _run_of([_packed(store, query) for store in of_config], query.device)
        made[name] = PackedLayers(run, calls, held["pages"] + held["exact"])
    return made


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    turns: int,
    progress: Callable[[int, int], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run all in turn, `turns` times after one to warm up: seconds of every run by name.

    Every other turn goes backwards, so that none always follows the same other. `clock` counts on a
    CPU; a GPU has its own.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            taken = _seconds(runs[name], device, clock)
            if turn > 0:
                seconds[name].append(taken)
        progress(turn, turns)
    return seconds


def _baselines(device: torch.device) -> Mapping[str, _Baseline]:
    return _CUDA_BASELINES if device.type == "cuda" else _CPU_BASELINES


def _states_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _rotation_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _ROTATION_BYTES


def _rounds(layers: int, device: torch.device) -> int:
    """How often a run goes through its layers."""
    return -(-_GRAPH_CALLS // layers) if device.type == "cuda" else 1


def _run_of(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """All calls as one: on a GPU a replay of their graph."""

    def run_all() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run_all
    # What a first call does (loading kernels, uploading tables) cannot be captured.
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        run_all()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_rounds(len(calls), device)):
            run_all()

    def replay(captured: Sequence[Callable[[], object]] = calls) -> None:
        graph.replay()  # reads the tensors that `captured` keeps alive

    return replay


def _sdpa(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
) -> Callable[[], object]:
    # clone: every layer has memory of its own, whatever `to` shares.
    q, k, v = (states.to(dtype).clone() for states in (query, keys, values))
    return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _filled_store(
    config: CacheConfig, layer: int, keys: torch.Tensor, values: torch.Tensor
) -> LayerStore:
    batch, heads, _, dim = keys.shape
    store = LayerStore(
        config.layer_spec(layer, dim, heads),
        batch_size=batch,
        dtype=keys.dtype,
        device=keys.device,
    )
    store.append(keys, values)
    return store


def _packed(store: LayerStore, query: torch.Tensor) -> Callable[[], object]:
    return lambda: store.attend(query, scaling=query.shape[-1] ** -0.5)


def _seconds(
    call: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = clock()
    call()
    return clock() - start
