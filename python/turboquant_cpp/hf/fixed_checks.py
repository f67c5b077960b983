"""What a cache of fixed capacity is made of, and what it cannot be combined with."""

from __future__ import annotations

from typing import Any, Final

from transformers import StaticCache
from transformers.cache_utils import CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer

from turboquant_cpp.hf.context import CacheContext
from turboquant_cpp.spec import as_integer

__all__ = ["check_fixed", "fixed_layers"]

_TYPES: Final = (StaticLayer, StaticSlidingWindowLayer)


def check_fixed(context: CacheContext, *, is_native: bool) -> None:
    """Refuse combinations with ``max_cache_len=`` that do not exist.

    Raises
    ------
    ValueError
        Naming the option.
    """
    length = as_integer("max_cache_len", context.max_cache_len)
    if not 1 <= length < 2**31:
        raise ValueError(f"max_cache_len: expected 1 to {2**31 - 1}, got {length}")
    config = context.config
    for holds, name, expected in (
        (is_native, "cache", "config= (the native form)"),
        (not context.is_offloaded, "offloading", "False"),
        (not context.is_incremental, "dequantize", "'full'"),
        (config.exact_first_layers == 0, "exact_first_layers", "0"),
        (config.exact_last_layers == 0, "exact_last_layers", "0"),
        (not context.is_undecided, "policy", "'uniform'"),
        (not context.kv_source_layers, "config", "a model whose layers keep keys of their own"),
    ):
        if not holds:
            raise ValueError(f"{name}: expected {expected} with max_cache_len, got another")


def fixed_layers(config: Any, context: CacheContext) -> list[Any]:
    """Stock layers of fixed capacity for a model; its full-attention ones are to be compressed.

    Raises
    ------
    ValueError
        When the model has layers of a kind that a fixed capacity is not supported for.
    """
    layers = StaticCache(config=config, max_cache_len=context.max_cache_len).layers
    for index, layer in enumerate(layers):
        if isinstance(layer, CacheLayerMixin) and type(layer) not in _TYPES:
            raise ValueError(
                f"max_cache_len: expected None for {context.model_name}, whose layer {index} is a "
                f"{type(layer).__name__} (full and sliding-window attention is supported)"
            )
    return list(layers)
