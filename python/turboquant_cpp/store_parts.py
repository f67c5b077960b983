"""What stores are put together from: dense buffers, slabs of pages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Final, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "DenseBuffers",
    "page_of",
    "pages_for_slab",
    "smallest_slab",
    "storage_bytes",
    "without_grad",
]

# Pages of the smallest slab, per row: few, so that a short sequence does not hold more than it
# would uncompressed.
_MIN_PAGES_PER_ROW: Final = 4
# Every slab costs an operator call half a microsecond. With no more than these, and half of them
# when slabs are merged, one that is hardly used is at most 5 % of what is held.
_MOST_SLABS: Final = 40

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


def without_grad(method: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`torch.no_grad`, free of its cost where gradients are off already, as in a decode step."""

    @functools.wraps(method)
    def quiet(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    return quiet


class DenseBuffers:
    """What a store holds beside its pages.

    Parameters
    ----------
    keys, values : Tensor
        Sinks and ring ``[B, H, S + R, D]`` in the model's dtype.
    smoothing : Tensor
        float32 ``[B, H, D]``.
    counters : Tensor
        int64 ``[2]``: scales that saturated, tokens that held NaN or infinity.
    """

    def __init__(self, keys: Tensor, values: Tensor, smoothing: Tensor, counters: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.smoothing = smoothing
        self.counters = counters

    def select(self, rows: Tensor) -> DenseBuffers:
        """Row i of the result is row ``rows[i]``."""
        return DenseBuffers(
            self.keys.index_select(0, rows),
            self.values.index_select(0, rows),
            self.smoothing.index_select(0, rows),
            self.counters,
        )

    def to(self, device: torch.device) -> DenseBuffers:
        """The same on `device`."""
        return DenseBuffers(
            self.keys.to(device),
            self.values.to(device),
            self.smoothing.to(device),
            self.counters.to(device),
        )

    def clone(self) -> DenseBuffers:
        """Return an independent copy."""
        return DenseBuffers(
            self.keys.clone(), self.values.clone(), self.smoothing.clone(), self.counters.clone()
        )

    def copy_(self, other: DenseBuffers) -> None:
        """Become what `other` is, in place."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(theirs)


def smallest_slab(batch_size: int) -> int:
    """Pages of a store's smallest slab, a power of two."""
    return 1 << (_MIN_PAGES_PER_ROW * batch_size - 1).bit_length()


def pages_for_slab(smallest: int, pages_needed: int) -> int:
    """Pages of a slab: `smallest`, doubled until few slabs hold what is needed."""
    pages = smallest
    while pages_needed > _MOST_SLABS * pages:
        pages *= 2
    return pages


def page_of(slabs: Sequence[Tensor], pages_per_slab: int, page: int) -> Tensor:
    """The bytes of a page ``[page_bytes]``, where they lie."""
    return slabs[page // pages_per_slab][page % pages_per_slab]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the tensors hold, shared storages counted once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
