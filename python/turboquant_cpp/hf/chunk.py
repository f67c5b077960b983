"""The tokens between a layer's ``update`` and the attention call that reads them."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from turboquant_cpp.hf.dense import AttentionCall, dense_attention, heads_last
from turboquant_cpp.hf.padding import left_padding_of_mask, tokens_after

if TYPE_CHECKING:
    from turboquant_cpp.hf.layer import CompressedLayer

__all__ = ["PendingChunk", "pending_chunk", "tagged"]

_ATTRIBUTE: Final = "_turboquant_chunk"


class _LastChunk(threading.local):
    """The chunk that a layer handed out last in this thread."""

    reference: weakref.ref[PendingChunk] | None = None

    def get(self) -> PendingChunk | None:
        return None if self.reference is None else self.reference()


_last_chunk: Final = _LastChunk()


def pending_chunk(
    keys: Tensor, values: Tensor, layer_idx: int | None = None
) -> PendingChunk | None:
    """The chunk whose keys and values these are, if a compressed layer returned them.

    Raises
    ------
    ValueError
        When a model has made others of them (repeated their heads, say), which lack the past.
    """
    chunk: PendingChunk | None = getattr(keys, _ATTRIBUTE, None)
    if torch.compiler.is_compiling():
        return chunk  # the prompt before it was read by the same model outside of a graph
    if chunk is not None:
        is_changed = values is not chunk.values and (
            values.shape != chunk.values.shape or values.data_ptr() != chunk.values.data_ptr()
        )
    else:
        chunk = _last_chunk.get()
        if chunk is None or not chunk.is_missed_by(keys, layer_idx):
            return None
        is_changed = True
    if is_changed:
        chunk.was_read = True  # said once: what is read next is not these keys
        raise ValueError(
            f"{chunk.layer.context.model_name} changes keys or values between its cache and its "
            "attention, so the codes cannot take their place: "
            "model.set_attn_implementation('sdpa') or 'eager'"
        )
    return chunk


def tagged(keys: Tensor, chunk: object) -> Tensor:
    """`keys` as a view of its own from which `pending_chunk` gets `chunk`."""
    view = keys.view_as(keys)
    setattr(view, _ATTRIBUTE, chunk)
    return view


@functools.cache
def _warn_of_dequantising(problem: str) -> None:
    """Say once that every step will cost memory and time."""
    warnings.warn(f"{problem}; every step dequantises each layer's past", stacklevel=2)


class PendingChunk:
    """New keys and values ``[B, H, T, D]`` that attention reads before they are encoded.

    Committing waits for the attention call because only there the padding of the batch is known.
    """

    def __init__(self, layer: CompressedLayer, keys: Tensor, values: Tensor) -> None:
        self.layer = layer
        self.keys = keys
        self.values = values
        self.past_tokens = layer.committed_tokens
        self.was_read = False
        self.is_committed = False

    @property
    def tokens(self) -> int:
        """Positions of the chunk, padding included."""
        return self.keys.shape[2]

    def tagged_keys(self) -> Tensor:
        """The keys as a view of their own that leads back here (`pending_chunk`)."""
        _last_chunk.reference = weakref.ref(self)
        return tagged(self.keys, self)

    def is_missed_by(self, keys: Tensor, layer_idx: int | None) -> bool:
        """Whether these keys, which do not lead here, are what the layer's attention reads."""
        return (
            not self.was_read
            and not self.is_committed
            and self.past_tokens > 0
            and self.layer.layer_idx == layer_idx
            and self.tokens == keys.shape[2]
        )

    def attend(self, query: Tensor, mask: Tensor | None, call: AttentionCall) -> Tensor:
        """Attention of ``query [B, Hq, q, D]`` over the past and this chunk.

        Returns
        -------
        Tensor
            ``[B, q, Hq, D]``.

        Raises
        ------
        ValueError
            When the mask or the score bias was made for the chunk alone; nothing is stored.
        """
        self.was_read = True
        self._check_key_length(mask, call)
        rows_fit = self._settle_rows(mask)
        layer = self.layer
        if layer.context.is_undecided:
            layer.observe(query, call)
        if self.past_tokens == 0 and not layer.context.reads_quantized:
            out = dense_attention(query, self.keys, self.values, mask, call)
        elif rows_fit and self._is_fusable(query, call):
            return self._attend_packed(query, call)
        else:
            keys, values = self.dense()
            out = dense_attention(query, keys, values, mask, call)
        if not layer.is_read_again:
            layer.commit()
        return out

    def _check_key_length(self, mask: Tensor | None, call: AttentionCall) -> None:
        """Refuse what was made from the keys that `update` returned, which are the chunk's only."""
        expected = self.past_tokens + self.tokens
        for name, given in (("attention_mask", mask), ("position_bias", call.position_bias)):
            if given is not None and given.dim() == 4 and given.shape[-1] != expected:
                raise ValueError(
                    f"{name}: expected {expected} keys like layer {self.layer.layer_idx}, got "
                    f"{given.shape[-1]}. If {self.layer.context.model_name} makes it from the keys "
                    "themselves, it needs them dequantised: model.set_attn_implementation('sdpa') "
                    "or 'eager'"
                )

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values of past and chunk ``[B, H, past + T, D]``, dequantised for this call."""
        layer = self.layer
        if layer.context.reads_quantized:
            layer.commit()
        if self.is_committed:
            self._check_newest()
            return layer.dequantized()
        return layer.dequantized_with(self.keys, self.values)

    def _settle_rows(self, mask: Tensor | None) -> bool:
        """Learn from the mask where rows start; whether the stored rows say all that it says."""
        if mask is None:
            return True
        starts = left_padding_of_mask(mask) if mask.dim() == 2 else None
        if starts is None or mask.shape[1] != self.past_tokens + self.tokens:
            return False
        stored = self.layer.left_padding
        past = self.past_tokens
        fits = all(min(a, past) == min(b, past) for a, b in zip(starts, stored, strict=True))
        if fits and not self.is_committed:
            self.layer.left_padding = starts
        return fits

    def _is_fusable(self, query: Tensor, call: AttentionCall) -> bool:
        """Whether the codes can answer; if not, the past is dequantised for this call."""
        if call.codes_problem(query):
            return False
        problem = self.layer.store.attention_problem()
        if problem:
            _warn_of_dequantising(problem)
        return not problem

    def _attend_packed(self, query: Tensor, call: AttentionCall) -> Tensor:
        layer = self.layer
        if layer.context.reads_quantized:
            layer.commit()
        store = layer.store
        options = call.store_options()
        is_stored_dtype = query.dtype == store.dtype
        stored_query = query if is_stored_dtype else query.to(store.dtype)
        if self.is_committed:
            self._check_newest()
            out = heads_last(store.attend(stored_query, **options)[0])
        else:
            counts = tokens_after(layer.left_padding, self.past_tokens, self.tokens)
            chunk = (stored_query, self.keys, self.values)
            if layer.is_read_again:  # by another layer's call: the keys stay as they are until then
                out = heads_last(store.attend(*chunk, new_tokens=counts, **options)[0])
            else:
                out = store.attend_append(*chunk, new_tokens=counts, **options)
                layer.mark_committed(self)
        return out if is_stored_dtype else out.to(query.dtype)

    def _check_newest(self) -> None:
        if self.layer.committed_tokens != self.past_tokens + self.tokens:
            raise RuntimeError(
                f"layer {self.layer.layer_idx}: attention asks for the keys of an earlier step, "
                "which the cache has encoded since"
            )
