"""A `LayerStore` of fixed capacity, whose bookkeeping lives where its storage does.

All pages are there from the start, every row owns its own, and the tables that say what is in them
are tensors which the operators read and change in place. A step is therefore the same sequence of
operators on the same tensors however many tokens there are: ``torch.compile`` traces it once and a
CUDA graph can replay it. `plan` and `attend_append_planned` are that step; what needs the host
(`crop`, `select`, `dequantize`, lengths) reads the tables back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from turboquant_cpp import ops
from turboquant_cpp._core import LayerSpec, PageTable, crop_tables, entries_of_full_rows
from turboquant_cpp.layer_store import LayerStore
from turboquant_cpp.spec import as_integer
from turboquant_cpp.store_checks import checked_device, checked_lengths
from turboquant_cpp.store_parts import DenseBuffers, without_grad
from turboquant_cpp.store_state import StoreState

__all__ = ["FixedPlan", "FixedStore"]

_Result = TypeVar("_Result")


@contextlib.contextmanager
def _undone_if_it_fails(*tensors: Tensor) -> Iterator[None]:
    """Give tensors that are changed in place back what they held, should it fail halfway."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, held in zip(tensors, before, strict=True):
            tensor.copy_(held)
        raise


class FixedPlan(NamedTuple):
    """What one append will do: tables that `FixedStore.plan` made."""

    rows: Tensor
    jobs: Tensor


