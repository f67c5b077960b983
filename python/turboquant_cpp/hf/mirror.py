"""A dense copy of a layer's tokens for ``dequantize="incremental"``."""

from __future__ import annotations

from torch import Tensor

from turboquant_cpp.layer_store import LayerStore

__all__ = ["DenseMirror"]

_GROWTH_TOKENS = 256


class DenseMirror:
    """Dense keys and values beside a store, dequantised again only when new blocks were encoded.

    Between two blocks a step copies its own tokens and nothing else. The copy takes as much memory
    as an uncompressed cache.
    """

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._length = 0
        self._encoded: list[int] = []

    def forget(self) -> None:
        """Drop the copy; the next `sync` makes a new one."""
        self._buffers = None
        self._length = 0

    def sync(self, store: LayerStore, length: int) -> tuple[Tensor, Tensor]:
        """Dense ``[B, H, length, D]`` of everything that `store` holds."""
        encoded = store.encoded_tokens
        if self._buffers is None or self._length != length or self._encoded != encoded:
            self.forget()  # before the new copy is made, so that there are never two
            self._buffers = store.dequantize(length)
            self._length, self._encoded = length, encoded
        return self._views()

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a chunk ``[B, H, T, D]`` after the tokens of the last `sync`; returns all of them."""
        if self._buffers is None:
            raise RuntimeError("a dense copy must be in sync before it is extended")
        begin, end = self._length, self._length + keys.shape[2]
        if self._buffers[0].shape[2] < end:
            batch, heads, _, dim = keys.shape
            shape = (batch, heads, end + _GROWTH_TOKENS, dim)
            grown = (keys.new_empty(shape), values.new_empty(shape))
            for new, old in zip(grown, self._buffers, strict=True):
                new[:, :, :begin] = old[:, :, :begin]
            self._buffers = grown
        for buffer, chunk in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, begin:end] = chunk
        self._length = end
        return self._views()

    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers or ())

    def _views(self) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        keys, values = self._buffers
        return keys[:, :, : self._length], values[:, :, : self._length]
