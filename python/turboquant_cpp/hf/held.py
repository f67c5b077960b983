"""What a stock layer held before a call that failed.

Compressed layers need no help. Stock layers replace their tensors (a linear-attention layer's state
excepted, which a step writes in place at its end), so it is enough to keep those. Layers of fixed
size write into theirs: what the call may overwrite is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from turboquant_cpp.hf.layer import CompressedLayer

__all__ = ["Held"]


class Held:
    """What a layer holds at this moment.

    Parameters
    ----------
    layer
        Any layer of a cache; None: there is none yet.
    new_tokens : int
        Tokens of the `update` to come; 0 before another call, none of which writes keys or values
        in place.
    """

    def __init__(self, layer: Any, new_tokens: int = 0) -> None:
        self._layer = layer
        self._attributes: dict[str, Any] = {}
        self._contents: list[_Content | _Slots] = []
        if layer is None or isinstance(layer, CompressedLayer):
            return
        is_window = type(layer) is StaticSlidingWindowLayer
        for name, value in vars(layer).items():
            self._attributes[name] = dict(value) if isinstance(value, dict) else value
            if not isinstance(layer, StaticLayer) or not isinstance(value, Tensor):
                continue
            if is_window and name in ("keys", "values"):
                self._contents.append(_Slots(value, layer.cumulative_length_int, new_tokens))
            else:
                self._contents.append(_Content(value))

    def put_back(self) -> None:
        """Make the layer hold it again."""
        with torch.inference_mode():  # outside of it torch refuses to write to what was made in it
            for content in self._contents:
                content.put_back()
        for name, value in self._attributes.items():
            setattr(self._layer, name, value)


class _Content:
    """All that is in a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._before = tensor.clone()

    def put_back(self) -> None:
        self._tensor.copy_(self._before)


class _Slots:
    """What a window ``[B, H, slots, D]`` loses to new tokens: a few slots of all.

    They take the next free slots. Where those do not suffice, the oldest tokens are lost and the
    others move to the front.

    Parameters
    ----------
    window : Tensor
        Keys or values.
    tokens : int
        Tokens that came so far, the latest of which the window holds.
    new_tokens : int
        Tokens that come now.
    """

    def __init__(self, window: Tensor, tokens: int, new_tokens: int) -> None:
        slots = window.shape[2]
        held = min(tokens, slots)
        lost = min(max(held + new_tokens - slots, 0), held)
        # A tensor of inference mode does not count its changes: nothing will tell whether tokens
        # have moved, so all of them are copied.
        is_counted = not window.is_inference()
        self._version = window._version if is_counted else None
        self._window, self._held = window, held
        self._lost = lost if is_counted else held
        self._oldest = window[:, :, : self._lost].clone() if lost else None
        self._free = window[:, :, held : held + new_tokens].clone() if held < slots else None

    def put_back(self) -> None:
        window, lost, held = self._window, self._lost, self._held
        if self._version is not None and window._version == self._version:
            return
        if self._oldest is not None:
            window[:, :, lost:held] = window[:, :, : held - lost].clone()
            window[:, :, :lost] = self._oldest
        if self._free is not None:
            window[:, :, held : held + self._free.shape[2]] = self._free
