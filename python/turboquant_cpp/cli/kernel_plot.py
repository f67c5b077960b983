"""The figure of ``benchmark kernels``: time of every kernel beside torch's, a panel a shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from turboquant_cpp.cli.plot_style import CODES_COLOUR, EXACT_COLOUR, PANELS_PER_ROW

__all__ = ["draw_kernels"]


def draw_kernels(report: Mapping[str, Any]) -> Figure:
    """Draw microseconds of each kernel and how many times faster than the first baseline ours are.

    Parameters
    ----------
    report : mapping
        What ``benchmark kernels --output`` wrote.
    """
    rows = report["decode"]
    shapes = list(dict.fromkeys(row["label"] for row in rows))
    names = report["baselines"]
    columns = min(len(shapes), PANELS_PER_ROW)
    lines = -(-len(shapes) // columns)
    kernels = len(rows) // len(shapes)
    figure = Figure(figsize=(4.2 * columns, lines * (0.3 * kernels + 1.2)), layout="constrained")
    for index, shape in enumerate(shapes, start=1):
        axis = figure.add_subplot(lines, columns, index)
        axis.set_title(f"{shape}, microseconds", loc="left")
        of_shape = [row for row in rows if row["label"] == shape]
        bars = axis.barh(
            [row["kernel"] for row in of_shape],
            [row["microseconds"] for row in of_shape],
            color=[EXACT_COLOUR if row["kernel"] in names else CODES_COLOUR for row in of_shape],
            height=0.6,
        )
        axis.bar_label(bars, [_text(row, names) for row in of_shape], padding=3)
        axis.margins(x=0.35)
        axis.invert_yaxis()
    return figure


def _text(row: Mapping[str, Any], names: list[str]) -> str:
    time = f"{row['microseconds']:.1f}"
    if row["kernel"] in names:
        return time
    return f"{time}  ({row['times'][names[0]]:.2f}x)"
