"""``turboquant-cpp eval --needle``: numbers hidden in a text, asked for through every cache."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from turboquant_cpp.cli import console, report, session
from turboquant_cpp.cli.candidates import Candidate, check_steps
from turboquant_cpp.cli.exit_codes import SUCCESS, as_user_error
from turboquant_cpp.evaluation import NeedleCell, NeedleProtocol, find_needles

__all__ = ["run"]


def run(arguments: argparse.Namespace, candidates: Mapping[str, Candidate]) -> int:
    """Hide, read, ask; print one row per cache."""
    with as_user_error():
        protocol = NeedleProtocol(
            arguments.lengths,
            arguments.depths,
            arguments.repeats,
            arguments.chunk,
            batch_needles=arguments.batch,
        )
    check_steps(candidates, chunk=[protocol.chunk_tokens], lengths=protocol.lengths)
    loaded = session.load(arguments)
    tokens = session.text_tokens(loaded, arguments.text)
    makers = {label: candidate.maker(loaded) for label, candidate in candidates.items()}
    with as_user_error(), console.progress_bar("Looking for needles") as progress:
        cells = find_needles(
            loaded.model, loaded.tokenizer, tokens, makers, protocol, progress=progress
        )
    _print(f"{loaded.name}, {arguments.recipe}", protocol, cells)
    if arguments.output:
        fields = {label: candidate.fields for label, candidate in candidates.items()}
        report.write_json(
            arguments.output,
            {
                "kind": "needle",
                "model": loaded.name,
                "text": str(arguments.text or "packaged passage"),
                "text_tokens": len(tokens),
                "protocol": protocol,
                "attention": arguments.attention,
                "exact_chunk": arguments.exact_chunk,
                "caches": [
                    {"label": label, **fields.get(label, {}), "cells": found}
                    for label, found in cells.items()
                ],
                "environment": report.environment(),
            },
        )
    return SUCCESS


def _print(
    subject: str, protocol: NeedleProtocol, cells: Mapping[str, Sequence[NeedleCell]]
) -> None:
    count = len(protocol.lengths) * len(protocol.depths) * protocol.repeats
    table = console.new_table(
        f"{subject}: {count} needles, texts of {_listed(protocol.lengths)} tokens",
        *("cache", "found", "greedy", "log-probability", "worst"),
    )
    table.caption = (
        "found: the number beats 200 others; greedy: it beats every token; "
        "log-probability of the number in nats: mean, and of the worst length and depth"
    )
    table.caption_justify = "left"
    for label, found in cells.items():
        table.add_row(
            label,
            _percent(cell.retrieved for cell in found),
            _percent(cell.greedy for cell in found),
            f"{statistics.fmean(cell.log_probability for cell in found):.3f}",
            f"{min(cell.log_probability for cell in found):.3f}",
        )
    console.output.print(table)


def _percent(shares: Any) -> str:
    return f"{100 * statistics.fmean(shares):.0f} %"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)
