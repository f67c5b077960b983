"""``turboquant-cpp benchmark kernels --controls``: every control of the cache on and off."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from turboquant_cpp.cli.exit_codes import SUCCESS, as_user_error
from turboquant_cpp.cli.measured import width_label

if TYPE_CHECKING:  # the argument parser must not need torch
    import torch

__all__ = ["run"]


def run(arguments: argparse.Namespace, device: torch.device, place: str) -> int:
    """Time every control on every shape and width, print the ratios."""
    from turboquant_cpp.benchmark.controls import CONTROLS, time_control
    from turboquant_cpp.benchmark.kernels import Shape
    from turboquant_cpp.cli import console, report

    rows: list[dict[str, Any]] = []
    for batch, (query_heads, kv_heads), tokens, widths in itertools.product(
        arguments.batch, arguments.heads, arguments.tokens, arguments.widths
    ):
        shape = Shape(query_heads, kv_heads, arguments.head_dim, tokens, batch)
        label = width_label(*widths)
        table = console.new_table(
            f"{label} bits, {shape.label}, d={shape.head_dim}, {place}, {arguments.turns} turns",
            *("control", "on, us", "off, us", "on / off", "95 %", "bytes on / off"),
        )
        for control in CONTROLS:
            with as_user_error(), console.progress_bar(control.name) as progress:
                cost = time_control(
                    control,
                    shape,
                    widths,
                    device=device,
                    turns=arguments.turns,
                    progress=progress,
                )
            rows.append({**dataclasses.asdict(shape), "widths": label, **dataclasses.asdict(cost)})
            table.add_row(
                cost.control,
                *(f"{cost.on_microseconds:.1f}", f"{cost.off_microseconds:.1f}"),
                *(f"{cost.ratio:.3f}", f"{cost.low:.3f} to {cost.high:.3f}"),
                f"{cost.on_bytes / cost.off_bytes:.3f}",
            )
        console.output.print(table)
    if arguments.output:
        report.write_json(
            arguments.output,
            {
                "kind": "controls",
                "device": str(device),
                "place": place,
                "turns": arguments.turns,
                "controls": rows,
                "environment": report.environment(),
            },
        )
    return SUCCESS
