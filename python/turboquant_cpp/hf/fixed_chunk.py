"""The tokens between a fixed layer's ``update`` and the attention call that reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from turboquant_cpp.hf.chunk import PendingChunk, tagged
from turboquant_cpp.hf.dense import AttentionCall, heads_last
from turboquant_cpp.hf.padding import left_padding_of_mask

if TYPE_CHECKING:
    from turboquant_cpp.hf.fixed_layer import FixedLayer

__all__ = ["CompiledChunk", "FixedChunk"]


class FixedChunk(PendingChunk):
    """A chunk outside of compiled regions: `PendingChunk`, for masks as wide as the capacity."""

    layer: FixedLayer

    def attend(self, query: Tensor, mask: Tensor | None, call: AttentionCall) -> Tensor:
        """Attention over the past and this chunk; see `PendingChunk.attend`.

        Raises
        ------
        ValueError
            For a 2-D mask that hides more than padding before a row's first token: compiled steps
            are told of such padding only.
        """
        return super().attend(query, self._trimmed(mask), call)

    def _trimmed(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        mask = mask[..., : self.past_tokens + self.tokens]
        if mask.dim() == 2:
            if left_padding_of_mask(mask) is None:
                raise ValueError(
                    "attention_mask: expected zeros only before a row's first token (left "
                    "padding) with a cache of fixed capacity, got zeros after it"
                )
            if bool(mask.all()):
                return None
        return mask

    def _attend_packed(self, query: Tensor, call: AttentionCall) -> Tensor:
        layer = self.layer
        if layer.context.reads_quantized:
            layer.commit()
            return attend_committed(layer, query, call)
        out = attend_append(layer, query, self.keys, self.values, call)
        layer.mark_committed(self)
        return out


class CompiledChunk:
    """A chunk within a compiled region: read and stored at once, with the same operators always."""

    def __init__(self, layer: FixedLayer, keys: Tensor, values: Tensor) -> None:
        self.layer = layer
        self.keys = keys
        self.values = values

    def tagged_keys(self) -> Tensor:
        """The keys as a view of their own that leads back here (`pending_chunk`)."""
        return tagged(self.keys, self)

    def attend(self, query: Tensor, mask: Tensor | None, call: AttentionCall) -> Tensor:
        """Attention over the past and this chunk, which is stored then.

        Padding is what the layer knows of it: a 2-D mask is not looked at.

        Raises
        ------
        ValueError
            For what only the dequantised past could answer, whose size would not be fixed.
        """
        is_full = mask is not None and mask.dim() != 2
        problem = "a 4-D mask" if is_full else call.codes_problem(query)
        if problem:
            raise ValueError(
                f"a compiled step of a compressed cache takes causal attention without {problem}"
            )
        layer = self.layer
        if layer.context.reads_quantized:
            layer.append(self.keys, self.values)
            return attend_committed(layer, query, call)
        out = attend_append(layer, query, self.keys, self.values, call)
        layer.lose_count()
        return out


def attend_append(
    layer: FixedLayer, query: Tensor, keys: Tensor, values: Tensor, call: AttentionCall
) -> Tensor:
    """Attention ``[B, q, Hq, D]`` over the past and a chunk, which is stored then."""
    store = layer.fixed_store
    plan = store.plan(keys.shape[2])
    out = store.attend_append_planned(query, keys, values, plan, **call.store_options())
    return out.to(query.dtype)


def attend_committed(layer: FixedLayer, query: Tensor, call: AttentionCall) -> Tensor:
    """Attention ``[B, q, Hq, D]`` over what is stored."""
    out, _ = layer.fixed_store.attend_committed(query, **call.store_options())
    return heads_last(out.to(query.dtype))
