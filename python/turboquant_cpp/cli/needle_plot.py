"""The heat maps of ``eval --needle``: one per cache, depth against length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from turboquant_cpp.cli.plot_style import PANELS_PER_ROW

__all__ = ["draw_needles"]

#: Nats at which the colours end: the number is then as likely as one of a thousand.
_WORST = -math.log(1000.0)
#: Below this the cell is dark and its text light.
_DARK_BELOW = 0.55 * _WORST


def draw_needles(report: Mapping[str, Any]) -> Figure:
    """Draw the log-probability of the hidden number, and the share of needles found as text.

    Parameters
    ----------
    report : mapping
        A report of ``eval --needle``: ``caches``, each with ``label`` and ``cells``.

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows = report["caches"]
    columns = min(len(rows), PANELS_PER_ROW)
    lines = -(-len(rows) // columns)
    lengths = sorted({cell["length"] for cell in rows[0]["cells"]})
    depths = sorted({cell["depth"] for cell in rows[0]["cells"]})
    size = (1.6 + columns * max(2.2, 0.62 * len(lengths)), 0.9 + lines * (0.9 + 0.34 * len(depths)))
    figure = Figure(figsize=size, layout="constrained")
    image: Any = None
    for index, row in enumerate(rows, start=1):
        axis = figure.add_subplot(lines, columns, index)
        axis.set_title(row["label"], loc="left")
        grid = [[math.nan] * len(lengths) for _ in depths]
        for cell in row["cells"]:
            x, y = lengths.index(cell["length"]), depths.index(cell["depth"])
            value = cell["log_probability"]
            if value is None:  # not finite: the cell stays empty
                continue
            grid[y][x] = value
            axis.text(
                x,
                y,
                f"{100 * cell['retrieved']:.0f} %",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < _DARK_BELOW else "#1f2933",
            )
        image = axis.imshow(grid, aspect="auto", cmap="YlGnBu_r", norm=Normalize(_WORST, 0.0))
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        if (index - 1) % columns == 0:
            axis.set_ylabel("depth of the needle")
        if index > len(rows) - columns:
            axis.set_xlabel("tokens read")
    bar = figure.colorbar(image, ax=figure.axes, extend="min", shrink=0.8)
    bar.set_label("log-probability of the number, nats", fontsize=8)
    bar.outline.set_visible(False)
    title = "Needles found, %"
    if report.get("model"):
        title = f"{report['model']}: {title}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure
