"""Everything that differs between the supported releases of transformers (5.13 and newer)."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from transformers import cache_utils
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = [
    "CACHE_ARGUMENT",
    "attention_implementation",
    "crop_window",
    "has_bias_by_distance",
    "is_placeholder",
    "kv_source_layers",
    "makes_masks",
    "model_name",
    "placeholder_layer",
    "text_config",
    "tokens_to_remove",
]

# The cache layer of a model layer that stores nothing; older releases know no such class.
_PLACEHOLDER = getattr(cache_utils, "DummyLayer", None)

_OUTPUT_FIELDS = frozenset(field.name for field in dataclasses.fields(CausalLMOutputWithPast))

#: What ``generate()`` and ``forward()`` call their cache, and outputs the field that holds it:
#: ``cache`` since 5.24, where the old name ``past_key_values`` warns.
CACHE_ARGUMENT: Final = "cache" if "cache" in _OUTPUT_FIELDS else "past_key_values"


def attention_implementation(config: Any) -> str | None:
    """Name of the attention that layers made from this configuration use at this moment.

    Every layer asks in every step, so the attribute behind ``config._attn_implementation`` is read
    past the configuration's own look-up, which takes longer than all else that `update` does.
    """
    if config is None:
        return None
    if torch.compiler.is_compiling():  # what follows cannot be traced
        traced: str | None = config._attn_implementation
        return traced
    attributes = object.__getattribute__(config, "__dict__")
    if "_attn_implementation_internal" in attributes:
        name: str | None = attributes["_attn_implementation_internal"]
    else:
        name = getattr(config, "_attn_implementation", None)
    return name


def model_name(config: Any) -> str:
    """How messages call a model: its hub name or directory, its type, both or neither."""
    name = getattr(config, "_name_or_path", "") or ""
    kind = getattr(config, "model_type", "") or ""
    return f"{name} ({kind})" if name and kind else name or kind or "this model"


def text_config(config: Any) -> Any:
    """The configuration whose attention implementation the decoder's layers follow.

    ``get_text_config`` returns a modified copy for flat encoder-decoder configurations; a later
    ``set_attn_implementation`` would not reach that copy, so the original is kept then.
    """
    decoder = config.get_text_config(decoder=True)
    is_part = decoder is config or any(part is decoder for part in vars(config).values())
    return decoder if is_part else config


def has_bias_by_distance(config: Any) -> bool:
    """Whether layers add a learned score bias by distance (T5 and its kin).

    They make it as long as the keys that ``update`` returned, before attention is called.
    """
    return hasattr(config, "relative_attention_num_buckets")


def makes_masks(module: Any) -> bool:
    """Whether an attention layer makes another mask of the one it gets (Doge)."""
    return hasattr(type(module), "prepare_dynamic_mask")


def tokens_to_remove(argument: int, length: int) -> int:
    """What a layer's ``crop(argument)`` removes from `length` tokens.

    Since 5.18 the argument is minus the tokens to remove; before, a positive one was the length
    to keep. A positive argument means nothing else today, so both forms are understood.
    """
    removed = max(length - argument, 0) if argument > 0 else -argument
    return min(removed, length)


def crop_window(layer: Any, removed: int) -> None:
    """Crop a stock sliding-window layer of fixed size that has dropped nothing.

    It counts twice, on the device and on the host. Releases before `crop` knew such layers have no
    method for it.
    """
    if hasattr(layer, "crop"):
        layer.crop(-removed)
    else:
        layer.cumulative_length.sub_(removed)
        layer.cumulative_length_int -= removed


def is_placeholder(layer: Any) -> bool:
    """Whether a cache's layer stores nothing, as its model's layer has no keys of its own."""
    return _PLACEHOLDER is not None and type(layer) is _PLACEHOLDER


def placeholder_layer() -> Any:
    """A layer that stores nothing.

    Raises
    ------
    ValueError
        When this release of transformers has none.
    """
    if _PLACEHOLDER is None:
        raise ValueError("layers: this release of transformers has no layer that stores nothing")
    return _PLACEHOLDER()


def kv_source_layers(config: Any) -> frozenset[int]:
    """Layers whose keys and values later layers read again (Gemma3n and its kin).

    Newer releases mark them "store" in ``kv_sharing_modes``. Older ones count the sharing layers
    at the model's end in ``num_kv_shared_layers``; those read the last earlier layer of their type.
    """
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        stores = frozenset(layer for layer, mode in enumerate(modes) if mode == "store")
        owners = frozenset(layer for layer, mode in enumerate(modes) if mode is None)
        return stores or (owners if "reuse" in modes else stores)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if shared == 0:
        return frozenset()
    types = config.layer_types[: config.num_hidden_layers - shared]
    return frozenset({kind: layer for layer, kind in enumerate(types)}.values())
