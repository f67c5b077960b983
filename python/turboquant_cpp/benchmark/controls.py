"""What each control of a cache costs decode attention: the same call with the control on and off.

The two sides of a control take turns, and the ratio is taken turn by turn, so that a disturbance
meets both. On a CPU the processor's time is counted, not the clock's: what other programs take does
not count, but for the caches and the memory they share.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from turboquant_cpp.benchmark.kernels import (
    Shape,
    layers_to_rotate,
    packed_layers,
    random_states,
    take_turns,
)
from turboquant_cpp.spec import CacheConfig

__all__ = ["CONTROLS", "Control", "ControlCost", "median_ratio", "time_control"]


@dataclasses.dataclass(frozen=True)
class Control:
    """A control and the two caches that differ in it alone.

    Attributes
    ----------
    name : str
        What a table calls it.
    on, off : mapping
        Options of `CacheConfig` beside the widths.
    """

    name: str
    on: Mapping[str, Any]
    off: Mapping[str, Any]


_WINDOW_ALONE: Final = {"center_keys": False, "smooth_keys": False}
_EXACT_TOKENS_ALONE: Final = {
    **_WINDOW_ALONE,
    "k_scale_rule": "norm",
    "v_scale_rule": "norm",
    "scale_dtype": "float32",
}

#: The recipe's controls, each switched off in the recipe, and all that hold no exact tokens at
#: once. The window is compared without centring and smoothing, which need one.
CONTROLS: Final = (
    Control("center_keys", {}, {"center_keys": False}),
    Control("smooth_keys", {}, {"smooth_keys": False}),
    Control("k_scale_rule", {}, {"k_scale_rule": "norm"}),
    Control("v_scale_rule", {}, {"v_scale_rule": "norm"}),
    Control("scale_dtype", {}, {"scale_dtype": "float32"}),
    Control("all of these", {}, _EXACT_TOKENS_ALONE),
    Control("sink_tokens", {}, {"sink_tokens": 0}),
    Control("window_tokens", _WINDOW_ALONE, {"window_tokens": 0}),
)


@dataclasses.dataclass(frozen=True)
class ControlCost:
    """Times of one control.

    Attributes
    ----------
    control : str
        Its name.
    on_microseconds, off_microseconds : float
        Median time of a call.
    ratio : float
        Median over the turns of time with the control over time without it.
    low, high : float
        Ends of that median's 95 % confidence interval.
    on_bytes, off_bytes : int
        Bytes of keys and values that a call reads.
    """

    control: str
    on_microseconds: float
    off_microseconds: float
    ratio: float
    low: float
    high: float
    on_bytes: int
    off_bytes: int


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, ...]:
    """Median of the ratios of pairs, and the ends of its 95 % confidence interval.

    The interval needs no assumption about how times are distributed: the number of ratios below the
    true median is binomial, so two of the sorted ratios hold it between them (the ranks by the
    normal approximation). Fewer than six pairs cannot exclude anything: all of their range.

    Examples
    --------
    >>> median_ratio([1.0, 3.0, 5.0], [1.0, 2.0, 2.0])
    (1.5, 1.0, 2.5)
    """
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    count = len(ratios)
    rank = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    return statistics.median(ratios), ratios[rank], ratios[count - 1 - rank]


def time_control(
    control: Control,
    shape: Shape,
    widths: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    turns: int = 15,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ControlCost:
    """Time one query token over caches of `shape` with a control on and off.

    Parameters
    ----------
    control : Control
        One of `CONTROLS`, or another pair.
    shape : Shape
        Rows, heads, head_dim and tokens.
    widths : (int, int)
        Key and value bits of both caches.
    device : torch.device or str
        CPU (float32 caches) or CUDA (bfloat16 ones).
    turns : int
        Rounds in which both sides run through their layers once, in alternating order.
    progress : callable, optional
        Called with (turns done, `turns`).

    Returns
    -------
    ControlCost
    """
    device = torch.device(device)
    k_bits, v_bits = widths
    layers = layers_to_rotate(shape, k_bits + v_bits, device)
    configs = {
        name: CacheConfig(k_bits=k_bits, v_bits=v_bits, **options)
        for name, options in (("on", control.on), ("off", control.off))
    }
    sides = packed_layers(configs, layers, random_states(shape, device))
    runs = {name: side.run for name, side in sides.items()}
    seconds = take_turns(runs, device, turns, progress, clock=time.process_time)
    ratio, low, high = median_ratio(seconds["on"], seconds["off"])
    on, off = (1e6 * statistics.median(seconds[name]) / side.calls for name, side in sides.items())
    return ControlCost(
        control.name, on, off, ratio, low, high, sides["on"].nbytes, sides["off"].nbytes
    )
