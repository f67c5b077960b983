"""The attention implementation ``"turboquant"`` and its mask function.

`CompressedLayer.update` returns the new tokens' keys carrying a handle to the layer. Nothing
happens to them before the attention function gets them, so there the handle is found again and
the layer answers from its codes. Keys without a handle (training, encoders, cross attention,
layers with a stock cache) get exact attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from turboquant_cpp.hf.chunk import pending_chunk
from turboquant_cpp.hf.compat import (
    attention_implementation,
    makes_masks,
    model_name,
    text_config,
)
from turboquant_cpp.hf.dense import AttentionCall, dense_attention
from turboquant_cpp.hf.fixed_layer import MASK_OFFSET

__all__ = [
    "IMPLEMENTATION",
    "register",
    "stock_attention",
    "turboquant_attention",
    "turboquant_mask",
]

IMPLEMENTATION: Final = "turboquant"


def turboquant_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `turboquant_attention` takes.

    Plain causal attention over a growing cache needs no more than the padding: the 2-D mask, or
    None when there is no padding. So does a compressed cache of fixed capacity, whose 2-D mask is
    as wide as the capacity and not looked at, for that would wait for the device. Every other
    pattern (sliding windows, packed sequences, blocks, bidirectional, a stock cache of fixed size)
    becomes the full 4-D boolean mask.
    """
    if kv_offset == MASK_OFFSET:
        if mask_function is causal_mask_function:
            return None if attention_mask is None else _as_wide(attention_mask, kv_length)
        kv_offset = 0
    is_compact = (
        mask_function is causal_mask_function
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
    )
    if not is_compact:
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        full: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        return full
    if attention_mask is None:
        return None
    padding = _as_wide(attention_mask[:, kv_offset:], kv_length)
    return None if bool(padding.all()) else padding


def turboquant_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention straight from a compressed layer's codes, exact where there is no such layer.

    Parameters
    ----------
    query, key, value : Tensor
        ``[B, Hq, q, D]`` and ``[B, H, kv, D]``; `key` as `CompressedLayer.update` returned it, or
        any dense keys.
    attention_mask : Tensor or None
        None, 2-D padding ``[B, past + q]`` or a full 4-D mask.
    sliding_window, softcap, s_aux, position_bias : int, float, Tensor, Tensor, optional
        The model's window, score cap, learned sink logits ``[Hq]`` and additive score bias.

    Returns
    -------
    tuple
        ``[B, q, Hq, D]`` and None (no attention weights).

    Raises
    ------
    ValueError
        When the model has used or changed the keys before, as if they were all there are, or makes
        a mask of its own from one that `turboquant_mask` leaves out.
    """
    if makes_masks(module):
        raise ValueError(
            f"{model_name(getattr(module, 'config', None))} makes attention masks of its own from "
            "causal ones, which this attention does without: "
            "model.set_attn_implementation('sdpa') or 'eager'"
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    call = AttentionCall(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        is_causal=is_causal,
        softcap=float(softcap or 0.0),
        # A full mask already holds the window.
        sliding_window=0 if _is_full(attention_mask) else int(sliding_window or 0),
        sink_logits=s_aux,
        position_bias=position_bias,
        dropout=dropout,
    )
    chunk = pending_chunk(key, value, getattr(module, "layer_idx", None))
    if chunk is not None:
        return chunk.attend(query, attention_mask, call), None
    return dense_attention(query, key, value, attention_mask, call), None


def register() -> None:
    """Make ``"turboquant"`` known to transformers; the mask too, or masks would be dropped."""
    AttentionInterface.register(IMPLEMENTATION, turboquant_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, turboquant_mask)


@contextlib.contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """While the block runs, a model with the fused attention has torch's: what to compare with."""
    is_fused = attention_implementation(text_config(model.config)) == IMPLEMENTATION
    if is_fused:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if is_fused:
            model.set_attn_implementation(IMPLEMENTATION)


def _as_wide(padding: Tensor, kv_length: int) -> Tensor:
    """A 2-D mask of `kv_length` tokens: those beyond a short one are hidden, as in `sdpa_mask`."""
    padding = padding[:, :kv_length]
    return nn.functional.pad(padding, (0, kv_length - padding.shape[1]))


def _is_full(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 4
