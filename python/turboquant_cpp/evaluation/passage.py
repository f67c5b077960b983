"""Texts to evaluate on."""

from __future__ import annotations

import importlib.resources
import pathlib

__all__ = ["default_passage", "read_text"]


def default_passage() -> str:
    """Return the packaged passage (8.7 KB on RAID, see ``data/README.md`` for source and licence).

    Examples
    --------
    >>> default_passage().startswith("RAID means Redundant Array of Independent Disks.")
    True
    """
    return (importlib.resources.files("turboquant_cpp") / "data" / "passage.txt").read_text("utf-8")


def read_text(path: str | pathlib.Path | None) -> str:
    """Read a UTF-8 text file; None means the packaged passage."""
    if path is None:
        return default_passage()
    text = pathlib.Path(path).read_text("utf-8")
    if not text.strip():
        raise ValueError(f"text: {path} is empty")
    return text
