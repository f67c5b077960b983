"""Exact attention over dense keys and values, with every mask a model may bring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["AttentionCall", "causal_mask", "dense_attention", "heads_last"]


@dataclass(slots=True)
class AttentionCall:
    """What a model asks of one attention call beside query, keys and values."""

    scaling: float
    is_causal: bool = True
    softcap: float = 0.0
    sliding_window: int = 0
    sink_logits: Tensor | None = None
    position_bias: Tensor | None = None
    dropout: float = 0.0

    def store_options(self) -> dict[str, Any]:
        """Keyword arguments of `LayerStore.attend` and its kin."""
        return {
            "scaling": self.scaling,
            "softcap": self.softcap,
            "sliding_window": self.sliding_window,
            "sink_logits": self.sink_logits,
        }

    def codes_problem(self, query: Tensor) -> str:
        """What of the call codes alone cannot answer; "" when they can. A mask is not looked at."""
        if not self.is_causal and query.shape[2] > 1:
            return "bidirectional queries"
        if self.position_bias is not None:
            return "a position bias"
        if self.dropout > 0:
            return "dropout"
        if torch.is_grad_enabled() and query.requires_grad:
            return "gradients (use torch.no_grad())"
        return ""


def causal_mask(query: Tensor, kv_length: int, sliding_window: int = 0) -> Tensor:
    """Boolean ``[q, kv_length]``: the last query sees every key, earlier ones fewer."""
    q_length = query.shape[2]
    keys = torch.arange(kv_length, device=query.device)
    positions = torch.arange(kv_length - q_length, kv_length, device=query.device)[:, None]
    mask = keys <= positions
    if sliding_window > 0:
        mask &= keys > positions - sliding_window
    return mask


def dense_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, call: AttentionCall
) -> Tensor:
    """Attention of ``query [B, Hq, q, D]`` over ``keys, values [B, H, kv, D]``.

    Parameters
    ----------
    mask : Tensor or None
        None: causal (aligned at the end) if the call says so, else everything is seen. 2-D
        ``[B, kv]``: the same without the padding it marks. 4-D: the whole truth, boolean (True is
        seen) or additive.

    Returns
    -------
    Tensor
        ``[B, q, Hq, D]``, contiguous; 0 where a query sees nothing under a boolean mask.
    """
    q_length, kv_length = query.shape[2], keys.shape[2]
    is_plain = mask is None and call.sliding_window == 0 and call.position_bias is None
    is_extra = call.softcap > 0 or call.sink_logits is not None
    use_causal_flag = is_plain and call.is_causal and 1 < q_length == kv_length and not is_extra
    if (mask is None or mask.dim() == 2) and not use_causal_flag:
        mask = _full_mask(query, kv_length, mask, call)
    if call.position_bias is not None:
        mask = _biased(call.position_bias, mask)
    groups = query.shape[1] // keys.shape[1]
    # With a mask torch's fast kernels for grouped heads do not serve.
    is_grouped = groups > 1 and mask is None and not is_extra
    if groups > 1 and not is_grouped:
        keys = keys.repeat_interleave(groups, dim=1)
        values = values.repeat_interleave(groups, dim=1)
    if is_extra:
        out = _explicit_attention(query, keys, values, mask, call)
    else:
        out = functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            dropout_p=call.dropout,
            is_causal=use_causal_flag,
            scale=call.scaling,
            enable_gqa=is_grouped,
        )
    return heads_last(out)


def heads_last(out: Tensor) -> Tensor:
    """``[B, Hq, q, D]`` as models go on with it: ``[B, q, Hq, D]``, contiguous."""
    return out.transpose(1, 2).contiguous()


def _full_mask(
    query: Tensor, kv_length: int, padding: Tensor | None, call: AttentionCall
) -> Tensor | None:
    """Boolean mask that broadcasts to ``[B, 1, q, kv]``; None where everything is seen."""
    needs_causal = call.is_causal and (query.shape[2] > 1 or call.sliding_window > 0)
    mask = causal_mask(query, kv_length, call.sliding_window) if needs_causal else None
    if padding is None:
        return mask
    seen = (padding[:, -kv_length:] != 0)[:, None, None, :]
    return seen if mask is None else seen & mask


def _biased(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """Additive mask: the score bias where a key is seen."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask


def _explicit_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, call: AttentionCall
) -> Tensor:
    """Softmax written out: scores capped before the mask, sink logits beside the scores."""
    scores = torch.matmul(query, keys.transpose(2, 3)) * call.scaling
    if call.softcap > 0:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    unseen = None
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            unseen = ~mask.any(dim=-1, keepdim=True)
        else:
            scores = scores + mask
    kv_length = keys.shape[2]
    if call.sink_logits is not None:
        sinks = call.sink_logits.to(scores.dtype).reshape(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights[..., :kv_length], p=call.dropout)
    out = torch.matmul(weights, values)
    return out if unseen is None else out.masked_fill(unseen, 0)
