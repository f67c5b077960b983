"""Rows of a report and of a table: one cache each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # evaluation needs torch, the argument parser must not
    from turboquant_cpp.evaluation import CacheReport, CacheSize, Interval

__all__ = [
    "interval_row",
    "interval_title",
    "quality_fields",
    "quality_row",
    "size_fields",
    "width_label",
]

_KL_BIN_POSITIONS = 32


def width_label(k_bits: int, v_bits: int) -> str:
    """Name a cache by its widths.

    Examples
    --------
    >>> width_label(4, 2)
    '4+2'
    """
    return f"{k_bits}+{v_bits}"


def size_fields(size: CacheSize) -> dict[str, Any]:
    """Fields of a report about a cache's size."""
    return {"cache_bytes": size.total_bytes, "cache_bytes_by_part": size.parts}


def quality_fields(report: CacheReport) -> dict[str, Any]:
    """Fields of a report about a cache's quality; KL also along the window, in bins."""
    divergence = report.divergence
    by_position = [sum(values) / len(values) for values in zip(*report.kl, strict=True)]
    bins = [
        by_position[start : start + _KL_BIN_POSITIONS]
        for start in range(0, len(by_position), _KL_BIN_POSITIONS)
    ]
    intervals = report.intervals
    return {
        "positions": divergence.positions,
        "kl": divergence.kl_mean,
        "kl_interval": _ends(intervals.kl_mean),
        "kl_p99": divergence.kl_p99,
        "kl_max": divergence.kl_max,
        "top1_agreement": divergence.top1_agreement,
        "perplexity_exact": divergence.perplexity_exact,
        "perplexity": divergence.perplexity,
        "perplexity_change_percent": divergence.perplexity_change_percent,
        "perplexity_change_percent_interval": _ends(intervals.perplexity_change_percent),
        "kl_along_window": [sum(values) / len(values) for values in bins],
    }


def interval_title(report: CacheReport) -> str:
    """Say in a table's title what the ranges under its figures are."""
    intervals = report.intervals
    if intervals.kl_mean is None:
        return "too short for confidence intervals"
    return (
        f"below figures their 95 % range by bootstrap over {intervals.units} {intervals.resampled}"
    )


def interval_row(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of `quality_row` with the intervals in a second line."""
    kl, p99, largest, perplexity, top1 = quality_row(fields)
    return (
        _with_range(kl, fields["kl_interval"], "{:.2g}"),
        p99,
        largest,
        _with_range(perplexity, fields["perplexity_change_percent_interval"], "{:+.1f}"),
        top1,
    )


def quality_row(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Cells: mean KL, 99th percentile, maximum, perplexity change, top-1 agreement."""
    return (
        f"{fields['kl']:.4f}",
        f"{fields['kl_p99']:.4f}",
        f"{fields['kl_max']:.3f}",
        f"{fields['perplexity_change_percent']:+.2f} %",
        f"{100 * fields['top1_agreement']:.1f} %",
    )


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)


def _with_range(cell: str, ends: tuple[float, float] | None, form: str) -> str:
    return cell if ends is None else f"{cell}\n{form.format(ends[0])}/{form.format(ends[1])}"
