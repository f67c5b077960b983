"""One layer's compressed keys and values in torch tensors, without transformers.

What a store holds for ``B`` rows (sequences) of ``H`` key/value heads of ``D`` channels:

- packed pages in *slabs* (uint8 ``[pages_per_slab, page_bytes]``) that never move or grow;
- two dense buffers ``[B, H, S + R, D]`` in the model's dtype with the S sink tokens and the ring of
  recent tokens (R = window + 64);
- the key smoothing, float32 ``[B, H, D]``;
- a `PageTable`, host bookkeeping only: which row's tokens are in which page.

Every change is made in two phases: a plan, the storage it needs and the operator come first, the
commit last. Whatever fails in between leaves the store as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from turboquant_cpp import ops
from turboquant_cpp._core import (
    AppendPlan,
    BlockLayout,
    LayerSpec,
    PageTable,
    cuda_attention_problem,
    unpack_rows,
)
from turboquant_cpp.spec import as_integer
from turboquant_cpp.store_checks import (
    check_is_tensor,
    check_numbers,
    checked_device,
    checked_integers,
    tensor_kind,
)
from turboquant_cpp.store_parts import (
    DenseBuffers,
    most_significant_first,
    page_of,
    pages_for_slab,
    storage_bytes,
    without_grad,
)
from turboquant_cpp.store_state import STORE_DTYPES, StoreState

__all__ = ["LayerStore"]

_DTYPES: Final = tuple(STORE_DTYPES.values())
_JOB_COLUMNS: Final = 6


class LayerStore:
    """Packed storage of one attention layer, with attention straight from the codes.

    Parameters
    ----------
    spec : LayerSpec
        What the layer's bytes mean; `CacheConfig.layer_spec` makes one.
    batch_size : int
        Rows; every row has its own length.
    dtype : torch.dtype
        The model's dtype: float32, float16 or bfloat16.
    device : torch.device or str
        Where the storage lives: "cpu", or "cuda" where the package was built with CUDA kernels.

    Raises
    ------
    ValueError
        When an argument is out of range or the dtype or device is not supported.

    Examples
    --------
    >>> import torch
    >>> from turboquant_cpp import CacheConfig, LayerStore
    >>> spec = CacheConfig(bits=4).layer_spec(0, head_dim=64, num_kv_heads=2)
    >>> store = LayerStore(spec, batch_size=1, dtype=torch.float32, device="cpu")
    >>> keys, values = torch.randn(2, 1, 2, 300, 64)
    >>> store.append(keys, values)
    >>> store.lengths, store.encoded_tokens
    ([300], [192])
    >>> out, lse = store.attend(torch.randn(1, 8, 1, 64), scaling=64**-0.5)
    >>> out.shape, lse.shape
    (torch.Size([1, 8, 1, 64]), torch.Size([1, 8, 1]))
    >>> store.crop(100)
    >>> store.lengths
    [100]
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if not isinstance(spec, LayerSpec):
            raise TypeError(
                "spec: expected a LayerSpec (CacheConfig.layer_spec makes one), got "
                f"{type(spec).__name__}"
            )
        batch_size = as_integer("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if dtype not in _DTYPES:
            raise ValueError(
                f"dtype: expected {', '.join(map(str, _DTYPES))}, got {dtype} "
                "(convert keys and values first)"
            )
        device = checked_device(device, spec)
        self._spec = spec
        self._spec_ints = list(spec.to_ints())
        self._layout = BlockLayout(spec)
        self._page_bytes = self._layout.page_bytes(spec.num_kv_heads)
        self._dtype = dtype
        self._device = device
        self._table = PageTable(spec, batch_size)
        self._slabs: list[Tensor] = []
        self._pages_per_slab = 0
        self._dense: DenseBuffers | None = None
        self._page_table: Tensor | None = None
        self._row_table: tuple[list[int], Tensor] | None = None
        self._no_jobs = torch.empty((0, _JOB_COLUMNS), dtype=torch.int32, device=device)
        self._checked_step: tuple[Any, ...] | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._spec!r}, batch_size={self.batch_size}, "
            f"dtype={self._dtype}, device={str(self._device)!r}, lengths={self.lengths})"
        )

    @property
    def spec(self) -> LayerSpec:
        """What the layer's bytes mean."""
        return self._spec

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the keys and values taken and given back."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the storage lives."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self._table.batch_size

    @property
    def lengths(self) -> list[int]:
        """Committed real tokens of each row."""
        return list(self._table.lengths)

    @property
    def max_length(self) -> int:
        """Length of the longest row."""
        return max(self.lengths)

    @property
    def encoded_tokens(self) -> list[int]:
        """Tokens of each row that are in pages (the rest is exact: sinks and window)."""
        return [sum(tokens for _, tokens in entries) for entries in self._entries()]

    @property
    def smoothing(self) -> Tensor | None:
        """A copy of what key channels are divided by, ``[B, H, D]``; None before the first token.

        Ones in rows that have no page yet, and everywhere without `smooth_keys`.
        """
        return None if self._dense is None else self._dense.smoothing.clone()

    @property
    def saturated_scales(self) -> int:
        """Scales that were out of float16's range and were stored as its largest value."""
        return 0 if self._dense is None else int(self._dense.counters[0])

    @property
    def non_finite_tokens(self) -> int:
        """Encoded vectors that held NaN or infinity (each poisons itself alone)."""
        return 0 if self._dense is None else int(self._dense.counters[1])

    def takes(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether a chunk has the shape, dtype and device that `append` and `attend` expect.

        Quick to ask: what does not fit is worth a closer look, for an error that names it.
        """
        shape = key_states.shape
        return (
            len(shape) == 4
            and shape[0] == self.batch_size
            and shape[1] == self._spec.num_kv_heads
            and shape[2] > 0
            and shape[3] == self._spec.head_dim
            and value_states.shape == shape
            and key_states.dtype is self._dtype
            and value_states.dtype is self._dtype
            and key_states.device == self._device
            and value_states.device == self._device
            and key_states.layout is torch.strided
            and value_states.layout is torch.strided
        )

    @without_grad
    def append(
        self, key_states: Tensor, value_states: Tensor, new_tokens: Sequence[int] | None = None
    ) -> None:
        """Commit a chunk: encode what leaves the exact window, keep the rest exact.

        Parameters
        ----------
        key_states, value_states : Tensor
            ``[B, H, T, D]`` in the store's dtype, any strides.
        new_tokens : sequence of int, optional
            Real tokens of each row, its last ones of the T (left padding is not stored).
            All T when not given.

        Raises
        ------
        ValueError
            When shape, dtype, device or `new_tokens` do not fit; the store is as it was. So it is
            when storage cannot be allocated (then torch's own error is raised).
        """
        counts = self._check_chunk(key_states, value_states, new_tokens)
        if not any(counts):
            return
        growth = self._prepare_append(counts)
        self._run_encode_append(
            key_states, value_states, growth.dense, growth.slabs, self._rows(counts), growth.jobs
        )
        self._commit_append(growth)

    def _prepare_append(self, counts: list[int]) -> _Growth:
        """All that an append needs and that can fail; the store is as it was."""
        plan = self._table.plan_append(counts)
        dense = self._dense or self._new_dense()
        if not plan.moves_tokens:
            self._table.prepare(plan)
            return _Growth(plan, dense, self._slabs, self._pages_per_slab, self._no_jobs)
        slabs, pages_per_slab = self._grown_slabs(plan)
        for from_page, to_page in plan.copies.tolist():
            page_of(slabs, pages_per_slab, to_page).copy_(page_of(slabs, pages_per_slab, from_page))
        self._table.prepare(plan)
        return _Growth(plan, dense, slabs, pages_per_slab, self._upload(plan.jobs))

    def _commit_append(self, growth: _Growth) -> None:
        self._table.commit(growth.plan)
        self._dense = growth.dense
        self._slabs, self._pages_per_slab = growth.slabs, growth.pages_per_slab
        self._row_table = None
        if growth.plan.moves_tokens:
            self._page_table = None

    def attention_problem(self) -> str:
        """Why `attend` does not answer from the codes; "" when it does.

        On the CPU it always does. On CUDA devices it depends on head_dim, the widths and the
        device. What cannot be attended can be dequantised.
        """
        if self._device.type != "cuda":
            return ""
        return cuda_attention_problem(self._spec, _capability_major(self._device))

    @without_grad
    def attend(
        self,
        query: Tensor,
        key_states: Tensor | None = None,
        value_states: Tensor | None = None,
        *,
        new_tokens: Sequence[int] | None = None,
        scaling: float,
        softcap: float = 0.0,
        sliding_window: int = 0,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of `query` over what is committed and a chunk that is not yet.

        Nothing is stored and the result carries no gradient.

        Parameters
        ----------
        query : Tensor
            ``[B, Hq, q, D]``, Hq a multiple of H. Its last position is the last token of the
            chunk, or the last committed token when no chunk is given.
        key_states, value_states : Tensor, optional
            The exact chunk ``[B, H, q, D]``; `append` it afterwards.
        new_tokens : sequence of int, optional
            Real tokens of each row in the chunk (its last ones).
        scaling : float
            Softmax scale.
        softcap : float
            ``softcap * tanh(score / softcap)`` when above 0.
        sliding_window : int
            How many positions back a query sees, itself included; 0: all.
        sink_logits : Tensor, optional
            Learned sink logit of each query head, ``[Hq]``.

        Returns
        -------
        out : Tensor
            ``[B, Hq, q, D]`` in the query's dtype. Padding queries get 0.
        lse : Tensor
            Natural log-sum-exp, float32 ``[B, Hq, q]``; -inf for padding queries.

        Raises
        ------
        ValueError
            When an argument does not fit or there is an `attention_problem`; the message names it.
        """
        sinks = self._check_call(query, scaling, softcap, sliding_window, sink_logits)
        if (key_states is None) != (value_states is None):
            raise ValueError("key_states, value_states: expected both or neither")
        if key_states is None or value_states is None:
            if new_tokens is not None:
                raise ValueError(
                    f"new_tokens: expected None without a chunk, got {list(new_tokens)}"
                )
            counts = [0] * self.batch_size
            key_states = value_states = query.new_empty(
                (self.batch_size, self._spec.num_kv_heads, 0, self._spec.head_dim)
            )
        else:
            counts = self._check_chunk_of(query, key_states, value_states, new_tokens)
        return self._run_decode_attention(
            query,
            key_states,
            value_states,
            self._rows(counts),
            sinks,
            scaling=scaling,
            softcap=softcap,
            sliding_window=sliding_window,
        )

    def _run_encode_append(
        self,
        key_states: Tensor,
        value_states: Tensor,
        dense: DenseBuffers,
        slabs: list[Tensor],
        rows: Tensor,
        jobs: Tensor,
    ) -> None:
        ops.encode_append(
            key_states,
            value_states,
            dense.keys,
            dense.values,
            dense.smoothing,
            slabs,
            dense.counters,
            rows,
            jobs,
            self._spec_ints,
        )

    def _run_decode_attention(
        self,
        query: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        rows: Tensor,
        sinks: Tensor | None,
        **numbers: Any,
    ) -> tuple[Tensor, Tensor]:
        dense = self._dense or self._new_dense()
        return ops.decode_attention(
            query,
            key_states,
            value_states,
            dense.keys,
            dense.values,
            dense.smoothing,
            self._slabs,
            self._tables(),
            rows,
            sinks,
            self._spec_ints,
            **numbers,
        )

    @without_grad
    def attend_append(
        self,
        query: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        *,
        new_tokens: Sequence[int] | None = None,
        scaling: float,
        softcap: float = 0.0,
        sliding_window: int = 0,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """`attend` to what is committed and a chunk, then `append` the chunk: a decode step.

        One operator call instead of two, which counts where a step is short.

        Returns
        -------
        Tensor
            The output of `attend`, as models go on with it: ``[B, q, Hq, D]``.

        Raises
        ------
        ValueError
            When an argument does not fit or there is an `attention_problem`; the store is as it
            was. So it is when storage cannot be allocated (then torch's own error is raised).
        """
        # A step repeats the one before but for what is in its tensors: such a call is checked once.
        step = (
            *tensor_kind(query),
            *tensor_kind(key_states),
            *tensor_kind(value_states),
            list(new_tokens) if type(new_tokens) is list else new_tokens,
            scaling,
            softcap,
            sliding_window,
            self.batch_size,
        )
        if sink_logits is None and type(new_tokens) is list and step == self._checked_step:
            sinks, counts = None, new_tokens
        else:
            sinks = self._check_call(query, scaling, softcap, sliding_window, sink_logits)
            counts = self._check_chunk_of(query, key_states, value_states, new_tokens)
            self._checked_step = step
        page_table = self._tables()
        growth = self._prepare_append(counts)
        dense = growth.dense
        out = ops.attend_append(
            query,
            key_states,
            value_states,
            dense.keys,
            dense.values,
            dense.smoothing,
            growth.slabs,
            dense.counters,
            page_table,
            self._rows(counts),
            growth.jobs,
            sinks,
            self._spec_ints,
            scaling,
            softcap,
            sliding_window,
        )
        self._commit_append(growth)
        return out

    @without_grad
    def dequantize(
        self,
        past_tokens: int | None = None,
        out_keys: Tensor | None = None,
        out_values: Tensor | None = None,
        *,
        positions: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Committed tokens as dense keys and values ``[B, H, n, D]``.

        Parameters
        ----------
        past_tokens : int, optional
            Positions there are, at least the longest row (the default). Rows end at the last
            position; what is before a shorter row is 0.
        out_keys, out_values : Tensor, optional
            Buffers to write to and return, any strides (a part of a larger buffer, say).
        positions : (int, int), optional
            First and one past the last of the n positions wanted; all `past_tokens` by default.

        Raises
        ------
        ValueError
            When `past_tokens` is too small, `positions` are not among them or a buffer does not
            fit.
        """
        past = self.max_length if past_tokens is None else as_integer("past_tokens", past_tokens)
        if past < self.max_length:
            raise ValueError(
                f"past_tokens: expected at least {self.max_length} (the longest row), got {past}"
            )
        first, end = (0, past) if positions is None else positions
        if not 0 <= first <= end <= past:
            raise ValueError(
                f"positions: expected a range within 0 to {past}, got {first} to {end}"
            )
        shape = (self.batch_size, self._spec.num_kv_heads, end - first, self._spec.head_dim)
        for name, out in (("out_keys", out_keys), ("out_values", out_values)):
            if out is not None:
                self._check_tensor(name, out, shape)
                if any(n > 1 and s == 0 for n, s in zip(shape, out.stride(), strict=True)):
                    raise ValueError(
                        f"{name}: expected memory of its own for every element, got an expanded "
                        f"tensor with strides {out.stride()}"
                    )
        keys, values = (
            torch.empty(shape, dtype=self._dtype, device=self._device) if out is None else out
            for out in (out_keys, out_values)
        )
        dense = self._dense or self._new_dense()
        ops.dequantize(
            dense.keys,
            dense.values,
            dense.smoothing,
            self._slabs,
            self._tables(),
            self._rows([0] * self.batch_size),
            keys,
            values,
            self._spec_ints,
            past_tokens=past,
            first_position=first,
        )
        return keys, values

    def crop(self, new_lengths: int | Sequence[int]) -> None:
        """Forget the newest tokens: each row keeps its first ``new_lengths`` tokens.

        Parameters
        ----------
        new_lengths : int or sequence of int
            One length for every row (rows that are shorter stay as they are), or one per row.

        Raises
        ------
        ValueError
            When a length is negative or, given per row, above the row's length.
        """
        lengths = self.lengths
        if isinstance(new_lengths, (int, np.integer)):
            new_lengths = int(new_lengths)
            if new_lengths < 0:
                raise ValueError(f"new_lengths: expected at least 0, got {new_lengths}")
            wanted = [min(new_lengths, length) for length in lengths]
        else:
            wanted = checked_integers("new_lengths", new_lengths)
            if len(wanted) != self.batch_size:
                raise ValueError(
                    f"new_lengths: expected {self.batch_size} lengths, got {len(wanted)}"
                )
            for row, (new, old) in enumerate(zip(wanted, lengths, strict=True)):
                if not 0 <= new <= old:
                    raise ValueError(f"new_lengths[{row}]: expected 0 to {old}, got {new}")
        self._crop(wanted)

    def _crop(self, lengths: list[int]) -> None:
        for row, (new, old) in enumerate(zip(lengths, self.lengths, strict=True)):
            if new != old:
                self._table.crop(row, new)
        self._page_table = self._row_table = None
        self._drop_unused_slabs()

    def select(self, indices: Iterable[int] | Tensor) -> None:
        """Keep, reorder or repeat rows: row i becomes what row ``indices[i]`` was.

        Rows that stem from one row share its pages; only the dense buffers are copied.

        Raises
        ------
        ValueError
            When `indices` is empty or names a row that does not exist.
        """
        rows = checked_integers("indices", indices)
        if not rows:
            raise ValueError("indices: expected at least one row, got none")
        for i, row in enumerate(rows):
            if not 0 <= row < self.batch_size:
                raise ValueError(
                    f"indices[{i}]: expected a row of 0 to {self.batch_size - 1}, got {row}"
                )
        self._select(rows)

    def _select(self, rows: list[int]) -> None:
        dense = self._dense
        if dense is not None:
            dense = dense.select(torch.tensor(rows, device=self._device))
        self._table.select(rows)
        self._dense, self._page_table, self._row_table = dense, None, None
        self._drop_unused_slabs()

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side; they share their pages.

        Raises
        ------
        ValueError
            When `repeats` is below 1.
        """
        repeats = as_integer("repeats", repeats)
        if repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {repeats}")
        self.select(row for row in range(self.batch_size) for _ in range(repeats))

    def reset(self) -> None:
        """Forget everything and release the storage."""
        self._table.reset()
        self._slabs, self._pages_per_slab = [], 0
        self._dense = self._page_table = self._row_table = None

    def to(self, device: torch.device | str) -> LayerStore:
        """Move the storage to `device`, in place; returns the store."""
        target = checked_device(device, self._spec)
        slabs = [slab.to(target) for slab in self._slabs]
        dense = None if self._dense is None else self._dense.to(target)
        no_jobs = self._no_jobs.to(target)
        self._slabs, self._dense, self._no_jobs, self._device = slabs, dense, no_jobs, target
        self._checked_step = None
        self._page_table = self._row_table = None
        return self

    def clone(self) -> LayerStore:
        """Return an independent copy."""
        other = LayerStore(
            self._spec, batch_size=self.batch_size, dtype=self._dtype, device=self._device
        )
        other._table = self._table.clone()
        other._slabs = [slab.clone() for slab in self._slabs]
        other._pages_per_slab = self._pages_per_slab
        other._dense = None if self._dense is None else self._dense.clone()
        return other

    def export_state(self) -> StoreState:
        """Copy what is in use to the host: what a file needs to hold.

        Pages are numbered anew, each is there once; slots and smoothing that are not in use read 0
        and 1.
        """
        dense = self._dense or self._new_dense()
        table = self._host_table()
        rows, page_table = table.rows(), table.page_table()
        is_used = np.arange(page_table.shape[1]) < rows[:, 1:2]
        used, page_table[is_used, 0] = np.unique(page_table[is_used, 0], return_inverse=True)
        pages = torch.empty((len(used), self._page_bytes), dtype=torch.uint8)
        end = 0
        for number, slab in enumerate(self._slabs):
            inside = used[used // self._pages_per_slab == number] % self._pages_per_slab
            begin, end = end, end + len(inside)
            pages[begin:end] = slab[torch.from_numpy(inside).to(self._device)]
        is_dead = ~torch.from_numpy(table.live_slots())[:, None, :, None]
        is_unfitted = torch.from_numpy(rows[:, 1] == 0)[:, None, None]
        return StoreState(
            spec=self._spec,
            table=PageTable.from_exports(self._spec, rows, page_table, len(used)),
            pages=pages,
            exact_keys=dense.keys.cpu().masked_fill(is_dead, 0),
            exact_values=dense.values.cpu().masked_fill(is_dead, 0),
            smoothing=dense.smoothing.cpu().masked_fill(is_unfitted, 1),
            saturated_scales=self.saturated_scales,
            non_finite_tokens=self.non_finite_tokens,
        )

    def _host_table(self) -> PageTable:
        """Whose tokens are in which page."""
        return self._table

    @classmethod
    def from_state(cls, state: StoreState, device: torch.device | str) -> LayerStore:
        """Make a store that holds what `state` does, in memory of its own.

        Raises
        ------
        ValueError
            When the device is not supported.
        """
        batch, dtype = state.table.batch_size, state.exact_keys.dtype
        store = cls(state.spec, batch_size=batch, dtype=dtype, device=device)
        store._table = state.table.clone()
        pages = len(state.pages)
        if pages:
            # No more than is needed: a file of few pages does not decide what many rows hold.
            per_slab = min(pages_for_slab(batch, pages), 1 << (pages.bit_length() - 1))
            store._pages_per_slab = per_slab
            for first in range(0, pages, per_slab):
                part = state.pages[first : first + per_slab]
                store._slabs.append(store._new_slab(per_slab))
                store._slabs[-1][: len(part)] = part
        store._dense = DenseBuffers(
            state.exact_keys.to(store._device, copy=True),
            state.exact_values.to(store._device, copy=True),
            state.smoothing.to(store._device, copy=True),
            state.counters.to(store._device),
        )
        return store

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerStore:
        return self.clone()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a LayerStore cannot be pickled: save the cache to a file instead")

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by part, measured from the storages.

        Returns
        -------
        dict
            ``pages`` (all slabs), ``exact`` (sinks and window), ``smoothing`` and ``tables``.
        """
        dense = self._dense
        tables = [] if self._page_table is None else [self._page_table]
        if self._row_table is not None:
            tables.append(self._row_table[1])
        if dense is None:
            exact, smoothing = [], []
        else:
            exact, smoothing = [dense.keys, dense.values], [dense.smoothing]
            tables.append(dense.counters)
        return {
            "pages": storage_bytes(self._slabs),
            "exact": storage_bytes(exact),
            "smoothing": storage_bytes(smoothing),
            "tables": storage_bytes(tables),
        }

    def codes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Copies of the encoded tokens' codes and scales in a plain, documented order.

        Only tokens in pages are returned: those of the sinks and the window are still exact and
        have no codes. With ``recipe="plain"`` every token has.

        Returns
        -------
        k_codes, k_scales, v_codes, v_scales : Tensor
            Codes are uint8 ``[B, H, S, D * bits / 8]``, the most significant bit first (4 bits:
            high nibble first); scales float32 ``[B, H, S, 1]``. S is the most encoded tokens of
            any row; rows end at the last position, zeros before.
        """
        k_codes, k_scales = self._codes_of("k", self._spec.k_bits)
        v_codes, v_scales = self._codes_of("v", self._spec.v_bits)
        return k_codes, k_scales, v_codes, v_scales

    def _codes_of(self, kind: str, bits: int) -> tuple[Tensor, Tensor]:
        heads, dim = self._spec.num_kv_heads, self._spec.head_dim
        encoded = self.encoded_tokens
        most = max(encoded)
        codes = np.zeros((self.batch_size, heads, most, dim * bits // 8), np.uint8)
        scales = np.zeros((self.batch_size, heads, most, 1), np.float32)
        for row, entries in enumerate(self._entries()):
            at = most - encoded[row]
            for page, tokens in entries:
                block = page_of(self._slabs, self._pages_per_slab, page).cpu().numpy()
                block = block.reshape(heads, self._layout.block_bytes)
                packed, scale = self._layout.rows(block, kind, tokens)
                here = slice(at, at + tokens)
                codes[row, :, here] = most_significant_first(
                    unpack_rows(packed.reshape(heads * tokens, -1), dim, bits), bits
                ).reshape(heads, tokens, -1)
                scales[row, :, here, 0] = scale
                at += tokens
        return torch.from_numpy(codes).to(self._device), torch.from_numpy(scales).to(self._device)

    def _entries(self) -> list[list[list[int]]]:
        """Page and tokens of every used entry of every row."""
        tables = zip(self._table.page_table().tolist(), self._table.num_entries, strict=True)
        return [entries[:used] for entries, used in tables]

    def _check_call(
        self,
        query: Tensor,
        scaling: float,
        softcap: float,
        sliding_window: int,
        sink_logits: Tensor | None,
    ) -> Tensor | None:
        """The sink logits as the operators take them, after checking an attention call."""
        self._check_query(query)
        problem = self.attention_problem()
        if problem:
            raise ValueError(f"query: {problem}")
        check_numbers(scaling, softcap, sliding_window)
        if sink_logits is None:
            return None
        check_is_tensor("sink_logits", sink_logits)
        if tuple(sink_logits.shape) != (query.shape[1],):
            raise ValueError(
                f"sink_logits: expected shape ({query.shape[1]},), got {tuple(sink_logits.shape)}"
            )
        return self._operator_sinks(sink_logits)

    def _operator_sinks(self, sink_logits: Tensor) -> Tensor:
        return sink_logits.to(self._device, torch.float32).contiguous()

    def _check_query(self, query: Tensor) -> None:
        """A query fits when its heads are a multiple of the store's."""
        check_is_tensor("query", query)
        shape = query.shape
        if (
            len(shape) != 4
            or (shape[0], shape[3]) != (self.batch_size, self._spec.head_dim)
            or shape[1] % self._spec.num_kv_heads
            or shape[1] * shape[2] == 0
        ):
            expected = (
                f"[{self.batch_size}, n * {self._spec.num_kv_heads}, q, {self._spec.head_dim}]"
            )
            raise ValueError(f"query: expected shape {expected}, got {tuple(shape)}")
        self._check_tensor("query", query, shape)

    def _check_chunk_of(
        self,
        query: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        new_tokens: Sequence[int] | None,
    ) -> list[int]:
        counts = self._check_chunk(key_states, value_states, new_tokens)
        if key_states.shape[2] != query.shape[2]:
            raise ValueError(
                f"key_states: expected {query.shape[2]} tokens like the query, got "
                f"{key_states.shape[2]}"
            )
        return counts

    def _check_tensor(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        check_is_tensor(name, tensor)
        if tensor.dtype != self._dtype:
            raise ValueError(f"{name}: expected dtype {self._dtype}, got {tensor.dtype}")
        if tensor.device != self._device:
            raise ValueError(f"{name}: expected device {self._device}, got {tensor.device}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")

    def _check_chunk(
        self, key_states: Tensor, value_states: Tensor, new_tokens: Sequence[int] | None
    ) -> list[int]:
        """Real tokens of each row, after checking that the chunk fits the store."""
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            check_is_tensor(name, states)
        tokens = key_states.shape[2] if key_states.dim() == 4 else 0
        if not self.takes(key_states, value_states):
            shape = (self.batch_size, self._spec.num_kv_heads, tokens, self._spec.head_dim)
            self._check_tensor("key_states", key_states, shape)
            self._check_tensor("value_states", value_states, shape)
            raise ValueError("key_states: expected at least one token, got a chunk of length 0")
        if new_tokens is None:
            return [tokens] * self.batch_size
        counts = checked_integers("new_tokens", new_tokens)
        if len(counts) != self.batch_size:
            raise ValueError(f"new_tokens: expected {self.batch_size} counts, got {len(counts)}")
        for row, count in enumerate(counts):
            if not 0 <= count <= tokens:
                raise ValueError(f"new_tokens[{row}]: expected 0 to {tokens}, got {count}")
        return counts

    def _new_dense(self) -> DenseBuffers:
        shape = (
            self.batch_size,
            self._spec.num_kv_heads,
            self._spec.exact_capacity,
            self._spec.head_dim,
        )
        return DenseBuffers(
            keys=torch.zeros(shape, dtype=self._dtype, device=self._device),
            values=torch.zeros(shape, dtype=self._dtype, device=self._device),
            smoothing=torch.ones(
                (shape[0], shape[1], shape[3]), dtype=torch.float32, device=self._device
            ),
            counters=torch.zeros(2, dtype=torch.int64, device=self._device),
        )

    def _grown_slabs(self, plan: AppendPlan) -> tuple[list[Tensor], int]:
        """The slabs with as many new ones as the plan's pages need, and their size."""
        pages = self._pages_per_slab
        if not self._slabs:
            pages = pages_for_slab(self.batch_size, plan.pages_needed)
        slabs = list(self._slabs)
        while len(slabs) * pages < plan.pages_needed:
            slabs.append(self._new_slab(pages))
        return slabs, pages

    def _new_slab(self, pages: int) -> Tensor:
        return torch.zeros((pages, self._page_bytes), dtype=torch.uint8, device=self._device)

    def _drop_unused_slabs(self) -> None:
        if self._slabs:
            used = -(-self._table.high_water_pages() // self._pages_per_slab)
            del self._slabs[used:]

    def _upload(self, table: np.ndarray[Any, np.dtype[np.int32]]) -> Tensor:
        host = torch.from_numpy(table)
        if self._device.type == "cpu":
            return host
        if self._device.type != "cuda" or host.numel() == 0:
            return host.to(self._device)
        # From pinned memory the copy waits for nothing: a decode step stays ahead of its kernels.
        return host.pin_memory().to(self._device, non_blocking=True)

    def _rows(self, new_tokens: Sequence[int]) -> Tensor:
        """The rows' states on the device, kept until they change: a step's two calls share it."""
        if self._row_table is None or self._row_table[0] != new_tokens:
            self._row_table = list(new_tokens), self._upload(self._table.rows(new_tokens))
        return self._row_table[1]

    def _tables(self) -> Tensor:
        """The page table on the device, kept until it changes."""
        if self._page_table is None:
            self._page_table = self._upload(self._table.page_table())
        return self._page_table


class _Growth(NamedTuple):
    """An append that is ready: the storage after it and the table that its operator takes."""

    plan: AppendPlan
    dense: DenseBuffers
    slabs: list[Tensor]
    pages_per_slab: int
    jobs: Tensor


@functools.lru_cache
def _capability_major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
