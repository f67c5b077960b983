"""``turboquant-cpp eval``, also ``python -m turboquant_cpp.evaluation``."""

from __future__ import annotations

import argparse
from typing import Any

from turboquant_cpp.cli import arguments as options
from turboquant_cpp.cli.exit_codes import GATE_FAILED, SUCCESS, UserError, as_user_error
from turboquant_cpp.cli.measured import quality_fields, quality_row, size_fields, width_label

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--widths",
        type=options.widths,
        nargs="+",
        default=[(5, 4), (4, 4), (4, 2), (3, 3), (2, 2)],
        metavar="K+V",
        help="key and value bits of each cache",
    )
    parser.add_argument(
        "--gate",
        action="store_true",
        help="exit with 1 when a mean KL exceeds 1.25 times its reference figure (SmolLM2 on the "
        "repository's tests/data/prose.txt)",
    )
    options.add_text_argument(parser)
    options.add_attention_argument(parser)
    options.add_model_arguments(parser)
    options.add_recipe_arguments(parser)
    options.add_protocol_arguments(parser, windows=2, length=1024)
    options.add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure every cache in lockstep with the exact one; print and judge."""
    candidates = {}
    for k_bits, v_bits in arguments.widths:
        arguments.k_bits, arguments.v_bits = k_bits, v_bits
        candidates[width_label(k_bits, v_bits)] = options.cache_options(arguments)

    from turboquant_cpp.cli import console, report, session
    from turboquant_cpp.evaluation import TOLERANCE, Protocol, compare_caches, reference_kl

    with as_user_error():
        protocol = Protocol(arguments.windows, arguments.length, arguments.chunk)
    loaded = session.load(arguments)
    tokens = session.text_tokens(loaded, arguments.text)
    makers = {
        label: session.cache_maker(loaded, {**cache_options, "prefill": "quantized"})
        for label, cache_options in candidates.items()
    }
    with as_user_error(), console.progress_bar("Reading the text") as progress:
        quality = compare_caches(loaded.model, tokens, makers, protocol, progress=progress)

    table = console.new_table(
        f"{loaded.name}, {arguments.recipe}: {protocol.windows} x {protocol.window_tokens} tokens",
        *("cache", "KL", "99 %", "max", "ppl", "top-1", "MiB", "gate"),
    )
    rows: list[dict[str, Any]] = []
    passed = True
    for label, cache_options in candidates.items():
        cache = quality.caches[label]
        fields = quality_fields(cache)
        reference = reference_kl(cache_options["k_bits"], cache_options["v_bits"], arguments.recipe)
        gate = None
        if arguments.gate and reference is not None:
            gate = fields["kl"] <= TOLERANCE * reference  # False for NaN
            passed = passed and gate
        rows.append(
            {
                "label": label,
                **cache_options,
                **size_fields(cache.size),
                **fields,
                "kl_reference": reference if arguments.gate else None,
                "passed": gate,
            }
        )
        table.add_row(
            label,
            *quality_row(fields),
            f"{cache.size.total_bytes / 2**20:.2f}",
            "-" if gate is None else f"{'pass' if gate else 'FAIL'} ({reference:.4f})",
        )
    if arguments.gate and all(row["passed"] is None for row in rows):
        raise UserError("--gate: there is no reference figure for these widths and this recipe")
    console.output.print(table)
    if arguments.output:
        report.write_json(
            arguments.output,
            {
                "kind": "eval",
                "model": loaded.name,
                "text": str(arguments.text or "packaged passage"),
                "text_tokens": quality.text_tokens,
                "protocol": protocol,
                "attention": arguments.attention,
                "exact_cache_bytes": quality.exact_size.total_bytes,
                "caches": rows,
                "environment": report.environment(),
            },
        )
    return SUCCESS if passed else GATE_FAILED