class FixedStore(LayerStore):
    """Packed storage of one attention layer for at most `max_tokens` tokens a row.

    Parameters
    ----------
    spec, batch_size, dtype, device
        As in `LayerStore`.
    max_tokens : int
        Tokens that a row can hold.

    Raises
    ------
    ValueError
        When an argument is out of range or the dtype or device is not supported.

    Examples
    --------
    >>> import torch
    >>> from turboquant_cpp import CacheConfig, FixedStore
    >>> spec = CacheConfig(bits=4).layer_spec(0, head_dim=64, num_kv_heads=2)
    >>> store = FixedStore(spec, batch_size=1, max_tokens=500, dtype=torch.float32, device="cpu")
    >>> keys, values = torch.randn(2, 1, 2, 300, 64)
    >>> store.append(keys, values)
    >>> store.lengths, store.encoded_tokens
    ([300], [192])
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(spec, batch_size=batch_size, dtype=dtype, device=device)
        self._max_tokens = as_integer("max_tokens", max_tokens)
        if not 1 <= self._max_tokens < 2**31:
            raise ValueError(f"max_tokens: expected 1 to {2**31 - 1}, got {max_tokens}")
        pages = PageTable(spec, 1).plan_append([self._max_tokens]).pages_needed
        self._allocate(batch_size, max(pages, 1))

    @torch.inference_mode(False)
    def _allocate(self, batch_size: int, columns: int) -> None:
        """New empty storage with `columns` pages a row.

        Tensors made in inference mode could not be written to outside of it.
        """
        device = self._device
        self._state = torch.zeros((batch_size, 4), dtype=torch.int32, device=device)
        self._positions = torch.zeros((batch_size, 3), dtype=torch.int32, device=device)
        # Positions seen, for torch's own operators: what the compiler reorders they must not read
        # from a table that operators of ours write.
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        pages = torch.arange(batch_size * columns, dtype=torch.int32, device=device)
        pages = pages.view(batch_size, columns)
        self._page_table = torch.stack([pages, torch.zeros_like(pages)], dim=2)
        self._pages_per_slab = batch_size * columns
        self._slabs = [self._new_slab(self._pages_per_slab)]
        self._dense = self._new_dense()
        self._mark_static()

    def _mark_static(self) -> None:
        """The tensors stay where they are: CUDA graphs need not copy them."""
        for tensor in self._tensors():
            torch._dynamo.mark_static_address(tensor)

    def _tensors(self) -> list[Tensor]:
        dense = self._buffers
        tables = [self._state, self._positions, self._tables(), self._seen]
        return [dense.keys, dense.values, dense.smoothing, dense.counters, *tables, *self._slabs]

    def _parts(self, columns: int) -> list[Tensor]:
        """Views ``[B, ...]`` of everything that belongs to rows, of pages the first `columns`."""
        dense, table = self._buffers, self._tables()
        pages = self._slabs[0].view(*table.shape[:2], self._page_bytes)[:, :columns]
        tables = [self._state, self._positions, table[:, :columns, 1]]
        return [dense.keys, dense.values, dense.smoothing, *tables, pages]

    @property
    def _buffers(self) -> DenseBuffers:
        assert self._dense is not None
        return self._dense

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return int(self._state.shape[0])

    @property
    def max_tokens(self) -> int:
        """Tokens that a row can hold."""
        return self._max_tokens

    @property
    def lengths(self) -> list[int]:
        """Committed real tokens of each row, read from the device."""
        return [int(length) for length in self._state[:, 0].tolist()]

    @property
    def seen_positions(self) -> Tensor:
        """Positions that came, padding included: an int64 scalar on the device."""
        return self._seen.clone()

    @property
    def refused_tokens(self) -> list[int]:
        """Tokens of each row that came when it was full, and were not stored.

        Only a compiled or captured step on a GPU leaves any: nobody waits for it to say so.
        """
        return [int(tokens) for tokens in self._positions[:, 2].tolist()]

    def place(self, first_positions: Sequence[int], seen_positions: int) -> None:
        """Say which of the positions to come are padding.

        Parameters
        ----------
        first_positions : sequence of int
            Each row's first position that is a token.
        seen_positions : int
            Positions that have come.
        """
        placed = torch.tensor(
            [[first, seen_positions] for first in first_positions], dtype=torch.int32
        )
        with _undone_if_it_fails(self._positions, self._seen):
            self._positions[:, :2].copy_(placed)
            self._seen.fill_(seen_positions)

    @without_grad
    def plan(self, chunk_tokens: int) -> FixedPlan:
        """What appending `chunk_tokens` positions will take, worked out on the device."""
        tables = self._state, self._tables(), self._positions
        rows, jobs = ops.plan_append(
            *tables, self._spec_ints, chunk_tokens=chunk_tokens, max_tokens=self._max_tokens
        )
        return FixedPlan(rows, jobs)

    @without_grad
    def append_planned(self, key_states: Tensor, value_states: Tensor, plan: FixedPlan) -> None:
        """Carry out a plan for a chunk of its length and commit it, without the host's checks."""
        tokens = key_states.shape[2]

        def run() -> None:
            self._run_encode_append(
                key_states, value_states, self._buffers, self._slabs, plan.rows, plan.jobs
            )
            self._commit_planned(tokens, plan)

        self._all_or_nothing(tokens, run)

    @without_grad
    def attend_append_planned(
        self,
        query: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        plan: FixedPlan,
        *,
        scaling: float,
        softcap: float = 0.0,
        sliding_window: int = 0,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """`attend_append` by a plan for the chunk, without the host's checks.

        Parameters
        ----------
        sink_logits : Tensor, optional
            ``[Hq]``, on the store's device.

        Returns
        -------
        Tensor
            ``[B, q, Hq, D]``.
        """
        tokens = key_states.shape[2]
        sinks = None if sink_logits is None else self._operands.sinks(sink_logits)

        def run() -> Tensor:
            out = self._run_attend_append(
                query,
                key_states,
                value_states,
                self._buffers,
                self._slabs,
                self._tables(),
                plan.rows,
                plan.jobs,
                sinks,
                scaling,
                softcap,
                sliding_window,
            )
            self._commit_planned(tokens, plan)
            return out

        return self._all_or_nothing(tokens, run)

    @without_grad
    def attend_committed(
        self,
        query: Tensor,
        *,
        scaling: float,
        softcap: float = 0.0,
        sliding_window: int = 0,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`attend` to what is committed, without the host's checks."""
        nothing = query.new_empty((query.shape[0], self._spec.num_kv_heads, 0, query.shape[3]))
        return self._run_decode_attention(
            query,
            nothing,
            nothing,
            self._state,
            None if sink_logits is None else self._operands.sinks(sink_logits),
            scaling=scaling,
            softcap=softcap,
            sliding_window=sliding_window,
        )

    def _all_or_nothing(self, chunk_tokens: int, run: Callable[[], _Result]) -> _Result:
        """Carry out and commit a plan; if that fails, nothing has happened.

        A chunk's newest tokens take the exact ring's slots of those that leave it for pages, which
        they have left only when that is committed. One token always has a free slot: the ring has
        one more than tokens stay in it. So a decode step needs no copy.
        """
        if torch.compiler.is_compiling():
            return run()
        before = self._buffers.clone() if chunk_tokens > 1 else None
        try:
            return run()
        except BaseException:
            if before is not None:
                self._buffers.copy_(before)
            self._seen.copy_(self._positions[0, 1])
            raise

    def _commit_planned(self, chunk_tokens: int, plan: FixedPlan) -> None:
        """Count the positions, then change the tables: when that has happened, all has."""
        self._seen.add_(chunk_tokens)
        ops.commit_append(
            plan.rows,
            self._state,
            self._tables(),
            self._positions,
            self._spec_ints,
            chunk_tokens=chunk_tokens,
            max_tokens=self._max_tokens,
        )

    def append(
        self, key_states: Tensor, value_states: Tensor, new_tokens: Sequence[int] | None = None
    ) -> None:
        """Commit a chunk; see `LayerStore.append`.

        Raises
        ------
        ValueError
            When the chunk does not fit, in shape or in number; the store is as it was.
        """
        counts = self._counts(key_states, value_states, new_tokens)
        plan = self._plan_of(key_states.shape[2], counts)
        self.append_planned(key_states, value_states, plan)

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
        """Attend to what is committed and a chunk, then commit it; see `LayerStore.attend_append`.

        Raises
        ------
        ValueError
            As `attend` and `append`; the store is as it was.
        """
        sinks = self._check_call(query, scaling, softcap, sliding_window, sink_logits)
        counts = self._counts(key_states, value_states, new_tokens, query)
        return self.attend_append_planned(
            query,
            key_states,
            value_states,
            self._plan_of(key_states.shape[2], counts),
            scaling=scaling,
            softcap=softcap,
            sliding_window=sliding_window,
            sink_logits=sinks,
        )

    def _plan_of(self, chunk_tokens: int, counts: list[int]) -> FixedPlan:
        """The plan for a chunk of which each row takes its last ``counts[b]`` tokens."""
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if length + count > self._max_tokens:
                raise ValueError(
                    f"key_states: expected at most {self._max_tokens - length} more tokens in row "
                    f"{row} (the store was made for {self._max_tokens}), got {count}"
                )
        seen = int(self._seen)
        self.place([seen + chunk_tokens - count for count in counts], seen)
        return self.plan(chunk_tokens)

    def crop(self, new_lengths: int | Sequence[int], *, seen_positions: int | None = None) -> None:
        """Forget the newest tokens; see `LayerStore.crop`.

        Parameters
        ----------
        new_lengths
            As there.
        seen_positions : int, optional
            Positions that count as having come from now on; those that have by default.
        """
        lengths = checked_lengths(new_lengths, self.lengths)
        state, table, positions = (
            tensor.cpu().numpy().copy() for tensor in (self._state, self._tables(), self._positions)
        )
        crop_tables(self._spec, state, table, positions, self._max_tokens, lengths)
        # A row cropped within a page keeps that page for what is left of it.
        columns = max(entries_of_full_rows(self._spec, state, table, positions, self._max_tokens))
        if columns > table.shape[1]:
            self._rearrange(range(self.batch_size), columns)
        entries = self._tables()[:, : table.shape[1], 1]
        with _undone_if_it_fails(self._state, entries, self._positions, self._seen):
            self._state.copy_(torch.from_numpy(state))
            entries.copy_(torch.from_numpy(table[:, :, 1]))
            if seen_positions is not None:
                self._positions[:, 1].fill_(seen_positions)
                self._seen.fill_(seen_positions)

    def _select(self, rows: list[int]) -> None:
        self._rearrange(rows, self._tables().shape[1])

    def _rearrange(self, rows: Sequence[int], columns: int) -> None:
        """Row i becomes what row ``rows[i]`` was; in place unless the storage changes its size."""
        index = torch.tensor(rows, device=self._device)
        used = max(int(self._state[:, 1].max()), 1)
        taken = [part.index_select(0, index) for part in self._parts(used)]
        if (len(rows), columns) == self._tables().shape[:2]:
            parts = self._parts(used)
            with _undone_if_it_fails(*parts):
                for part, new in zip(parts, taken, strict=True):
                    part.copy_(new)
            return
        before = dict(vars(self))
        counters, seen = self._buffers.counters, self._seen
        try:
            self._allocate(len(rows), columns)
            self._buffers.counters.copy_(counters)
            self._seen.copy_(seen)
            for part, new in zip(self._parts(used), taken, strict=True):
                part.copy_(new)
        except BaseException:
            vars(self).update(before)
            raise

    def reset(self) -> None:
        """Forget everything, in place: the storage stays."""
        dense = self._buffers
        table = self._tables()[:, :, 1]
        for tensor in (self._state, self._positions, self._seen, table, dense.counters):
            tensor.zero_()
        dense.smoothing.fill_(1)

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> FixedStore:
        """Move the storage to `device`; returns the store."""
        target = checked_device(device, self._spec)
        tables = (self._state, self._positions, self._tables(), self._seen)
        moved = [table.to(target) for table in tables]
        super().to(target)
        self._state, self._positions, self._page_table, self._seen = moved
        self._mark_static()
        return self

    def clone(self) -> FixedStore:
        """Return an independent copy."""
        other = FixedStore(
            self._spec,
            batch_size=self.batch_size,
            max_tokens=self._max_tokens,
            dtype=self._dtype,
            device=self._device,
        )
        if other._tables().shape != self._tables().shape:
            other._allocate(*self._tables().shape[:2])
        for to, tensor in zip(other._tensors(), self._tensors(), strict=True):
            to.copy_(tensor)
        return other

    @classmethod
    def from_state(
        cls, state: StoreState, device: torch.device | str, *, max_tokens: int | None = None
    ) -> FixedStore:
        """Make a store that holds what `state` does; see `LayerStore.from_state`.

        Parameters
        ----------
        max_tokens : int, optional
            Tokens that a row can hold; by default those of the longest.

        Raises
        ------
        ValueError
            When a row holds more, or the device is not supported.
        """
        lengths = state.table.lengths
        longest = max(lengths)
        if max_tokens is not None and max_tokens < longest:
            raise ValueError(
                f"max_tokens: expected at least {longest} (the longest row), got {max_tokens}"
            )
        store = cls(
            state.spec,
            batch_size=len(lengths),
            max_tokens=max(longest, 1) if max_tokens is None else max_tokens,
            dtype=state.exact_keys.dtype,
            device=device,
        )
        store._hold(state)
        store.place([longest - length for length in lengths], longest)
        return store

    def _hold(self, state: StoreState) -> None:
        """Take over what a state of as many rows holds."""
        rows, table = state.table.rows(), state.table.page_table()
        columns = max(
            entries_of_full_rows(
                self._spec, rows, table, np.zeros((len(rows), 3), np.int32), self._max_tokens
            )
        )
        if columns > self._tables().shape[1]:  # some pages are not full
            self._allocate(len(rows), columns)
        dense, used = self._buffers, table.shape[1]
        dense.keys.copy_(state.exact_keys)
        dense.values.copy_(state.exact_values)
        dense.smoothing.copy_(state.smoothing)
        dense.counters.copy_(state.counters)
        self._state.copy_(torch.from_numpy(rows))
        self._tables()[:, :used, 1].copy_(torch.from_numpy(table[:, :, 1]))
        pages = self._slabs[0].view(*self._tables().shape[:2], self._page_bytes)
        for row, entries in enumerate(rows[:, 1].tolist()):
            held = torch.from_numpy(table[row, :entries, 0])
            pages[row, :entries].copy_(state.pages[held])

    def _host_table(self) -> PageTable:
        rows, table = self._state.cpu().numpy(), self._tables().cpu().numpy()
        columns = int(rows[:, 1].max())
        is_used = np.arange(columns) < rows[:, 1:2]
        table = np.where(is_used[:, :, None], table[:, :columns], 0)
        return PageTable.from_exports(self._spec, rows, table, self._pages_per_slab)

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by part, used or not; see `LayerStore.nbytes`."""
        parts = super().nbytes()
        parts["tables"] += self._state.nbytes + self._positions.nbytes + self._seen.nbytes
        return parts

    def _rows(self, new_tokens: Sequence[int]) -> Tensor:
        rows: Tensor = self._state.clone()
        rows[:, 3] = torch.tensor(new_tokens, dtype=torch.int32)
        return rows

    def _entries(self) -> list[list[list[int]]]:
        tables = zip(self._tables().tolist(), self._state[:, 1].tolist(), strict=True)
        return [entries[:used] for entries, used in tables]
