"""What a cache's arguments and a model's configuration tell before the first token comes."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import DynamicCache

from turboquant_cpp.hf.context import CacheContext

__all__ = [
    "check_forms",
    "check_layer_bits",
    "check_model",
    "config_head_dim",
    "has_sliding_layers",
    "warn_of_full_layers",
]


def config_head_dim(config: Any) -> int | None:
    """Width of a key as the configuration gives it; None when layers differ or it does not say."""
    head_dim = getattr(config, "head_dim", None)
    if isinstance(head_dim, int):
        return head_dim
    hidden = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        return hidden // heads
    return None


def has_sliding_layers(config: Any) -> bool:
    """Whether some of the model's layers attend to a sliding window only."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return any("sliding" in kind or "chunked" in kind for kind in layer_types)
    return getattr(config, "sliding_window", None) is not None


def check_forms(cache: Any, config: Any, model_config: Any) -> None:
    """Refuse what is neither the native form of a cache nor the wrapping one.

    Raises
    ------
    TypeError
        Naming the argument.
    """
    if (cache is None) == (config is None):
        given = "both" if cache is not None else "neither"
        raise TypeError(
            f"expected either config= (native form) or a DynamicCache to take over, got {given}"
        )
    for name, given_config in (("config", config), ("model_config", model_config)):
        if given_config is not None and not hasattr(given_config, "get_text_config"):
            raise TypeError(
                f"{name}: expected a model's configuration (model.config), got "
                f"{type(given_config).__name__}"
            )
    if cache is not None and not isinstance(cache, DynamicCache):
        raise TypeError(
            "cache: expected a DynamicCache to take over (a model's own cache is made with "
            f"config=model.config), got {type(cache).__name__}"
        )


def check_model(context: CacheContext) -> None:
    """Refuse models whose keys and values a page cannot hold.

    Raises
    ------
    ValueError
        Keys and values of different widths (MLA), layers that compress keys and values
        themselves, or a head width that is not supported.
    """
    config = context.model_config
    own_kinds = [kind for kind in getattr(config, "layer_types", None) or [] if "compress" in kind]
    if own_kinds:
        raise ValueError(
            f"{context.model_name}: {own_kinds[0]} layers compress their keys and values "
            "themselves and are not supported: use the model's own cache"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        key_width = getattr(config, "qk_head_dim", None) or (
            (getattr(config, "qk_nope_head_dim", 0) or 0)
            + (getattr(config, "qk_rope_head_dim", 0) or 0)
        )
        value_width = getattr(config, "v_head_dim", None)
        if key_width and value_width and key_width != value_width:
            raise ValueError(context.different_widths(key_width, value_width))
        return
    head_dim = config_head_dim(config)
    if head_dim is not None:
        context.config.layer_spec(0, head_dim, 1)


def check_layer_bits(context: CacheContext) -> None:
    """Refuse widths for layers that the model does not have.

    Raises
    ------
    ValueError
        Naming the layer.
    """
    number = getattr(context.model_config, "num_hidden_layers", None)
    for layer in context.config.layer_bits:
        if isinstance(number, int) and layer >= number:
            raise ValueError(
                f"layer_bits: expected layers of 0 to {number - 1} ({context.model_name} has "
                f"{number}), got {layer}"
            )


def warn_of_full_layers(config: Any, layers: list[Any], layers_are_made_lazily: bool) -> None:
    """Warn when a sliding-window model is given a cache that keeps every token of every layer."""
    has_stock_sliding = any(getattr(layer, "is_sliding", False) for layer in layers)
    if has_sliding_layers(config) and not has_stock_sliding and (layers or layers_are_made_lazily):
        warnings.warn(
            "the model has sliding-window layers but the cache has none, so tokens outside the "
            "window are kept: make it with DynamicCache(config=model.config)",
            UserWarning,
            stacklevel=4,
        )
