"""A cache whose layers stay in step, or that says what is to be done about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turboquant_cpp.hf import steps
from turboquant_cpp.hf.held import Held
from turboquant_cpp.hf.layer import CompressedLayer
from turboquant_cpp.hf.offloading import OffloadableCache

__all__ = ["GuardedCache"]


class GuardedCache(OffloadableCache):
    """What failed between two layers is found by the next use, which names the cure (`steps`)."""

    _damage: str | None = None  # the change that left layers with different rows
    _first_layer: int = 0

    def find_first_layer(self) -> None:
        """Learn with which layer a step begins; to be called when there are other layers."""
        self._first_layer = steps.first_layer(self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values ``[B, H, T, D]`` and return what attention has to read.

        See `CompressedLayer.update`.

        Raises
        ------
        ValueError, TypeError
            When they do not fit what is stored; the cache is as it was. So it is when memory cannot
            be allocated (then torch's own error is raised).
        RuntimeError
            When an earlier step, crop or reorder failed between two layers; the message says what
            repairs the cache. The layer is as it was.
        """
        is_compiling = torch.compiler.is_compiling()
        if layer_idx == self._first_layer and not is_compiling:
            self.check_usable()
        number = len(self.layers)
        layer = self.layers[layer_idx] if layer_idx < number else None
        if isinstance(layer, CompressedLayer) and not self.offloading:
            return layer.update(key_states, value_states, *args, **kwargs)  # nothing to put back
        if is_compiling:
            compiled: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, layer_idx, *args, **kwargs
            )
            return compiled
        if layer is None:
            makes_layers = self.layer_class_to_replicate is not None
            tokens = key_states.shape[-2]
            steps.check_new_layer(self.layers, layer_idx, tokens, makes_layers=makes_layers)
        held = Held(layer, key_states.shape[-2])
        try:
            states: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, layer_idx, *args, **kwargs
            )
        except BaseException:
            del self.layers[number:]  # those made for the refused tokens
            held.put_back()
            raise
        return states

    def check_usable(self) -> None:
        """Refuse to go on after a failure that left the layers with different tokens.

        Raises
        ------
        RuntimeError
            Saying what repairs the cache.
        """
        if self._damage is not None:
            raise RuntimeError(
                f"{self._damage} failed between two layers, which hold different rows since: "
                "forget everything with reset()"
            )
        steps.check_level(self.layers)

    def _change_layers(self, operation: str, change: Callable[[Any], None]) -> None:
        """Change all layers, and remember when some were changed and others could not be.

        Stock layers may refuse what compressed ones do not, so those come first.
        """
        if self._damage is not None:
            self.check_usable()
        in_order = sorted(self.layers, key=lambda layer: isinstance(layer, CompressedLayer))
        for index, layer in enumerate(in_order):
            held = None
            try:
                held = Held(layer)
                change(layer)
            except BaseException:
                if held is not None:
                    held.put_back()
                if index > 0:
                    self._damage = operation
                raise

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every layer; see `CompressedLayer.crop`.

        After a step that failed in a later layer the number counts from the layers that are ahead,
        so that all end with the same tokens.

        Raises
        ------
        RuntimeError, ValueError, TypeError
            When a sliding-window or linear layer cannot go back; the cache is as it was. Should
            others have gone back already, the next use asks for a `reset`.
        """
        change = steps.crop_uneven(self.layers, tokens_to_remove)
        self._change_layers(
            "crop", change or (lambda layer: steps.crop_layer(layer, tokens_to_remove))
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i of every layer becomes what row ``beam_idx[i]`` was."""
        self._change_layers("reorder_cache", lambda layer: layer.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies side by side; in compressed layers they share their pages."""
        self._change_layers(
            "batch_repeat_interleave", lambda layer: layer.batch_repeat_interleave(repeats)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` names (row numbers or a boolean mask)."""
        self._change_layers(
            "batch_select_indices", lambda layer: layer.batch_select_indices(indices)
        )

    def reset(self) -> None:
        """Forget everything and release the storage; cures a cache whose step failed."""
        self._damage = "reset"
        super().reset()
        self._damage = None
