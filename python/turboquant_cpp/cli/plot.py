"""``turboquant-cpp plot``: the figure of a JSON report."""

from __future__ import annotations

import argparse
import pathlib

from turboquant_cpp.cli.exit_codes import SUCCESS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "report",
        type=pathlib.Path,
        help="JSON written by demo, eval, verify or benchmark kernels",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="STEM",
        help="path without suffix; default: beside the report",
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw, save and name the files."""
    from turboquant_cpp.cli import plots
    from turboquant_cpp.cli.report import read_json

    figure = plots.draw(read_json(arguments.report))
    for path in plots.save(figure, arguments.output or arguments.report.with_suffix("")):
        print(path)
    return SUCCESS
