"""What the figures of all reports share."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["CODES_COLOUR", "EXACT_COLOUR", "PANELS_PER_ROW", "STYLE"]

EXACT_COLOUR: Final = "#8a8f98"
CODES_COLOUR: Final = "#2563a8"
PANELS_PER_ROW: Final = 3
STYLE: Final[dict[str, Any]] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "turboquant-cpp",  # the same figures give the same file
}
