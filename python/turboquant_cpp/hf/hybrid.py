"""Layers that have a linear-attention state beside full attention (Falcon-H1 and its kin)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from turboquant_cpp.hf.context import CacheContext
from turboquant_cpp.hf.layer import CompressedLayer

__all__ = ["CompressedHybridLayer"]


class CompressedHybridLayer(LinearAttentionAndFullAttentionLayer):
    """A stock linear-attention state and a `CompressedLayer` for the keys and values."""

    def __init__(self, context: CacheContext, layer_idx: int, number_of_states: int = 1) -> None:
        self.attention = CompressedLayer(context, layer_idx)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    @property
    def keys(self) -> Tensor | None:
        """A dequantised copy of the keys; see `CompressedLayer.keys`."""
        return self.attention.keys

    @property
    def values(self) -> Tensor | None:
        """A dequantised copy of the values; see `CompressedLayer.values`."""
        return self.attention.values

    @property
    def is_initialized(self) -> bool:
        """Whether the attention half has seen tokens."""
        return self.attention.is_initialized

    @property
    def batch_size(self) -> int:
        """Rows of the attention half; see `CompressedLayer.batch_size`."""
        return self.attention.batch_size

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Keys and values (positional) go to the attention half, states (named) to the other."""
        if args:
            self.attention.lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `CompressedLayer.update`."""
        return self.attention.update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `CompressedLayer.get_mask_sizes`."""
        return self.attention.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """See `CompressedLayer.get_seq_length`."""
        return self.attention.get_seq_length()

    def get_max_length(self) -> int:
        """-1: the layer grows without a bound."""
        return -1

    def reset(self) -> None:
        """Reset both halves."""
        LinearAttentionLayer.reset(self)
        self.attention.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Crop both halves."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        self.attention.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of both halves."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.attention.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the rows of the attention half (the stock state cannot repeat its own)."""
        self.attention.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows of the attention half (the stock state cannot select its own)."""
        self.attention.batch_select_indices(indices)

    def offload(self) -> None:
        """Move both halves to the host."""
        LinearAttentionLayer.offload(self)
        self.attention.offload()

    def prefetch(self) -> None:
        """Move both halves back."""
        LinearAttentionLayer.prefetch(self)
        self.attention.prefetch()
