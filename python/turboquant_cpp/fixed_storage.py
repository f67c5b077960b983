"""Where a `FixedStore` keeps one layer's tokens: all of it there from the start, on one device.

Beside what `packed_storage` describes, for ``B`` rows:

- the rows' states, int32 ``[B, 4]``, and the page table, int32 ``[B, columns, 2]``: what a
  `PageTable` says on the host. Every row owns pages of its own, in order;
- positions, int32 ``[B, 3]``: where a row's tokens begin, how many positions came, how many tokens
  it had no room for;
- the number of positions that came once more, an int64 scalar.

docs/cache_format.md describes the tables' columns.

Operators read and change these tensors in place and they never move, so that CUDA graphs may hold
their addresses. What needs the host (`crop`, `select`, lengths) reads the tables back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from turboquant_cpp._core import LayerSpec, PageTable, crop_tables, entries_of_full_rows
from turboquant_cpp.packed_storage import PackedStorage
from turboquant_cpp.spec import as_integer
from turboquant_cpp.store_checks import checked_device, checked_lengths
from turboquant_cpp.store_parts import DenseBuffers
from turboquant_cpp.store_state import StoreState

__all__ = ["FixedStorage"]

_Storage = TypeVar("_Storage", bound="FixedStorage")


class StepTensors(torch.nn.Module):
    """What a step reads and changes: the storage's own tensors, gathered.

    A module, because Dynamo looks before every compiled step whether what it traced is as it was:
    at a module's dictionaries, but at every tensor of another object. So nothing here is replaced.
    """

    def __init__(self, storage: FixedStorage) -> None:
        super().__init__()
        dense = storage._dense
        self.keys, self.values = dense.keys, dense.values
        self.smoothing, self.counters = dense.smoothing, dense.counters
        (self.slab,) = storage._slabs
        self.rows, self.page_table = storage._state, storage._page_table
        self.positions, self.seen = storage._positions, storage._seen
        self.spec = tuple(storage._spec_ints)
        self.max_tokens = storage._max_tokens


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


class FixedStorage(PackedStorage):
    """Pages, exact tokens and tables of at most `max_tokens` tokens a row, and their changes.

    Parameters and errors are those of `FixedStore`, which adds the operators.
    """

    # Always there.
    _dense: DenseBuffers
    _page_table: Tensor

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
        self._step = StepTensors(self)

    def _tensors(self) -> list[Tensor]:
        dense = self._dense
        tables = [self._state, self._positions, self._page_table, self._seen]
        return [dense.keys, dense.values, dense.smoothing, dense.counters, *tables, *self._slabs]

    def _parts(self, columns: int) -> list[Tensor]:
        """Views ``[B, ...]`` of everything that belongs to rows, of pages the first `columns`."""
        dense, table = self._dense, self._page_table
        pages = self._slabs[0].view(*table.shape[:2], self._page_bytes)[:, :columns]
        tables = [self._state, self._positions, table[:, :columns, 1]]
        return [dense.keys, dense.values, dense.smoothing, *tables, pages]

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
        return self._step.seen.clone()

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
            tensor.cpu().numpy().copy()
            for tensor in (self._state, self._page_table, self._positions)
        )
        crop_tables(self._spec, state, table, positions, self._max_tokens, lengths)
        # A row cropped within a page keeps that page for what is left of it.
        columns = max(entries_of_full_rows(self._spec, state, table, positions, self._max_tokens))
        if columns > table.shape[1]:
            self._rearrange(range(self.batch_size), columns)
        entries = self._page_table[:, : table.shape[1], 1]
        with _undone_if_it_fails(self._state, entries, self._positions, self._seen):
            self._state.copy_(torch.from_numpy(state))
            entries.copy_(torch.from_numpy(table[:, :, 1]))
            if seen_positions is not None:
                self._positions[:, 1].fill_(seen_positions)
                self._seen.fill_(seen_positions)

    def _select(self, rows: list[int]) -> None:
        self._rearrange(rows, self._page_table.shape[1])

    def _rearrange(self, rows: Sequence[int], columns: int) -> None:
        """Row i becomes what row ``rows[i]`` was; in place unless the storage changes its size."""
        index = torch.tensor(rows, device=self._device)
        used = max(int(self._state[:, 1].max()), 1)
        taken = [part.index_select(0, index) for part in self._parts(used)]
        if (len(rows), columns) == self._page_table.shape[:2]:
            parts = self._parts(used)
            with _undone_if_it_fails(*parts):
                for part, new in zip(parts, taken, strict=True):
                    part.copy_(new)
            return
        before = dict(vars(self))
        counters, seen = self._dense.counters, self._seen
        try:
            self._allocate(len(rows), columns)
            self._dense.counters.copy_(counters)
            self._seen.copy_(seen)
            for part, new in zip(self._parts(used), taken, strict=True):
                part.copy_(new)
        except BaseException:
            vars(self).update(before)
            raise

    def reset(self) -> None:
        """Forget everything, in place: the storage stays."""
        dense = self._dense
        table = self._page_table[:, :, 1]
        for tensor in (self._state, self._positions, self._seen, table, dense.counters):
            tensor.zero_()
        dense.smoothing.fill_(1)

    @torch.inference_mode(False)
    def to(self: _Storage, device: torch.device | str) -> _Storage:
        """Move the storage to `device`; returns the store."""
        target = checked_device(device, self._spec)
        tables = (self._state, self._positions, self._page_table, self._seen)
        moved = [table.to(target) for table in tables]
        super().to(target)
        self._state, self._positions, self._page_table, self._seen = moved
        self._mark_static()
        return self

    def clone(self: _Storage) -> _Storage:
        """Return an independent copy."""
        other = type(self)(
            self._spec,
            batch_size=self.batch_size,
            max_tokens=self._max_tokens,
            dtype=self._dtype,
            device=self._device,
        )
        if other._page_table.shape != self._page_table.shape:
            other._allocate(*self._page_table.shape[:2])
        for to, tensor in zip(other._tensors(), self._tensors(), strict=True):
            to.copy_(tensor)
        return other

    @classmethod
    def from_state(
        cls: type[_Storage],
        state: StoreState,
        device: torch.device | str,
        *,
        max_tokens: int | None = None,
    ) -> _Storage:
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
        if columns > self._page_table.shape[1]:  # some pages are not full
            self._allocate(len(rows), columns)
        dense, used = self._dense, table.shape[1]
        dense.keys.copy_(state.exact_keys)
        dense.values.copy_(state.exact_values)
        dense.smoothing.copy_(state.smoothing)
        dense.counters.copy_(state.counters)
        self._state.copy_(torch.from_numpy(rows))
        self._page_table[:, :used, 1].copy_(torch.from_numpy(table[:, :, 1]))
        pages = self._slabs[0].view(*self._page_table.shape[:2], self._page_bytes)
        for row, entries in enumerate(rows[:, 1].tolist()):
            held = torch.from_numpy(table[row, :entries, 0])
            pages[row, :entries].copy_(state.pages[held])

    def _host_table(self) -> PageTable:
        rows, table = self._state.cpu().numpy(), self._page_table.cpu().numpy()
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
        tables = zip(self._page_table.tolist(), self._state[:, 1].tolist(), strict=True)
        return [entries[:used] for entries, used in tables]
