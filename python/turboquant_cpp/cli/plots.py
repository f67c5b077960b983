"""One figure per report: size, speed and quality of every cache, as PNG and SVG."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from turboquant_cpp.cli.exit_codes import UserError
from turboquant_cpp.cli.kernel_plot import draw_kernels
from turboquant_cpp.cli.needle_plot import draw_needles
from turboquant_cpp.cli.plot_style import CODES_COLOUR, EXACT_COLOUR, PANELS_PER_ROW, STYLE

__all__ = ["draw", "save"]

_WINDOW_COLOUR = "#9cc3e6"
#: Transformers' own caches, by what their rows call ``backend``.
_RIVAL_COLOURS = {"quanto": "#d97706", "hqq": "#2f8f5b", "fp8": "#8b5cb5"}
#: Where labels of points stand, so that rivals of equal size do not write over each other.
_LABEL_PLACES = {
    "quanto": ((-5, 4), "right"),
    "hqq": ((-5, -9), "right"),
    "fp8": ((-5, -9), "right"),
}
#: Where the whole past is still exact only rounding is left, many decades below any effect.
_SMALLEST_SHOWN_KL = 1e-6


def draw(report: Mapping[str, Any]) -> Figure:
    """Draw the panels for which a report has figures.

    Parameters
    ----------
    report : mapping
        A report with a list ``caches``, one mapping per cache with a ``label`` and any of
        ``cache_bytes``, ``tokens_per_s``, ``kl``, ``top1_agreement``, ``kl_along_window``,
        ``bytes_per_token`` (drawn against ``kl``). Of ``eval --needle``: heat maps; of ``benchmark
        kernels``: times.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> figure = draw({"caches": [{"label": "4+4", "kl": 0.0015, "cache_bytes": 1000}]})
    >>> [axes.get_title("left") for axes in figure.axes]
    ['Cache size, MiB', 'KL divergence, nats per token']
    """
    if report.get("kind") == "kernels":
        with mpl.rc_context(STYLE):
            return draw_kernels(report)
    rows = report.get("caches")
    if not isinstance(rows, list) or not rows or not all("label" in row for row in rows):
        raise UserError(
            'the report has no "caches" to plot: give the JSON of demo, eval, verify '
            "or benchmark kernels"
        )
    if report.get("kind") == "needle":
        with mpl.rc_context(STYLE):
            return draw_needles(report)
    panels = [panel for panel in _PANELS if any(row.get(panel[0]) is not None for row in rows)]
    if not panels:
        raise UserError("the report's caches have no figures to plot")
    with mpl.rc_context(STYLE):
        columns = min(len(panels), PANELS_PER_ROW)
        lines = -(-len(panels) // columns)
        height = lines * max(2.2, 0.4 * len(rows) + 1.2)
        figure = Figure(figsize=(3.8 * columns, height), layout="constrained")
        for index, (field, title, paint) in enumerate(panels, start=1):
            axis = figure.add_subplot(lines, columns, index)
            axis.set_title(title, loc="left")
            paint(axis, [row for row in rows if row.get(field) is not None])
        if report.get("model"):
            figure.suptitle(str(report["model"]), x=0.01, ha="left", fontsize=11)
    return figure


def save(figure: Figure, stem: pathlib.Path) -> list[pathlib.Path]:
    """Write ``stem.png`` and ``stem.svg`` and return their paths."""
    written = []
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            for suffix, options in ((".png", {"dpi": 160}), (".svg", {"metadata": {"Date": None}})):
                path = stem.with_name(stem.name + suffix)
                figure.savefig(path, **options)
                written.append(path)
    except OSError as error:
        raise UserError(f"cannot write the plot: {error}") from error
    return written


def _bars(axis: Any, rows: Sequence[Mapping[str, Any]], values: Sequence[float], form: str) -> None:
    colours = [EXACT_COLOUR if row["label"] == "exact" else _colour(row) for row in rows]
    bars = axis.barh([row["label"] for row in rows], values, color=colours, height=0.6)
    axis.bar_label(bars, [form.format(value) for value in values], padding=3)
    axis.margins(x=0.25)
    axis.invert_yaxis()


def _colour(row: Mapping[str, Any]) -> str:
    return _RIVAL_COLOURS.get(row.get("backend", ""), CODES_COLOUR)


def _size(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    totals = [row["cache_bytes"] / 2**20 for row in rows]
    _bars(axis, rows, totals, "{:.1f}")
    exact = [
        row.get("cache_bytes_by_part", {}).get("exact", 0) / 2**20 if row["label"] != "exact" else 0
        for row in rows
    ]
    if any(exact):
        left = [total - part for total, part in zip(totals, exact, strict=True)]
        axis.barh(
            [row["label"] for row in rows],
            exact,
            left=left,
            color=_WINDOW_COLOUR,
            height=0.6,
            label="of it: exact recent tokens",
        )
        # Below the axis, where no bar can be in its way.
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.08), frameon=False, fontsize=8)


def _speed(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    _bars(axis, rows, [row["tokens_per_s"] for row in rows], "{:.1f}")


def _divergence(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    _bars(axis, rows, [row["kl"] for row in rows], "{:.4f}")


def _agreement(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    _bars(axis, rows, [100 * row["top1_agreement"] for row in rows], "{:.1f}")


def _along_window(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        values = row["kl_along_window"]
        ends = [(index + 1) / len(values) for index in range(len(values))]
        axis.plot(ends, values, label=row["label"], linewidth=1.2)
    if any(value and value > 0 for row in rows for value in row["kl_along_window"]):
        axis.set_yscale("log")
        axis.set_ylim(bottom=_SMALLEST_SHOWN_KL)
    axis.set_xlabel("share of the window read")
    axis.legend(frameon=False, fontsize=8)


def _trade(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Quality against size, one line per family; ranges are the 95 % intervals."""
    rows = [row for row in rows if (row.get("kl") or 0) > 0]
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["bytes_per_token"], -row["kl"])):
        families.setdefault(row.get("backend", "TurboQuant"), []).append(row)
    for family, members in families.items():
        sizes = [row["bytes_per_token"] / 1024 for row in members]
        kl = [row["kl"] for row in members]
        ends = [row.get("kl_interval") or (row["kl"], row["kl"]) for row in members]
        axis.errorbar(
            sizes,
            kl,
            yerr=[
                [max(value - low, 0) for value, (low, _) in zip(kl, ends, strict=True)],
                [max(high - value, 0) for value, (_, high) in zip(kl, ends, strict=True)],
            ],
            color=_colour(members[0]),
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=0.9,
            capsize=2,
            label=family,
        )
        offset, side = _LABEL_PLACES.get(family, ((5, 3), "left"))
        for row, x, y in zip(members, sizes, kl, strict=True):
            axis.annotate(
                row["label"],
                (x, y),
                xytext=offset,
                textcoords="offset points",
                ha=side,
                fontsize=8,
                color=_colour(row),
            )
    axis.set_yscale("log")
    axis.margins(x=0.3, y=0.1)
    axis.set_xlabel("KiB per token, all layers; exact tokens included")
    axis.grid(axis="y", linewidth=0.4, alpha=0.5)
    axis.legend(loc="upper right", frameon=False, fontsize=8)


# Field that must be there, title, painter.
_PANELS = (
    ("cache_bytes", "Cache size, MiB", _size),
    ("tokens_per_s", "Decode speed, tokens per second", _speed),
    ("kl", "KL divergence, nats per token", _divergence),
    ("top1_agreement", "Top-1 agreement, %", _agreement),
    ("bytes_per_token", "KL divergence against size", _trade),
    ("kl_along_window", "KL divergence along the text", _along_window),
)
