"""A dense copy of a layer's tokens for ``dequantize="incremental"``."""

from __future__ import annotations

from torch import Tensor

from turboquant_cpp.layer_store import LayerStore

__all__ = ["DenseMirror"]

_GROWTH_TOKENS = 256


class DenseMirror:
    """Dense keys and values beside a store, where only what was encoded since is dequantised again.

    A step copies its own tokens, and dequantises the blocks that left the exact window in the step
    before. The copy takes as much memory as an uncompressed cache.
    """

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._length = 0
        self._encoded: list[int] = []

    def forget(self) -> None:
        """Drop the copy; the next `sync` makes a new one."""
        self._buffers = None
        self._length = 0

    def crop(self, store: LayerStore, length: int) -> None:
        """Keep the first `length` positions, after `store` was cropped to them."""
        self._length = min(self._length, length)
        self._encoded = [
            min(old, new) for old, new in zip(self._encoded, store.encoded_tokens, strict=False)
        ]

    def sync(self, store: LayerStore, length: int) -> tuple[Tensor, Tensor]:
        """Dense ``[B, H, length, D]`` of everything that `store` holds."""
        encoded = store.encoded_tokens
        if self._buffers is None:
            self._buffers = store.dequantize(length)
        else:
            first, end = self._outdated(store, encoded, length)
            self._grow(length)
            if first < end:
                parts = (buffer[:, :, first:end] for buffer in self._buffers)
                store.dequantize(length, *parts, positions=(first, end))
        self._length, self._encoded = length, encoded
        return self._views()

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a chunk ``[B, H, T, D]`` after the tokens of the last `sync`; returns all of them."""
        if self._buffers is None:
            raise RuntimeError("a dense copy must be in sync before it is extended")
        begin, end = self._length, self._length + keys.shape[2]
        self._grow(end)
        for buffer, chunk in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, begin:end] = chunk
        self._length = end
        return self._views()

    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers or ())

    def _outdated(self, store: LayerStore, encoded: list[int], length: int) -> tuple[int, int]:
        """The positions that hold something else than `store` does: encoded since, or new."""
        first, end = (self._length, length) if self._length < length else (length, 0)
        for tokens, old, new in zip(store.lengths, self._encoded, encoded, strict=True):
            if new > old:
                begin = length - tokens + store.spec.sink_tokens
                first, end = min(first, begin + old), max(end, begin + new)
        return first, end

    def _grow(self, length: int) -> None:
        """Make room for `length` positions, keeping those there are."""
        assert self._buffers is not None
        if self._buffers[0].shape[2] >= length:
            return
        batch, heads, _, dim = self._buffers[0].shape
        keys, values = (
            buffer.new_empty((batch, heads, length + _GROWTH_TOKENS, dim))
            for buffer in self._buffers
        )
        for new, old in zip((keys, values), self._buffers, strict=True):
            new[:, :, : self._length] = old[:, :, : self._length]
        self._buffers = (keys, values)

    def _views(self) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        keys, values = self._buffers
        return keys[:, :, : self._length], values[:, :, : self._length]
