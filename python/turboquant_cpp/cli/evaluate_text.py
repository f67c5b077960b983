"""``turboquant-cpp eval`` on a text: divergence of every cache from the exact one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from turboquant_cpp.cli import console, report, session
from turboquant_cpp.cli.candidates import Candidate, check_steps
from turboquant_cpp.cli.exit_codes import GATE_FAILED, SUCCESS, UserError, as_user_error
from turboquant_cpp.cli.measured import interval_row, interval_title, quality_fields, size_fields
from turboquant_cpp.evaluation import (
    TOLERANCE,
    Protocol,
    QualityReport,
    compare_caches,
    reference_kl,
)

__all__ = ["run"]


def run(arguments: argparse.Namespace, candidates: Mapping[str, Candidate]) -> int:
    """Measure every cache in lockstep with the exact one; print and judge."""
    with as_user_error():
        protocol = Protocol(
            arguments.windows, arguments.length, arguments.chunk, arguments.batch, arguments.lead
        )
    check_steps(
        candidates,
        chunk=[protocol.chunk_tokens],
        length=[protocol.window_tokens],
        lead=[protocol.lead_tokens],
    )
    references = {
        label: _reference(candidate, arguments.recipe) if arguments.gate else None
        for label, candidate in candidates.items()
    }
    if arguments.gate and all(reference is None for reference in references.values()):
        raise UserError("--gate: there is no reference figure for these widths and this recipe")
    loaded = session.load(arguments)
    tokens = session.text_tokens(loaded, arguments.text)
    makers = {label: candidate.maker(loaded) for label, candidate in candidates.items()}
    with as_user_error(), console.progress_bar("Reading the text") as progress:
        quality = compare_caches(loaded.model, tokens, makers, protocol, progress=progress)

    rows = [
        _row(label, candidate, quality, references[label])
        for label, candidate in candidates.items()
    ]
    _print(f"{loaded.name}, {arguments.recipe}", quality, rows)
    if arguments.output:
        intervals = next(iter(quality.caches.values())).intervals
        report.write_json(
            arguments.output,
            {
                "kind": "eval",
                "model": loaded.name,
                "text": str(arguments.text or "packaged passage"),
                "text_tokens": quality.text_tokens,
                "protocol": protocol,
                "attention": arguments.attention,
                "exact_chunk": arguments.exact_chunk,
                "intervals": {
                    "confidence": 0.95,
                    "resampled": intervals.resampled,
                    "units": intervals.units,
                },
                "exact_cache_bytes": quality.exact_size.total_bytes,
                "exact_bytes_per_token": quality.exact_size.total_bytes / protocol.window_tokens,
                "caches": rows,
                "environment": report.environment(),
            },
        )
    return GATE_FAILED if any(row["passed"] is False for row in rows) else SUCCESS


def _reference(candidate: Candidate, recipe: str) -> float | None:
    fields = candidate.fields
    if "k_bits" not in fields:
        return None
    return reference_kl(fields["k_bits"], fields["v_bits"], recipe, fields["codebook"])


def _row(
    label: str, candidate: Candidate, quality: QualityReport, reference: float | None
) -> dict[str, Any]:
    cache = quality.caches[label]
    fields = quality_fields(cache)
    return {
        "label": label,
        **candidate.fields,
        **size_fields(cache.size),
        "bytes_per_token": cache.bytes_per_token,
        **fields,
        "kl_reference": reference,
        # False for NaN.
        "passed": None if reference is None else fields["kl"] <= TOLERANCE * reference,
    }


def _print(subject: str, quality: QualityReport, rows: list[dict[str, Any]]) -> None:
    protocol, exact = quality.protocol, quality.exact_size
    gated = any(row["passed"] is not None for row in rows)
    table = console.new_table(
        f"{subject}: {protocol.windows} x {protocol.window_tokens} tokens; "
        + interval_title(next(iter(quality.caches.values()))),
        *("cache", "KL", "99 %", "max", "ppl", "top-1", "B/tok"),
        *(["gate"] if gated else []),
    )
    bytes_per_token = exact.total_bytes / protocol.window_tokens
    table.caption = f"B/tok: bytes per token; the exact cache takes {bytes_per_token:,.0f}"
    table.caption_justify = "left"
    for column in table.columns:
        column.overflow = "fold"  # a range must not lose digits on a narrow terminal
    for row in rows:
        cells = [row["label"], *interval_row(row), f"{row['bytes_per_token']:,.0f}"]
        if gated:
            verdict = {None: "-", True: "pass", False: "FAIL"}[row["passed"]]
            reference = row["kl_reference"]
            cells.append(verdict if reference is None else f"{verdict} ({reference:.4f})")
        table.add_row(*cells)
    console.output.print(table)
