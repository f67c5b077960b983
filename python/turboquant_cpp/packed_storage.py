"""Where one layer's compressed keys and values lie, in torch tensors.

What is held for ``B`` rows (sequences) of ``H`` key/value heads of ``D`` channels:

- packed pages in *slabs* (uint8 ``[pages_per_slab, page_bytes]``), which are merged to larger ones
  when they become many;
- two dense buffers ``[B, H, S + R, D]`` in the model's dtype with the S sink tokens and the ring of
  recent tokens (R = window + 64);
- the key smoothing, float32 ``[B, H, D]``;
- a `PageTable`, host bookkeeping only: which row's tokens are in which page.

Every change is made in two phases: a plan and the storage it needs come first, the commit last.
Whatever fails in between leaves everything as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from turboquant_cpp._core import AppendPlan, BlockLayout, LayerSpec, PageTable
from turboquant_cpp.plain_codes import plain_codes
from turboquant_cpp.spec import as_integer
from turboquant_cpp.store_checks import checked_device, checked_lengths, checked_rows
from turboquant_cpp.store_operands import Operands
from turboquant_cpp.store_parts import (
    DenseBuffers,
    page_of,
    pages_for_slab,
    smallest_slab,
    storage_bytes,
)
from turboquant_cpp.store_state import STORE_DTYPES, StoreState

__all__ = ["PackedStorage", "ReadyAppend"]

_DTYPES: Final = tuple(STORE_DTYPES.values())
_JOB_COLUMNS: Final = 6
_Storage = TypeVar("_Storage", bound="PackedStorage")


class ReadyAppend(NamedTuple):
    """An append that is ready: the storage after it and the table that its operator takes."""

    plan: AppendPlan
    dense: DenseBuffers
    slabs: list[Tensor]
    pages_per_slab: int
    jobs: Tensor


class PackedStorage:
    """Pages, exact tokens and tables of one layer, and every change of them but attention's.

    Parameters and errors are those of `LayerStore`, which adds the operators.
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
        self._operands = Operands(spec, dtype, device)
        self._table = PageTable(spec, batch_size)
        self._slabs: list[Tensor] = []
        self._pages_per_slab = 0
        self._dense: DenseBuffers | None = None
        self._page_table: Tensor | None = None
        self._row_table: tuple[list[int], Tensor] | None = None
        self._no_jobs = torch.empty((0, _JOB_COLUMNS), dtype=torch.int32, device=device)

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
        self._crop(checked_lengths(new_lengths, self.lengths))

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
        self._select(checked_rows(indices, self.batch_size))

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

    def to(self: _Storage, device: torch.device | str) -> _Storage:
        """Move the storage to `device`, in place; returns the store."""
        target = checked_device(device, self._spec)
        slabs = [slab.to(target) for slab in self._slabs]
        dense = None if self._dense is None else self._dense.to(target)
        no_jobs = self._no_jobs.to(target)
        self._slabs, self._dense, self._no_jobs, self._device = slabs, dense, no_jobs, target
        self._operands = Operands(self._spec, self._dtype, target)
        self._page_table = self._row_table = None
        return self

    def clone(self: _Storage) -> _Storage:
        """Return an independent copy."""
        other = type(self)(
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
    def from_state(cls: type[_Storage], state: StoreState, device: torch.device | str) -> _Storage:
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
            smallest = min(smallest_slab(batch), 1 << (pages.bit_length() - 1))
            per_slab = pages_for_slab(smallest, pages)
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

    def __deepcopy__(self: _Storage, memo: dict[int, Any]) -> _Storage:
        return self.clone()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: save the cache to a file instead"
        )

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
        page = functools.partial(page_of, self._slabs, self._pages_per_slab)
        k_codes, k_scales, v_codes, v_scales = (
            part.to(self._device)
            for kind in ("k", "v")
            for part in plain_codes(self._spec, self._layout, kind, self._entries(), page)
        )
        return k_codes, k_scales, v_codes, v_scales

    def _entries(self) -> list[list[list[int]]]:
        """Page and tokens of every used entry of every row."""
        tables = zip(self._table.page_table().tolist(), self._table.num_entries, strict=True)
        return [entries[:used] for entries, used in tables]

    def _prepare_append(self, counts: list[int]) -> ReadyAppend:
        """All that an append needs and that can fail; the store is as it was."""
        plan = self._table.plan_append(counts)
        dense = self._dense or self._new_dense()
        if not plan.moves_tokens:
            self._table.prepare(plan)
            return ReadyAppend(plan, dense, self._slabs, self._pages_per_slab, self._no_jobs)
        slabs, pages_per_slab = self._grown_slabs(plan)
        for from_page, to_page in plan.copies.tolist():
            page_of(slabs, pages_per_slab, to_page).copy_(page_of(slabs, pages_per_slab, from_page))
        self._table.prepare(plan)
        return ReadyAppend(plan, dense, slabs, pages_per_slab, self._upload(plan.jobs))

    def _commit_append(self, growth: ReadyAppend) -> None:
        self._table.commit(growth.plan)
        self._dense = growth.dense
        self._slabs, self._pages_per_slab = growth.slabs, growth.pages_per_slab
        self._row_table = None
        if growth.plan.moves_tokens:
            self._page_table = None

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
        smallest = self._pages_per_slab if self._slabs else smallest_slab(self.batch_size)
        pages = pages_for_slab(smallest, plan.pages_needed)
        if self._slabs and pages > self._pages_per_slab:
            self._merge_slabs(pages)
        slabs = list(self._slabs)
        while len(slabs) * pages < plan.pages_needed:
            slabs.append(self._new_slab(pages))
        return slabs, pages

    def _merge_slabs(self, pages: int) -> None:
        """Copy all pages to slabs of `pages` pages.

        One new slab after the other, whose parts replace the old ones: little is held twice, and if
        memory ends in between, the store holds the same in slabs of the old size.
        """
        merged = []
        group = pages // self._pages_per_slab
        for first in range(0, len(self._slabs), group):
            merged.append(self._new_slab(pages))
            old = self._slabs[first : first + group]
            parts = merged[-1].split(self._pages_per_slab)[: len(old)]
            for part, slab in zip(parts, old, strict=True):
                part.copy_(slab)
            self._slabs[first : first + group] = parts
        self._slabs, self._pages_per_slab = merged, pages

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
