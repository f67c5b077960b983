"""What a file holds of one layer of a cache: a description in JSON, and tensors.

Every class here describes a layer (`describe`), reads such a description that may come from anyone
(`read`), and gives an empty layer what was read (`fill`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from turboquant_cpp.fields import Fields, FormatError, refused
from turboquant_cpp.hf.takeover import attention_half
from turboquant_cpp.store_state import StoreState

__all__ = [
    "STATES_OF",
    "CompressedState",
    "FixedSlidingState",
    "KeysState",
    "LayerState",
    "LinearState",
    "SlidingState",
]

Take = Callable[[str], Tensor]
_MAX_INT: Final = (1 << 31) - 1


@dataclass(frozen=True)
class LayerState:
    """A part of what a layer holds."""

    @classmethod
    def describe(cls, layer: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The description as JSON; adds the tensors ``path.name`` to `tensors`."""
        raise NotImplementedError

    @classmethod
    def read(cls, fields: Fields, take: Take) -> LayerState:
        """What `describe` described; `take` gives the tensor of a name.

        Raises
        ------
        FormatError
            Naming the field or tensor that is not as `describe` writes it.
        """
        raise NotImplementedError

    def fill(self, layer: Any, device: torch.device) -> None:
        """Give an empty layer copies on `device`."""
        raise NotImplementedError

    @property
    def batch_sizes(self) -> set[int]:
        """Numbers of rows that the tensors have."""
        raise NotImplementedError

    @property
    def detail(self) -> int:
        """What layers of one kind may differ in."""
        return 0

    @property
    def capacity_needed(self) -> int:
        """Positions that a cache of fixed capacity must have room for."""
        return 0


