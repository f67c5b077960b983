"""``turboquant-cpp eval``, also ``python -m turboquant_cpp.evaluation``."""

from __future__ import annotations

import argparse

from turboquant_cpp.cli import arguments as options
from turboquant_cpp.cli import candidates
from turboquant_cpp.cli.exit_codes import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    candidates.add_arguments(parser)
    parser.add_argument(
        "--gate",
        action="store_true",
        help="exit with 1 when a mean KL exceeds 1.25 times its reference figure (SmolLM2 on the "
        "repository's tests/data/prose.txt)",
    )
    parser.add_argument(
        "--batch",
        type=options.positive_int,
        default=1,
        metavar="ROWS",
        help="windows, or needles of one length, read at once: faster on a GPU",
    )
    parser.add_argument(
        "--lead",
        type=int,
        default=0,
        metavar="TOKENS",
        help="first tokens of a window that are read, 64 a pass, but not compared",
    )
    group = parser.add_argument_group("needle in a haystack")
    group.add_argument(
        "--needle",
        action="store_true",
        help="hide numbers in the text and ask for them instead; --chunk 64 is faster",
    )
    group.add_argument(
        "--lengths",
        type=options.positive_int,
        nargs="+",
        default=[512, 1024, 1536],  # the packaged passage has about 1,800
        metavar="TOKENS",
        help="tokens read for each needle",
    )
    group.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="SHARE",
        help="share of the text before the needle, 0 to 1",
    )
    group.add_argument(
        "--repeats", type=options.positive_int, default=1, help="needles per length and depth"
    )
    options.add_text_argument(parser)
    options.add_attention_argument(parser)
    options.add_model_arguments(parser)
    options.add_recipe_arguments(parser)
    options.add_protocol_arguments(parser, windows=2, length=1024)
    options.add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Gather the caches, load the model, measure."""
    if arguments.needle and arguments.gate:
        raise UserError("--gate: there are no reference figures for --needle")
    if arguments.needle and arguments.lead:
        raise UserError("--lead: expected 0 with --needle, which compares the answers alone")
    caches = candidates.candidates(arguments)

    from turboquant_cpp.cli import evaluate_needle, evaluate_text

    if arguments.needle:
        return evaluate_needle.run(arguments, caches)
    return evaluate_text.run(arguments, caches)
