"""What a compressed layer asks of new keys and values, so that a message names what is wrong."""

from __future__ import annotations

from torch import Tensor

from turboquant_cpp.hf.context import CacheContext
from turboquant_cpp.layer_store import LayerStore
from turboquant_cpp.store_checks import check_has_heads, check_is_tensor

__all__ = ["check_like_stored", "check_pair"]


def check_pair(context: CacheContext, keys: Tensor, values: Tensor) -> None:
    """Refuse keys and values that are no pair ``[batch, heads, tokens, head_dim]``.

    Raises
    ------
    TypeError
        For what is no dense tensor.
    ValueError
        When their shape, dtype or device differ or the shape has no meaning.
    """
    for name, states in (("key_states", keys), ("value_states", values)):
        check_is_tensor(name, states)
    check_has_heads("key_states", keys)
    if keys.shape[:3] == values.shape[:3] and keys.shape[3] != values.shape[3]:
        raise ValueError(context.different_widths(keys.shape[3], values.shape[3]))
    if keys.shape != values.shape or keys.dtype != values.dtype or keys.device != values.device:
        raise ValueError(
            f"value_states: expected {tuple(keys.shape)} of {keys.dtype} on {keys.device} like "
            f"key_states, got {tuple(values.shape)} of {values.dtype} on {values.device}"
        )


def check_like_stored(layer_idx: int, store: LayerStore, keys: Tensor) -> None:
    """Refuse keys of a `check_pair` that cannot follow the tokens that a layer holds.

    Raises
    ------
    ValueError
        When shape, dtype or device are others.
    """
    spec = store.spec
    shape = (store.batch_size, spec.num_kv_heads, keys.shape[2], spec.head_dim)
    for name, expected, given in (
        ("shape", shape, tuple(keys.shape)),
        ("dtype", store.dtype, keys.dtype),
        ("device", store.device, keys.device),
    ):
        if given != expected:
            raise ValueError(
                f"key_states: expected {name} {expected} like the tokens that layer {layer_idx} "
                f"holds, got {given}"
            )
