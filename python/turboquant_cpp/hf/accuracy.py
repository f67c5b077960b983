"""Keys and values that pass through the quantiser and stay dense: accuracy only, nothing saved."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from turboquant_cpp.layer_store import LayerStore
from turboquant_cpp.spec import CacheConfig

__all__ = ["TurboQuantKVCache"]


class _RoundTripLayer(DynamicLayer):
    """A stock layer whose new tokens are quantised and dequantised on their way in."""

    def __init__(self, owner: TurboQuantKVCache, layer_idx: int) -> None:
        super().__init__()
        self.owner = owner
        self.layer_idx = layer_idx

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.owner.round_trip(self.layer_idx, key_states, value_states)
        return super().update(keys, values, *args, **kwargs)  # type: ignore[no-any-return]


class TurboQuantKVCache:
    """Takes over a `DynamicCache` so that its keys and values carry the quantiser's error.

    Everything stays dense, so this saves no memory: it is for measuring accuracy. Every token is
    quantised at once, without window, sinks, centring or smoothing.

    Parameters
    ----------
    cache : DynamicCache
        The cache to take over; use it in ``generate()`` afterwards. Tokens in it stay as they are.
    head_dim : int
        Width of keys and values.
    bits : int
        Width of the codes.
    seed : int
        Seed of the rotations.
    compress_keys, compress_values : bool
        Which of the two pass through the quantiser.

    Examples
    --------
    >>> import torch
    >>> from transformers import DynamicCache
    >>> from turboquant_cpp import TurboQuantKVCache
    >>> cache = DynamicCache()
    >>> accuracy = TurboQuantKVCache(cache, head_dim=64, bits=4)
    >>> states = torch.randn(1, 2, 5, 64)
    >>> keys, values = cache.update(states, states, 0)
    >>> bool((keys - states).square().mean() < 0.02)
    True
    """

    def __init__(
        self,
        cache: DynamicCache,
        head_dim: int,
        bits: int = 4,
        seed: int = 42,
        *,
        compress_keys: bool = True,
        compress_values: bool = True,
    ) -> None:
        if not isinstance(cache, DynamicCache):
            raise TypeError(f"cache: expected a DynamicCache, got {type(cache).__name__}")
        self.config = CacheConfig(bits=bits, seed=seed, recipe="plain")
        self.config.layer_spec(0, head_dim, 1)
        self.cache = cache
        self.head_dim = head_dim
        self.compress_keys = compress_keys
        self.compress_values = compress_values
        for index, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                taken = _RoundTripLayer(self, index)
                taken.__dict__.update(vars(layer))
                cache.layers[index] = taken
        if cache.layer_class_to_replicate is not None:
            cache.layer_class_to_replicate = self._new_layer

    def _new_layer(self) -> _RoundTripLayer:
        return _RoundTripLayer(self, len(self.cache.layers))

    def round_trip(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, T, D]`` after quantising and dequantising."""
        batch_size, num_kv_heads, tokens, head_dim = keys.shape
        spec = self.config.layer_spec(layer_idx, head_dim, num_kv_heads)
        store = LayerStore(spec, batch_size=batch_size, dtype=keys.dtype, device=keys.device)
        store.append(keys, values)
        coded_keys, coded_values = store.dequantize(tokens)
        return (
            coded_keys if self.compress_keys else keys,
            coded_values if self.compress_values else values,
        )

    def restore(self) -> None:
        """Let go of the cache: later tokens are stored as they come."""
        for index, layer in enumerate(self.cache.layers):
            if isinstance(layer, _RoundTripLayer):
                stock = DynamicLayer()
                state = {n: v for n, v in vars(layer).items() if n not in ("owner", "layer_idx")}
                stock.__dict__.update(state)
                self.cache.layers[index] = stock
        if self.cache.layer_class_to_replicate is not None:
            self.cache.layer_class_to_replicate = DynamicLayer
