"""One full-attention layer of a transformers cache, holding only packed codes."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from turboquant_cpp.hf import compat
from turboquant_cpp.hf.chunk import PendingChunk
from turboquant_cpp.hf.chunk_checks import check_like_stored, check_pair
from turboquant_cpp.hf.context import CacheContext
from turboquant_cpp.hf.dense import AttentionCall
from turboquant_cpp.hf.mirror import DenseMirror
from turboquant_cpp.hf.padding import expanded_rows, tokens_after
from turboquant_cpp.hf.policy import LatestQueries, exact_spec
from turboquant_cpp.layer_store import LayerStore
from turboquant_cpp.spec import LayerSpec
from turboquant_cpp.store_state import StoreState

__all__ = ["CompressedLayer"]


class CompressedLayer(CacheLayerMixin):
    """Keys and values of one layer as a `LayerStore`, behind transformers' layer interface.

    Rows of a left-padded batch are stored without their padding. Positions that the outside sees
    (``get_seq_length``, masks, dense keys) include it: rows end together, at the right.

    Parameters
    ----------
    context : CacheContext
        What all layers of the cache share.
    layer_idx : int
        Index of the layer in the model.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, context: CacheContext, layer_idx: int) -> None:
        super().__init__()
        self.context = context
        self.layer_idx = layer_idx
        self.is_read_again = layer_idx in context.kv_source_layers
        self._given_padding = context.left_padding
        self._forget()

    def _forget(self) -> None:
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self.is_initialized = False
        self._store: LayerStore | None = None
        self.committed_tokens = 0
        self.left_padding: list[int] = []
        self._pending: PendingChunk | None = None
        self._mirror = DenseMirror() if self.context.is_incremental else None
        self.latest_queries: LatestQueries | None = None

    @property
    def store(self) -> LayerStore:
        """The packed storage.

        Raises
        ------
        RuntimeError
            Before the first `update`.
        """
        if self._store is None:
            self._store = self._missing_store()
        return self._store

    def _missing_store(self) -> LayerStore:
        """The storage of a layer that has none yet."""
        raise RuntimeError(f"layer {self.layer_idx} holds nothing yet: no token was added")

    @property
    def batch_size(self) -> int:
        """Rows; no such attribute before the first `update`, as transformers expects it."""
        if not self.is_initialized:
            raise AttributeError("batch_size: the layer holds nothing yet")
        return self.store.batch_size

    @property
    def keys(self) -> Tensor | None:
        """A dequantised copy of the keys ``[B, H, tokens, D]``; None before the first `update`."""
        return self.dense()[0] if self.is_initialized else None

    @keys.setter
    def keys(self, keys: None) -> None:
        self._refuse_dense(keys)

    @property
    def values(self) -> Tensor | None:
        """A dequantised copy of the values; None before the first `update`."""
        return self.dense()[1] if self.is_initialized else None

    @values.setter
    def values(self, values: None) -> None:
        self._refuse_dense(values)

    def _refuse_dense(self, states: None) -> None:
        if states is not None:
            raise AttributeError(
                "keys and values of a compressed layer cannot be assigned: use update()"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create the store for the shape, dtype and device of the first keys and values.

        Raises
        ------
        ValueError
            When keys and values differ in shape or the shape or dtype is not supported.
        """
        check_pair(self.context, key_states, value_states)
        batch_size, num_kv_heads, _, head_dim = key_states.shape
        if head_dim != (self.context.head_dim or head_dim):
            raise ValueError(
                f"key_states: expected head_dim {self.context.head_dim} as given to the cache, got "
                f"{head_dim}"
            )
        spec = self._spec(head_dim, num_kv_heads, key_states.shape[2])
        left_padding = expanded_rows(self._given_padding, batch_size)
        self._store = self.new_store(spec, batch_size, key_states.dtype, key_states.device)
        self.left_padding = left_padding
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _spec(self, head_dim: int, num_kv_heads: int, tokens: int) -> LayerSpec:
        """The spec of a store for `tokens` tokens and more; exact while widths are undecided."""
        config = self.context.config
        if self.context.is_undecided:
            return exact_spec(config, self.layer_idx, head_dim, num_kv_heads, tokens)
        return config.layer_spec(self.layer_idx, head_dim, num_kv_heads)

    def new_store(
        self, spec: LayerSpec, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerStore:
        """Empty storage."""
        return LayerStore(spec, batch_size=batch_size, dtype=dtype, device=device)

    def new_chunk(self, key_states: Tensor, value_states: Tensor) -> PendingChunk:
        """The tokens that attention is to read next."""
        return PendingChunk(self, key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens ``[B, H, T, D]`` and return what attention has to read.

        With the fused attention active that is the chunk itself, carrying a handle to this layer.
        Otherwise it is everything ``[B, H, past + T, D]``: the past dequantised, the chunk as it
        was given (through the codes as well with ``prefill="quantized"``).

        Raises
        ------
        ValueError
            When the chunk does not fit what is stored; the layer is as it was.
        """
        self._check_chunk(key_states, value_states)
        self.commit()
        if self.is_initialized:
            return self._update(key_states, value_states)
        try:
            self.lazy_initialization(key_states, value_states)
            return self._update(key_states, value_states)
        except BaseException:
            self._forget()  # a later first chunk may have another shape
            raise

    def _update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.context.is_undecided:
            self._keep_exact(keys.shape[2])
        if self.context.is_fused:
            chunk = self.new_chunk(keys, values)
            tagged = chunk.tagged_keys()
            self._pending = chunk
            return tagged, values
        return self._update_dense(keys, values)

    def _update_dense(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.context.reads_quantized:
            self.append(keys, values)
            return self._read()
        if self._mirror is not None:
            self._mirror.sync(self.store, self.committed_tokens)
            everything = self._mirror.extend(keys, values)
            self.append(keys, values)
            return everything
        if self.committed_tokens == 0:
            self.append(keys, values)
            return keys, values
        everything = self.dequantized_with(keys, values)
        self.append(keys, values)
        return everything

    def _read(self) -> tuple[Tensor, Tensor]:
        if self._mirror is not None:
            return self._mirror.sync(self.store, self.committed_tokens)
        return self.dequantized()

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Encode and store a chunk, each row's real tokens only."""
        tokens = key_states.shape[2]
        counts = tokens_after(self.left_padding, self.committed_tokens, tokens)
        self.store.append(key_states.detach(), value_states.detach(), counts)
        self.committed_tokens += tokens

    def commit(self) -> None:
        """Store the chunk that attention was to read, if there is one."""
        chunk = self._pending
        if chunk is None:
            return
        self.append(chunk.keys, chunk.values)
        self._release(chunk)
        if chunk.past_tokens > 0 and not chunk.was_read:
            warnings.warn(
                f"layer {self.layer_idx}: the keys that update() returned never reached the "
                'attention function "turboquant", so whatever read them saw the newest tokens '
                "only. Choose another implementation with model.set_attn_implementation().",
                UserWarning,
                stacklevel=3,
            )

    def mark_committed(self, chunk: PendingChunk) -> None:
        """Take note that `LayerStore.attend_append` stored the pending chunk."""
        self.committed_tokens += chunk.tokens
        self._release(chunk)

    def _release(self, chunk: PendingChunk) -> None:
        chunk.is_committed = True
        self._pending = None

    def _keep_exact(self, new_tokens: int) -> None:
        """Make the window wide enough that `new_tokens` more do not push any out of it."""
        spec, tokens = self.store.spec, self.committed_tokens + new_tokens
        if tokens > spec.window_tokens:
            wide = self._spec(spec.head_dim, spec.num_kv_heads, tokens)
            self.replace_store(self.restored(wide))

    def observe(self, query: Tensor, call: AttentionCall) -> None:
        """Take note of queries ``[B, Hq, q, D]`` of the newest positions, for `policy.decide`."""
        end = self.get_host_length()
        self.latest_queries = LatestQueries.after(self.latest_queries, query, call, end)

    def restored(self, spec: LayerSpec) -> LayerStore:
        """New storage for what the layer holds, which is exact, encoded by another spec."""
        keys, values = self.dequantized()
        store = self.new_store(spec, self.batch_size, keys.dtype, keys.device)
        store.append(keys, values, tokens_after(self.left_padding, 0, self.committed_tokens))
        return store

    def replace_store(self, store: LayerStore) -> None:
        """Go on with a store that holds the same tokens."""
        self._store = store
        if self._mirror is not None:
            self._mirror.forget()

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values ``[B, H, committed tokens, D]``, rows ending at the right."""
        return self.store.dequantize(self.committed_tokens)

    def dequantized_with(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`dequantized`, followed by a chunk ``[B, H, T, D]`` that is not stored yet.

        The tokens are written to their place at once: nothing is held twice.
        """
        past = self.committed_tokens
        batch, heads, tokens, dim = keys.shape
        shape = (batch, heads, past + tokens, dim)
        everything = (keys.new_empty(shape), values.new_empty(shape))
        self.store.dequantize(past, *(part[:, :, :past] for part in everything))
        for part, chunk in zip(everything, (keys, values), strict=True):
            part[:, :, past:] = chunk
        return everything

    def dense(self) -> tuple[Tensor, Tensor]:
        """`dequantized` after storing what is pending."""
        self.commit()
        return self.dequantized()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset that a mask for `query_length` new tokens needs."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding and a pending chunk included."""
        return self.get_host_length()

    def get_host_length(self) -> int:
        """Tokens seen, padding and a pending chunk included, on the host."""
        return self.committed_tokens + (0 if self._pending is None else self._pending.tokens)

    def get_max_length(self) -> int:
        """-1: the layer grows without a bound."""
        return -1

    def reset(self) -> None:
        """Forget everything, the padding given for the first prompt too; release the storage."""
        self._forget()
        self._given_padding = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Parameters
        ----------
        tokens_to_remove : int
            Minus the number of tokens to remove. A positive number is the length to keep, as in
            transformers before 5.18.

        Raises
        ------
        TypeError
            When it is no integer; the layer is as it was.
        """
        tokens_to_remove = operator.index(tokens_to_remove)
        if not self.is_initialized:
            return
        kept = self.get_host_length()
        kept -= compat.tokens_to_remove(tokens_to_remove, kept)
        if kept <= self.committed_tokens:
            self._pending = None  # of a step that failed; storing it first could fail again
        self.commit()
        self.latest_queries = None
        self._crop_store([max(kept - start, 0) for start in self.left_padding], kept)
        self.committed_tokens = kept
        if self._mirror is not None:
            self._mirror.crop(self.store, kept)

    def _crop_store(self, lengths: list[int], kept: int) -> None:
        """Crop rows to `lengths` tokens, which with their padding are `kept` positions."""
        self.store.crop(lengths)

    def select(self, indices: Sequence[int]) -> None:
        """Keep, reorder or repeat rows; rows that stem from one row share its pages."""
        if not self.is_initialized:
            return
        self.commit()
        self.store.select(indices)
        if self.latest_queries is not None:
            self.latest_queries = self.latest_queries.select(list(indices))
        self._note_padding([self.left_padding[index] for index in indices])
        if self._mirror is not None:
            self._mirror.forget()

    def _note_padding(self, padding: list[int]) -> None:
        """Take note of the padding of rows that the store has selected."""
        self.left_padding = padding

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies side by side."""
        if repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {repeats}")
        self.select([row for row in range(len(self.left_padding)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` names (row numbers or a boolean mask)."""
        if indices.dtype == torch.bool:
            if self.is_initialized and indices.shape != (self.batch_size,):
                raise ValueError(
                    f"indices: expected a mask of {self.batch_size} rows, got shape "
                    f"{tuple(indices.shape)}"
                )
            indices = indices.nonzero().flatten()
        self.select(indices.tolist())

    def offload(self) -> None:
        """Move the storage to the host."""
        if self.is_initialized:
            self.commit()
            self.store.to("cpu")
            if self._mirror is not None:
                self._mirror.forget()

    def prefetch(self) -> None:
        """Move the storage back to the layer's device."""
        if self.device is not None and self.store.device != self.device:
            self.store.to(self.device)

    def nbytes(self) -> dict[str, int]:
        """Bytes held by part, measured from the storages; see `LayerStore.nbytes`."""
        if not self.is_initialized:
            return {"pages": 0, "exact": 0, "smoothing": 0, "tables": 0}
        self.commit()
        parts = self.store.nbytes()
        if self._mirror is not None:
            parts["dense_copy"] = self._mirror.nbytes()
        return parts

    def adopt(
        self,
        store: LayerStore,
        committed_tokens: int,
        left_padding: Sequence[int],
        device: torch.device | None,
    ) -> None:
        """Go on with tokens that another layer stored.

        `device` is where the layer computes (an offloaded store is elsewhere).
        """
        self._store = store
        self.committed_tokens = committed_tokens
        self.left_padding = list(left_padding)
        self.dtype, self.device = store.dtype, device
        self.is_initialized = True

    def export_state(self) -> StoreState:
        """What a file is to hold; a chunk that attention was to read is stored first."""
        self.commit()
        return self.store.export_state()

    def hold(
        self,
        state: StoreState,
        committed_tokens: int,
        left_padding: Sequence[int],
        device: torch.device,
    ) -> None:
        """`adopt` what a file holds, on a device; nothing of the state is kept."""
        store = LayerStore.from_state(state, device)
        self.adopt(store, committed_tokens, left_padding, store.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedLayer:
        self.commit()
        twin = type(self)(self.context, self.layer_idx)
        twin._given_padding = self._given_padding
        if self.is_initialized:
            store = self.store.clone()
            twin.adopt(store, self.committed_tokens, self.left_padding, self.device)
            twin.latest_queries = self.latest_queries
        return twin

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a compressed cache cannot be pickled: write it to a file with save() and load(). "
            "copy.deepcopy works."
        )

    def _check_chunk(self, keys: Tensor, values: Tensor) -> None:
        is_pair = isinstance(keys, Tensor) and isinstance(values, Tensor)
        if is_pair and self.is_initialized and self.store.takes(keys, values):
            return
        check_pair(self.context, keys, values)
        if keys.shape[2] == 0:
            raise ValueError("key_states: expected at least one token, got a chunk of length 0")
        if self.is_initialized:
            check_like_stored(self.layer_idx, self.store, keys)
