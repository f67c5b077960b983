"""``turboquant-cpp verify``: a verdict on a model's own keys and values at given widths."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from turboquant_cpp.cli import arguments as options
from turboquant_cpp.cli.exit_codes import GATE_FAILED, SUCCESS, UserError, as_user_error
from turboquant_cpp.cli.measured import quality_fields, quality_row, size_fields, width_label

__all__ = ["add_arguments", "run"]

_DEFAULT_LENGTH = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options; --model, --bits to --json are the original package's."""
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.02,
        help="largest mean KL divergence that passes, in nats per token",
    )
    parser.add_argument(
        "--min-top1", type=float, default=0.9, help="smallest top-1 agreement that passes, 0 to 1"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="say what --policy auto decided for each layer, and why",
    )
    options.add_text_argument(parser)
    options.add_attention_argument(parser)
    options.add_model_arguments(parser)
    options.add_width_arguments(parser)
    options.add_recipe_arguments(parser)
    options.add_protocol_arguments(parser, windows=1, length=_DEFAULT_LENGTH)
    options.add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the model on text, judge its keys and values, print the verdict."""
    cache_options = options.cache_options(arguments)
    if arguments.explain and arguments.policy != "auto":
        raise UserError("--explain: expected --policy auto, which decides; got another")

    from turboquant_cpp import CacheConfig
    from turboquant_cpp.cli import console, report, session
    from turboquant_cpp.evaluation import Protocol, compare_caches, layer_errors, select_windows

    with as_user_error():
        protocol = Protocol(arguments.windows, arguments.length, arguments.chunk)
    loaded = session.load(arguments)
    tokens = session.text_tokens(loaded, arguments.text)
    config = CacheConfig.from_options(cache_options)
    label = width_label(config.k_bits, config.v_bits)
    reading = {**cache_options, "prefill": "quantized"}
    new_cache = session.cache_maker(loaded, reading)
    made: list[Any] = []

    def make() -> Any:
        made[:] = [new_cache()]
        return made[0]

    with as_user_error():
        window = select_windows(tokens, protocol)[0]
        with console.progress_bar("Reading the text") as progress:
            quality = compare_caches(
                loaded.model, tokens, {label: make}, protocol, progress=progress
            )
    cache = quality.caches[label]
    decisions = made[0].policy_decisions
    decided = {**reading, "layer_bits": made[0].context.config.layer_bits}
    errors = layer_errors(loaded.model, window, session.cache_maker(loaded, decided))
    fields = quality_fields(cache)
    # Written so that NaN fails.
    passed = fields["kl"] <= arguments.threshold and fields["top1_agreement"] >= arguments.min_top1
    result = {
        "kind": "verify",
        "model": loaded.name,
        "passed": passed,
        "threshold": arguments.threshold,
        "min_top1": arguments.min_top1,
        "protocol": protocol,
        "exact_cache_bytes": quality.exact_size.total_bytes,
        "caches": [{"label": label, **cache_options, **size_fields(cache.size), **fields}],
        "layers": errors,
        "decisions": decisions,
        "environment": report.environment(),
    }
    if arguments.json:
        print(report.to_json(result))
    else:
        _print(console, result, errors)
        if arguments.explain:
            _explain(console, decisions)
    if arguments.output:
        report.write_json(arguments.output, result)
    return SUCCESS if passed else GATE_FAILED


def _print(console: Any, result: dict[str, Any], errors: list[Any]) -> None:
    row = result["caches"][0]
    layers = console.new_table(
        "Relative error of keys and values held as codes, |x - x'|² / |x|²",
        *("layer", "keys", "values"),
    )
    errors = [error for error in errors if error.encoded_tokens]  # others are exact
    for error in errors:
        layers.add_row(str(error.layer), f"{error.key_error:.5f}", f"{error.value_error:.5f}")
    if errors:
        layers.add_section()
        layers.add_row(
            "mean",
            f"{statistics.fmean(error.key_error for error in errors):.5f}",
            f"{statistics.fmean(error.value_error for error in errors):.5f}",
        )
    console.output.print(layers)
    table = console.new_table(
        f"{result['model']}, {row['positions']} positions",
        *("cache", "KL", "99 %", "max", "ppl", "top-1"),
    )
    table.add_row(row["label"], *quality_row(row))
    console.output.print(table)
    if result["passed"]:
        console.output.print(
            f"PASS: mean KL at most {result['threshold']:g} nats and top-1 agreement at least "
            f"{100 * result['min_top1']:g} %"
        )
    else:
        console.output.print(
            f"FAIL: expected a mean KL of at most {result['threshold']:g} nats and a top-1 "
            f"agreement of at least {100 * result['min_top1']:g} %. Give keys a bit more "
            "(--k-bits), keep --recipe recommended, or accept the loss with --threshold."
        )


def _explain(console: Any, decisions: Sequence[Any]) -> None:
    table = console.new_table(
        "What the policy decided; errors of the attention's output at the widths asked for, as "
        "shares of its squared norm",
        *("layer", "key error", "value error", "smoothing", "bits", "why"),
    )
    for decision in decisions:
        measured = (decision.key_error, decision.value_error)
        table.add_row(
            str(decision.layer),
            *("-" if error is None else f"{error:.1e}" for error in measured),
            f"{decision.strongest_smoothing:.1f}",
            width_label(decision.k_bits, decision.v_bits),
            decision.reason,
        )
    console.output.print(table)
    if not decisions:
        console.output.print("Nothing was decided: the text is too short (512 tokens are needed).")
