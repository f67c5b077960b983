"""Which layers of a stock cache are compressed, and the way back."""

from __future__ import annotations

import logging
from typing import Any, Final

from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from turboquant_cpp.hf.context import CacheContext
from turboquant_cpp.hf.fixed_layer import FixedLayer
from turboquant_cpp.hf.hybrid import CompressedHybridLayer
from turboquant_cpp.hf.layer import CompressedLayer

__all__ = ["attention_half", "compress_layers", "restore_layers", "stock_reason"]

_logger = logging.getLogger("turboquant_cpp")
_reported: Final[set[str]] = set()


def stock_reason(layer: Any, index: int, num_layers: int, context: CacheContext) -> str | None:
    """Why a layer keeps its stock class; None when it is compressed."""
    if type(layer) in (DynamicLayer, StaticLayer, LinearAttentionAndFullAttentionLayer):
        if context.config.is_exact(index, num_layers):
            return "exact_first_layers or exact_last_layers covers it"
        return None
    if isinstance(layer, (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)):
        return "a sliding-window layer holds no more than its window, which stays exact"
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return "a linear-attention layer has no keys and values"
    if not isinstance(layer, CacheLayerMixin):
        return "the layer stores nothing (it shares another layer's keys or has no attention)"
    return f"{type(layer).__name__} is a kind of storage that is not supported"


def compress_layers(
    layers: list[Any], context: CacheContext, num_layers: int | None = None
) -> dict[int, str]:
    """Replace full-attention layers in place, taking over the tokens they hold.

    Nothing is replaced unless all of it succeeds. `num_layers` is the model's number of layers, if
    the cache may not have all of them yet.

    Returns
    -------
    dict
        Layers that keep their stock class, each with the reason (reported once a process).
    """
    reasons: dict[int, str] = {}
    replaced: dict[int, Any] = {}
    for index, layer in enumerate(layers):
        reason = stock_reason(layer, index, num_layers or len(layers), context)
        if attention_half(layer) is None and reason is not None:
            reasons[index] = reason
        elif attention_half(layer) is None:
            replaced[index] = _compressed(layer, index, context)
    for index, layer in replaced.items():
        layers[index] = layer
    for reason in dict.fromkeys(reasons.values()):
        _report(reason, [index for index in reasons if reasons[index] == reason], context)
    return reasons


def restore_layers(layers: list[Any]) -> None:
    """Replace compressed layers in place by stock ones that hold the dequantised tokens."""
    for index, layer in enumerate(layers):
        if isinstance(layer, CompressedHybridLayer):
            stock = LinearAttentionAndFullAttentionLayer(layer.number_of_states)
            state = {name: value for name, value in vars(layer).items() if name != "attention"}
            vars(stock).update(state)
            layers[index] = _filled(stock, layer.attention)
        elif isinstance(layer, CompressedLayer):
            layers[index] = _filled(DynamicLayer(), layer)


def attention_half(layer: Any) -> CompressedLayer | None:
    """The compressed keys and values of a cache layer, if it has any."""
    if isinstance(layer, CompressedHybridLayer):
        return layer.attention
    return layer if isinstance(layer, CompressedLayer) else None


def _compressed(layer: Any, index: int, context: CacheContext) -> Any:
    compressed: Any
    if isinstance(layer, LinearAttentionAndFullAttentionLayer):
        compressed = CompressedHybridLayer(context, index, layer.number_of_states)
        state = dict(vars(layer))
        for name in ("keys", "values", "is_initialized"):
            state.pop(name, None)
        vars(compressed).update(state)
        half = compressed.attention
    else:
        layer_class = CompressedLayer if context.max_cache_len is None else FixedLayer
        compressed = half = layer_class(context, index)
    if layer.is_initialized and layer.get_seq_length() > 0:
        half.lazy_initialization(layer.keys, layer.values)
        half.append(layer.keys, layer.values)
        half.device = layer.device  # an offloaded layer's keys are elsewhere
    return compressed


def _filled(stock: Any, compressed: CompressedLayer) -> Any:
    if compressed.is_initialized:
        stock.keys, stock.values = compressed.dense()
        stock.dtype, stock.device = compressed.dtype, compressed.device
        stock.is_initialized = True
    return stock


def _report(reason: str, layers: list[int], context: CacheContext) -> None:
    if reason not in _reported:
        _reported.add(reason)
        named = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
        _logger.warning(
            "%s: %d of the cache's layers stay uncompressed (%s): %s",
            context.model_name,
            len(layers),
            named,
            reason,
        )
