"""Confidence intervals of the evaluation's means: a percentile bootstrap over pieces of text."""

from __future__ import annotations

import dataclasses
import math

import torch

__all__ = ["Interval", "Intervals", "bootstrap_intervals"]

#: Share of resamples inside an interval.
_CONFIDENCE = 0.95
_RESAMPLES = 2000
_SEED = 0
#: With n windows all resampled means lie between the smallest and the largest window's, a range
#: that misses the median with probability 2 ** (1 - n): 50 % of the time with two windows, 3 % with
#: six. Below six, blocks of positions are resampled instead.
_FEWEST_WINDOWS = 6
#: Neighbouring positions share their context, so they are drawn together (Künsch, 1989).
_BLOCK_POSITIONS = 64


@dataclasses.dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval.

    Attributes
    ----------
    low, high : float
        Its ends, in the unit of the figure. NaN where the figure is.
    """

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Intervals of one cache's figures and what was resampled to find them.

    Attributes
    ----------
    resampled : str
        ``"windows"``, or ``"blocks of 64 positions"`` when there are fewer than six windows.
    units : int
        How many of them there are.
    kl_mean : Interval or None
        Mean KL divergence, nats per token. None when there are fewer than two units.
    perplexity_change_percent : Interval or None
        Change of perplexity against the exact cache, percent. Both caches read the same resampled
        text, so what makes a text hard cancels.
    """

    resampled: str
    units: int
    kl_mean: Interval | None
    perplexity_change_percent: Interval | None


def bootstrap_intervals(
    kl: torch.Tensor, nll_exact: torch.Tensor, nll_cache: torch.Tensor
) -> Intervals:
    """Find 95 % intervals by the percentile bootstrap (Efron, 1979), from a fixed seed.

    Windows are drawn with replacement, or blocks of 64 positions when the windows are few. Either
    speaks for texts like the one that was read, not for other texts.

    Parameters
    ----------
    kl : torch.Tensor
        ``[windows, positions]``, KL divergence in nats.
    nll_exact, nll_cache : torch.Tensor
        ``[windows, targets]``, negative log-likelihood of the next token in nats.

    Returns
    -------
    Intervals

    Examples
    --------
    >>> flat = torch.ones(8, 100)
    >>> bootstrap_intervals(0.5 * flat, flat, flat)
    Intervals(resampled='windows', units=8, kl_mean=Interval(low=0.5, high=0.5), \
perplexity_change_percent=Interval(low=0.0, high=0.0))
    """
    by_window = kl.shape[0] >= _FEWEST_WINDOWS
    change = nll_cache.double() - nll_exact.double()
    kl_units, change_units = (
        list(rows.double())
        if by_window
        else [block for row in rows.double() for block in row.split(_BLOCK_POSITIONS)]
        for rows in (kl, change)
    )
    log_ratio = _interval_of_mean(change_units)
    return Intervals(
        resampled="windows" if by_window else f"blocks of {_BLOCK_POSITIONS} positions",
        units=len(kl_units),
        kl_mean=_interval_of_mean(kl_units),
        # Percentiles pass through a rising function, so the mean's serve for the perplexity.
        perplexity_change_percent=log_ratio
        and Interval(_percent_change(log_ratio.low), _percent_change(log_ratio.high)),
    )


def _interval_of_mean(units: list[torch.Tensor]) -> Interval | None:
    """Interval of the mean over all positions; units may differ in length."""
    if len(units) < 2:
        return None
    sums = torch.stack([unit.sum() for unit in units])
    counts = torch.tensor([len(unit) for unit in units], dtype=torch.float64)
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(len(units), (_RESAMPLES, len(units)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return Interval(low, high)


def _percent_change(log_ratio: float) -> float:
    return 100.0 * math.expm1(log_ratio) if log_ratio < 700.0 else math.inf  # expm1 ends at 709.8
