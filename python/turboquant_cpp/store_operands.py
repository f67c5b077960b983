"""The tensors that a store takes: what fits it, and messages that name what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant_cpp._core import LayerSpec
from turboquant_cpp.store_checks import check_has_heads, check_is_tensor, checked_integers

__all__ = ["Operands"]


@dataclass(frozen=True)
class Operands:
    """What a store's tensors have in common.

    Parameters
    ----------
    spec : LayerSpec
        Heads and width.
    dtype, device
        As in `LayerStore`.
    """

    spec: LayerSpec
    dtype: torch.dtype
    device: torch.device

    def fit(self, batch_size: int, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether a chunk can be appended as it is."""
        shape = key_states.shape
        return (
            len(shape) == 4
            and shape[0] == batch_size
            and shape[1] == self.spec.num_kv_heads
            and shape[2] > 0
            and shape[3] == self.spec.head_dim
            and value_states.shape == shape
            and key_states.dtype is self.dtype
            and value_states.dtype is self.dtype
            and key_states.device == self.device
            and value_states.device == self.device
            and key_states.layout is torch.strided
            and value_states.layout is torch.strided
        )

    def check(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """Refuse a tensor of another kind or shape."""
        check_is_tensor(name, tensor)
        if tensor.dtype != self.dtype:
            raise ValueError(f"{name}: expected dtype {self.dtype}, got {tensor.dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{name}: expected device {self.device}, got {tensor.device}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")

    def check_buffer(self, name: str, out: Tensor, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that cannot be written to."""
        self.check(name, out, shape)
        if any(n > 1 and s == 0 for n, s in zip(shape, out.stride(), strict=True)):
            raise ValueError(
                f"{name}: expected memory of its own for every element, got an expanded "
                f"tensor with strides {out.stride()}"
            )

    def check_query(self, batch_size: int, query: Tensor) -> None:
        """A query fits when its heads are a multiple of the store's."""
        check_is_tensor("query", query)
        shape = query.shape
        if (
            len(shape) != 4
            or (shape[0], shape[3]) != (batch_size, self.spec.head_dim)
            or shape[1] % self.spec.num_kv_heads
            or shape[1] * shape[2] == 0
        ):
            expected = f"[{batch_size}, n * {self.spec.num_kv_heads}, q, {self.spec.head_dim}]"
            raise ValueError(f"query: expected shape {expected}, got {tuple(shape)}")
        self.check("query", query, shape)

    def chunk_counts(
        self,
        batch_size: int,
        key_states: Tensor,
        value_states: Tensor,
        new_tokens: Sequence[int] | None,
        query: Tensor | None = None,
    ) -> list[int]:
        """Real tokens of each row of a chunk that fits, and that is as long as the query."""
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            check_is_tensor(name, states)
            check_has_heads(name, states)
        tokens = key_states.shape[2]
        if not self.fit(batch_size, key_states, value_states):
            shape = (batch_size, self.spec.num_kv_heads, tokens, self.spec.head_dim)
            self.check("key_states", key_states, shape)
            self.check("value_states", value_states, shape)
            raise ValueError("key_states: expected at least one token, got a chunk of length 0")
        counts = [tokens] * batch_size
        if new_tokens is not None:
            counts = checked_integers("new_tokens", new_tokens)
        if len(counts) != batch_size:
            raise ValueError(f"new_tokens: expected {batch_size} counts, got {len(counts)}")
        for row, count in enumerate(counts):
            if not 0 <= count <= tokens:
                raise ValueError(f"new_tokens[{row}]: expected 0 to {tokens}, got {count}")
        if query is not None and tokens != query.shape[2]:
            raise ValueError(
                f"key_states: expected {query.shape[2]} tokens like the query, got {tokens}"
            )
        return counts

    def sinks(self, sink_logits: Tensor) -> Tensor:
        """Sink logits as the operators take them."""
        return sink_logits.to(self.device, torch.float32).contiguous()

    def checked_sinks(self, sink_logits: Tensor | None, query: Tensor) -> Tensor | None:
        """`sinks`, one for each head of the query."""
        if sink_logits is None:
            return None
        check_is_tensor("sink_logits", sink_logits)
        if tuple(sink_logits.shape) != (query.shape[1],):
            raise ValueError(
                f"sink_logits: expected shape ({query.shape[1]},), got {tuple(sink_logits.shape)}"
            )
        return self.sinks(sink_logits)
