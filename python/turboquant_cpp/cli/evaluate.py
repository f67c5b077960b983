"""``turboquant-cpp eval``, also ``python -m turboquant_cpp.evaluation``."""

from __future__ import annotations

import argparse

from turboquant_cpp.cli import arguments as options
from turboquant_cpp.cli import candidates

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
    options.add_text_argument(parser)
    options.add_attention_argument(parser)
    options.add_model_arguments(parser)
    options.add_recipe_arguments(parser)
    options.add_protocol_arguments(parser, windows=2, length=1024)
    options.add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Gather the caches, load the model, measure."""
    caches = candidates.candidates(arguments)

    from turboquant_cpp.cli import evaluate_text

    return evaluate_text.run(arguments, caches)
