"""What a store asks of its arguments, so that a message names what is wrong."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turboquant_cpp import ops
from turboquant_cpp._core import CUDA_MAX_HEAD_DIM, LayerSpec
from turboquant_cpp.spec import as_integer

__all__ = [
    "check_has_heads",
    "check_is_tensor",
    "check_numbers",
    "checked_device",
    "checked_integers",
    "checked_lengths",
    "checked_rows",
    "tensor_kind",
]


def checked_device(device: torch.device | str, spec: LayerSpec) -> torch.device:
    """`device` with its index, as tensors there name it."""
    device = torch.device(device)
    supported = ops.device_types()
    if device.type not in supported:
        raise ValueError(
            f"device: expected one of {', '.join(supported)} (what this build has kernels "
            f"for), got {device}"
        )
    if device.type != "cuda":
        return device
    if spec.head_dim > CUDA_MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim: expected at most {CUDA_MAX_HEAD_DIM} on CUDA devices, got {spec.head_dim}"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def tensor_kind(value: object) -> tuple[Any, ...]:
    """What decides whether a tensor fits an operator, beside the numbers in it."""
    if not isinstance(value, Tensor):
        return (type(value),)
    return value.shape, value.dtype, value.device, value.layout


def check_is_tensor(name: str, value: object) -> None:
    """Refuse what is no dense tensor."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        given = value.layout if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a dense torch tensor, got {given}")


def check_has_heads(name: str, states: Tensor) -> None:
    """Refuse what is not shaped like keys of several heads."""
    if states.dim() != 4:
        raise ValueError(
            f"{name}: expected 4 dimensions [batch, heads, tokens, head_dim], got shape "
            f"{tuple(states.shape)}"
        )


def check_numbers(scaling: float, softcap: float, sliding_window: int) -> None:
    """Refuse numbers that attention has no meaning for."""
    if (
        type(scaling) is float
        and type(softcap) is float
        and type(sliding_window) is int
        and math.isfinite(scaling)
        and 0 <= softcap < math.inf
        and sliding_window >= 0
    ):
        return
    for name, value in (("scaling", scaling), ("softcap", softcap)):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if softcap < 0:
        raise ValueError(f"softcap: expected 0 (none) or a positive number, got {softcap}")
    if as_integer("sliding_window", sliding_window) < 0:
        raise ValueError(f"sliding_window: expected 0 (none) or more, got {sliding_window}")


def checked_integers(name: str, values: Iterable[int] | Tensor) -> list[int]:
    """A list of integers, one for each row; numbers that would have to be rounded are refused."""
    if type(values) is list and all(type(value) is int for value in values):
        return values
    numbers_given = values.tolist() if isinstance(values, Tensor) else values
    if not isinstance(numbers_given, Iterable):
        raise ValueError(f"{name}: expected a sequence of integers, got {values!r}")
    return [as_integer(f"{name}[{i}]", value) for i, value in enumerate(numbers_given)]


def checked_lengths(new_lengths: int | Sequence[int], lengths: list[int]) -> list[int]:
    """What rows of these lengths are cropped to: one length for all of them, or one a row."""
    if isinstance(new_lengths, (int, np.integer)):
        new_lengths = int(new_lengths)
        if new_lengths < 0:
            raise ValueError(f"new_lengths: expected at least 0, got {new_lengths}")
        return [min(new_lengths, length) for length in lengths]
    wanted = checked_integers("new_lengths", new_lengths)
    if len(wanted) != len(lengths):
        raise ValueError(f"new_lengths: expected {len(lengths)} lengths, got {len(wanted)}")
    for row, (new, old) in enumerate(zip(wanted, lengths, strict=True)):
        if not 0 <= new <= old:
            raise ValueError(f"new_lengths[{row}]: expected 0 to {old}, got {new}")
    return wanted


def checked_rows(indices: Iterable[int] | Tensor, batch_size: int) -> list[int]:
    """Rows to select, at least one."""
    rows = checked_integers("indices", indices)
    if not rows:
        raise ValueError("indices: expected at least one row, got none")
    for i, row in enumerate(rows):
        if not 0 <= row < batch_size:
            raise ValueError(f"indices[{i}]: expected a row of 0 to {batch_size - 1}, got {row}")
    return rows
