"""Bytes a cache holds, measured from the storages of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["CacheSize", "measure_cache"]


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """Bytes by part: those of `CompressedDynamicCache.memory`, or ``dense`` for a stock cache.

    Examples
    --------
    >>> CacheSize({"pages": 1000, "exact": 24}).total_bytes
    1024
    """

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())

    def share(self, rows: int) -> CacheSize:
        """Return what one of so many equally long rows takes, whole bytes.

        Examples
        --------
        >>> CacheSize({"pages": 1000, "exact": 24}).share(8)
        CacheSize(parts={'pages': 125, 'exact': 3})
        """
        return CacheSize({name: part // rows for name, part in self.parts.items()})


def measure_cache(cache: Any) -> CacheSize:
    """Measure a transformers cache, compressed or not.

    A compressed cache is asked for its parts (``memory()``). Of a stock cache the storages of all
    tensors that its layers hold are counted, each once, at their full size: a view keeps the whole
    allocation alive.

    Parameters
    ----------
    cache
        A cache with ``layers``.

    Returns
    -------
    CacheSize
    """
    if hasattr(cache, "memory"):
        return CacheSize({name: part for name, part in cache.memory().items() if name != "total"})
    storages: dict[tuple[str, int], int] = {}
    for layer in cache.layers:
        for tensor in _tensors(vars(layer).values()):
            storage = tensor.untyped_storage()
            storages[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return CacheSize({"dense": sum(storages.values())})


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if hasattr(value, "__tensor_flatten__"):  # a wrapper subclass has no storage of its own
            names, _ = value.__tensor_flatten__()
            yield from _tensors(getattr(value, name) for name in names)
        elif isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