@dataclass(frozen=True)
class CompressedState(LayerState):
    """Packed keys and values; None before the first token."""

    store: StoreState | None
    committed_tokens: int
    left_padding: list[int]

    @classmethod
    def describe(cls, layer: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """See `LayerState.describe`."""
        half = attention_half(layer)
        assert half is not None
        if not half.is_initialized:
            return {"holds_tokens": False}
        store = half.export_state()
        return {
            "holds_tokens": True,
            "committed_tokens": half.committed_tokens,
            "left_padding": half.left_padding,
            "store": store.describe(f"{path}.store", tensors),
        }

    @classmethod
    def read(cls, fields: Fields, take: Take) -> CompressedState:
        """See `LayerState.read`."""
        if not fields.flag("holds_tokens"):
            return cls(None, 0, [])
        committed = fields.integer("committed_tokens", 0, _MAX_INT)
        padding = fields.integers("left_padding", 0, _MAX_INT)
        store = StoreState.read(fields.object("store"), take)
        lengths = store.table.lengths
        if len(padding) != len(lengths):
            expected = f"{len(lengths)} counts, one for each row of the store"
            raise refused(f"{fields.path}.left_padding", expected, len(padding))
        for row, (start, length) in enumerate(zip(padding, lengths, strict=True)):
            if length != max(committed - start, 0):
                expected = f"{max(committed - start, 0)} tokens in row {row}"
                raise refused(f"{fields.path}.store.rows", expected, length)
        return cls(store, committed, padding)

    def fill(self, layer: Any, device: torch.device) -> None:
        """See `LayerState.fill`."""
        half = attention_half(layer)
        if half is not None and self.store is not None:
            half.hold(self.store, self.committed_tokens, self.left_padding, device)

    @property
    def batch_sizes(self) -> set[int]:
        """See `LayerState.batch_sizes`."""
        return {len(self.left_padding)} - {0}

    @property
    def capacity_needed(self) -> int:
        """See `LayerState.capacity_needed`."""
        return self.committed_tokens


@dataclass(frozen=True)
class KeysState(LayerState):
    """Keys and values of a stock `DynamicLayer`; None before the first token."""

    states: tuple[Tensor, Tensor] | None

    @classmethod
    def describe(cls, layer: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """See `LayerState.describe`."""
        if layer.is_initialized:
            tensors[f"{path}.keys"] = _host_copy(layer.keys)
            tensors[f"{path}.values"] = _host_copy(layer.values)
        return {"holds_tokens": bool(layer.is_initialized)}

    @classmethod
    def read(cls, fields: Fields, take: Take) -> KeysState:
        """See `LayerState.read`."""
        if not fields.flag("holds_tokens"):
            return cls(None)
        keys, values = (take(f"{fields.path}.{name}") for name in ("keys", "values"))
        if keys.dim() != 4 or not keys.is_floating_point():
            expected = "floating-point keys [batch, heads, tokens, head_dim]"
            raise refused(f"{fields.path}.keys", expected, (keys.dtype, *keys.shape))
        if values.dtype != keys.dtype or values.dim() != 4 or values.shape[:3] != keys.shape[:3]:
            expected = f"{keys.dtype} of the keys' batch, heads and tokens {tuple(keys.shape[:3])}"
            raise refused(f"{fields.path}.values", expected, (values.dtype, *values.shape))
        return cls((keys, values))

    def fill(self, layer: Any, device: torch.device) -> None:
        """See `LayerState.fill`."""
        if self.states is not None:
            keys, values = (part.to(device, copy=True) for part in self.states)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values

    @property
    def batch_sizes(self) -> set[int]:
        """See `LayerState.batch_sizes`."""
        return {part.shape[0] for part in self.states or ()}


@dataclass(frozen=True)
class SlidingState(LayerState):
    """A stock sliding-window layer: the latest of the tokens that it has seen."""

    keys: KeysState
    sliding_window: int
    tokens: int
    record_past: bool

    @classmethod
    def describe(cls, layer: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """See `LayerState.describe`."""
        return {
            "sliding_window": int(layer.sliding_window),
            "tokens": int(layer.cumulative_length),
            "record_past": bool(layer.record_past),
            **KeysState.describe(layer, path, tensors),
        }

    @classmethod
    def read(cls, fields: Fields, take: Take) -> SlidingState:
        """See `LayerState.read`."""
        window = fields.integer("sliding_window", 1, _MAX_INT)
        tokens = fields.integer("tokens", 0, _MAX_INT)
        record_past = fields.flag("record_past")
        keys = KeysState.read(fields, take)
        held = 0 if keys.states is None else keys.states[0].shape[2]
        least = min(tokens, window - 1)
        if not least <= held <= tokens:
            expected = f"{least} to {tokens} of {tokens} tokens with a window of {window}"
            raise FormatError(f"{fields.path}.keys: expected {expected}, got {held}")
        return cls(keys, window, tokens, record_past)

    def fill(self, layer: Any, device: torch.device) -> None:
        """See `LayerState.fill`."""
        self.keys.fill(layer, device)
        layer.cumulative_length, layer.record_past = self.tokens, self.record_past

    @property
    def batch_sizes(self) -> set[int]:
        """See `LayerState.batch_sizes`."""
        return self.keys.batch_sizes

    @property
    def detail(self) -> int:
        """The window."""
        return self.sliding_window


@dataclass(frozen=True)
class FixedSlidingState(LayerState):
    """A stock sliding-window layer of fixed capacity: its whole buffers, 0 where no token is."""

    keys: KeysState
    sliding_window: int
    tokens: int

    @classmethod
    def describe(cls, layer: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """See `LayerState.describe`."""
        described = KeysState.describe(layer, path, tensors)
        tokens = int(layer.cumulative_length_int)
        if described["holds_tokens"]:
            for name in ("keys", "values"):
                tensors[f"{path}.{name}"][:, :, tokens:] = 0
        return {"sliding_window": int(layer.max_cache_len), "tokens": tokens, **described}

    @classmethod
    def read(cls, fields: Fields, take: Take) -> FixedSlidingState:
        """See `LayerState.read`."""
        window = fields.integer("sliding_window", 1, _MAX_INT)
        tokens = fields.integer("tokens", 0, _MAX_INT)
        keys = KeysState.read(fields, take)
        slots = window if keys.states is None else keys.states[0].shape[2]
        if slots != window:
            raise refused(
                f"{fields.path}.keys", f"{window} slots, one a token of the window", slots
            )
        if keys.states is None and tokens > 0:
            raise refused(f"{fields.path}.tokens", "0, as the layer holds none", tokens)
        return cls(keys, window, tokens)

    def fill(self, layer: Any, device: torch.device) -> None:
        """See `LayerState.fill`."""
        if self.keys.states is None:
            return
        keys, values = self.keys.states
        layer.lazy_initialization(keys.to(device), values.to(device))
        held = min(self.tokens, self.sliding_window)
        layer.keys[:, :, :held] = keys[:, :, :held]
        layer.values[:, :, :held] = values[:, :, :held]
        layer.cumulative_length.fill_(held)
        layer.cumulative_length_int = self.tokens

    @property
    def batch_sizes(self) -> set[int]:
        """See `LayerState.batch_sizes`."""
        return self.keys.batch_sizes

    @property
    def detail(self) -> int:
        """The window, or the capacity where that is smaller."""
        return self.sliding_window

    @property
    def capacity_needed(self) -> int:
        """See `LayerState.capacity_needed`."""
        return max(self.sliding_window, self.tokens)


@dataclass(frozen=True)
class LinearState(LayerState):
    """Convolution and recurrent states of a stock linear-attention layer."""

    record_past: bool
    conv: list[Tensor | None]
    recurrent: list[Tensor | None]
    conv_kernel_size: list[int]
    has_previous_state: list[bool]

    @classmethod
    def describe(cls, layer: Any, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """See `LayerState.describe`."""
        states = []
        for i in range(layer.number_of_states):
            has_conv = bool(layer.is_conv_states_initialized[i])
            has_recurrent = bool(layer.is_recurrent_states_initialized[i])
            if has_conv:
                tensors[f"{path}.states.{i}.conv"] = _host_copy(layer.conv_states[i])
            if has_recurrent:
                tensors[f"{path}.states.{i}.recurrent"] = _host_copy(layer.recurrent_states[i])
            states.append(
                {
                    "conv": has_conv,
                    "recurrent": has_recurrent,
                    "conv_kernel_size": int(layer.conv_kernel_size[i] or 0),
                    "has_previous_state": bool(layer.has_previous_state[i]),
                }
            )
        return {"record_past": bool(layer.record_past), "states": states}

    @classmethod
    def read(cls, fields: Fields, take: Take) -> LinearState:
        """See `LayerState.read`."""
        result = cls(fields.flag("record_past"), [], [], [], [])
        for state in fields.objects("states"):
            for name, parts in (("conv", result.conv), ("recurrent", result.recurrent)):
                parts.append(_batched(f"{state.path}.{name}", take) if state.flag(name) else None)
            kernel = state.integer("conv_kernel_size", 0, _MAX_INT)
            conv = result.conv[-1]
            if conv is not None and not result.record_past and conv.shape[-1] != kernel:
                raise refused(f"{state.path}.conv_kernel_size", str(conv.shape[-1]), kernel)
            result.conv_kernel_size.append(kernel)
            result.has_previous_state.append(state.flag("has_previous_state"))
            state.finish()
        return result

    def fill(self, layer: Any, device: torch.device) -> None:
        """See `LayerState.fill`."""
        layer.record_past = self.record_past
        for i, (conv, recurrent) in enumerate(zip(self.conv, self.recurrent, strict=True)):
            if conv is not None:
                layer.conv_states[i] = conv.to(device, copy=True)
                layer.is_conv_states_initialized[i] = True
                layer.conv_kernel_size[i] = self.conv_kernel_size[i]
                layer.dtype, layer.device = conv.dtype, layer.conv_states[i].device
            if recurrent is not None:
                layer.recurrent_states[i] = recurrent.to(device, copy=True)
                layer.is_recurrent_states_initialized[i] = True
            layer.has_previous_state[i] = self.has_previous_state[i]

    @property
    def batch_sizes(self) -> set[int]:
        """See `LayerState.batch_sizes`."""
        return {state.shape[0] for state in (*self.conv, *self.recurrent) if state is not None}

    @property
    def detail(self) -> int:
        """The number of states."""
        return len(self.conv)


# What layers of a kind hold.
STATES_OF: Final[Mapping[str, tuple[type[LayerState], ...]]] = {
    "compressed": (CompressedState,),
    "compressed hybrid": (CompressedState, LinearState),
    "exact": (KeysState,),
    "exact hybrid": (KeysState, LinearState),
    "sliding": (SlidingState,),
    "fixed sliding": (FixedSlidingState,),
    "linear": (LinearState,),
    "nothing": (),
}


def _batched(name: str, take: Take) -> Tensor:
    tensor = take(name)
    if tensor.dim() < 2 or not tensor.is_floating_point():
        expected = "a floating-point tensor [batch, ...]"
        raise refused(name, expected, (tensor.dtype, *tensor.shape))
    return tensor


def _host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy that shares memory with nothing."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
