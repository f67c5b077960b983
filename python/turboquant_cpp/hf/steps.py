"""Steps that failed on their way through the layers, and what is to be done about them.

A layer's own operations either succeed or leave it as it was. A step (or a crop, a reorder, ...)
that fails in a later layer has changed the earlier ones: those hold more tokens than the rest. The
next step finds that out before it changes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    StaticSlidingWindowLayer,
)

from turboquant_cpp.hf import compat
from turboquant_cpp.hf.fixed_layer import recount
from turboquant_cpp.hf.takeover import attention_half

__all__ = ["check_level", "check_new_layer", "crop_layer", "crop_uneven", "first_layer"]


def first_layer(layers: list[Any]) -> int:
    """The layer with which a step begins: the first one that has keys and values."""
    return next((i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)), 0)


def check_level(layers: list[Any]) -> None:
    """Refuse to go on when earlier layers are ahead of later ones: a step failed between them.

    Layers that are behind for another reason (they hold an image's tokens, or another layer's keys
    are read in their place) have layers after them that are ahead again.

    Raises
    ------
    RuntimeError
        Saying how to repair the cache.
    """
    recount(layers)
    problem = _surplus(layers)
    if problem is not None:
        first, behind, surplus = problem
        raise RuntimeError(
            f"layer {first} holds {_length(layers[first])} tokens and layer {behind} "
            f"{_length(layers[behind])}: a step failed between them. Remove what it added "
            f"with crop({-surplus}), or forget everything with reset()"
        )


def check_new_layer(
    layers: list[Any], layer_idx: int, new_tokens: int, *, makes_layers: bool
) -> None:
    """Refuse a layer that the cache lacks, unless it `makes_layers` and its first step is running.

    `new_tokens` is what this step adds, and has added to the first layer.

    Raises
    ------
    ValueError
        When the cache makes no layers.
    RuntimeError
        When the layers before it hold an earlier step's tokens; says how to repair the cache.
    """
    if not makes_layers:
        raise ValueError(
            f"layer_idx: expected 0 to {len(layers) - 1} (the cache has {len(layers)} layers), got "
            f"{layer_idx}. If the model has more layers than the one whose configuration the cache "
            "was given, forget its tokens with reset()"
        )
    past = layers[0].get_seq_length() - new_tokens if layers else 0
    if past > 0:
        raise RuntimeError(
            f"layer {layer_idx} holds nothing and layer 0 {past} tokens of earlier steps: a step "
            f"failed between them, or the tokens are another model's. Remove them with "
            f"crop({-past - new_tokens}), or forget everything with reset()"
        )


def crop_uneven(layers: list[Any], tokens_to_remove: int) -> Callable[[Any], None] | None:
    """How each layer is cropped after a failed step; None when all are level.

    The number of tokens counts from the layers that are ahead, so that all of them end with the
    same tokens.

    Raises
    ------
    RuntimeError
        When a layer has a linear-attention state, of which no earlier one is kept.
    """
    recount(layers)
    problem = _surplus(layers)
    if problem is None:
        return None
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise RuntimeError(
            "a step failed between two layers, and linear-attention states cannot go back to "
            "before it: forget everything with reset()"
        )
    most = _length(layers[problem[0]]) or 0
    kept = tokens_to_remove if tokens_to_remove > 0 else max(most + tokens_to_remove, 0)

    def crop(layer: Any) -> None:
        surplus = (_length(layer) or 0) - kept
        if surplus > 0:
            crop_layer(layer, -surplus)

    return crop


def crop_layer(layer: Any, tokens_to_remove: int) -> None:
    """Crop a layer as its class does, and refuse what a window of fixed size could not undo.

    Such a window has no tokens to put in the place of those it has dropped, and does not say so.

    Raises
    ------
    RuntimeError
        When a sliding-window layer cannot go back.
    """
    has_states = isinstance(layer, LinearAttentionCacheLayerMixin)
    if not has_states and not getattr(layer, "is_initialized", True):
        return
    if isinstance(layer, StaticSlidingWindowLayer):
        seen, slots = layer.cumulative_length_int, layer.max_cache_len
        removed = compat.tokens_to_remove(tokens_to_remove, seen)
        if removed == 0:
            return
        if seen > slots:
            raise RuntimeError(
                f"a sliding-window layer of fixed size cannot go back: it holds {slots} of {seen} "
                "tokens. Forget everything with reset()"
            )
        compat.crop_window(layer, removed)
        return
    layer.crop(tokens_to_remove)


def _surplus(layers: list[Any]) -> tuple[int, int, int] | None:
    """First layer, first layer behind it, and by how much; None when no step failed."""
    indices = range(len(layers))
    first, last = (
        next((i for i in order if _length(layers[i]) is not None), None)
        for order in (indices, reversed(indices))
    )
    if first is None or last is None:
        return None
    most, least = _length(layers[first]), _length(layers[last])
    assert most is not None
    assert least is not None
    if most <= least:
        return None
    known = {i: length for i in indices if (length := _length(layers[i])) is not None}
    if list(known.values()) != sorted(known.values(), reverse=True):
        return None
    return first, next(i for i, length in known.items() if length < most), most - least


def _length(layer: Any) -> int | None:
    """Tokens of a layer that has keys."""
    half = attention_half(layer)
    if half is not None:
        return half.get_host_length()
    length = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else None
    return length if isinstance(length, int) else None
