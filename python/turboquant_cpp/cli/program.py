"""Argument parsing and dispatch; a command's own imports wait until it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from turboquant_cpp.cli.exit_codes import GATE_FAILED, SUCCESS, USER_ERROR, UserError

__all__ = ["main"]

_COMMANDS = {
    "demo": "run a small model on real text with exact, 4-, 3- and 2-bit caches",
    "generate": "generate text from a compressed cache",
    "benchmark": "time a prompt, or the kernels, with the exact and the compressed cache",
    "eval": "measure KL divergence, perplexity, top-1 agreement, needle retrieval on a text",
    "verify": "judge a model's own keys and values at given widths; exit code 1 when it fails",
    "plot": "draw the JSON of demo, eval or verify as PNG and SVG",
    "info": "show versions, instruction sets, supported dimensions and widths",
}

_OPTIONAL_PACKAGES = ("torch", "transformers", "rich", "matplotlib")

_EPILOG = f"""\
exit codes:
  {SUCCESS}  success
  {GATE_FAILED}  a quality gate failed
  {USER_ERROR}  wrong arguments, or something is missing; the message says what to do
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; None takes them from ``sys.argv``.

    Returns
    -------
    int
        0 success, 1 a gate failed, 2 wrong arguments or something missing (argparse itself raises
        SystemExit with 2 for a wrong option).

    Examples
    --------
    >>> main(["info"])  # doctest: +SKIP
    0
    """
    parser, subparsers = _parser()
    arguments = parser.parse_args(argv)
    module = importlib.import_module(f"turboquant_cpp.cli.{_module_name(arguments.command)}")
    try:
        return int(module.run(arguments))
    except UserError as error:
        subparsers[arguments.command].exit(USER_ERROR, f"turboquant-cpp: {error}\n")
    except ImportError as error:
        hint = ""
        if (error.name or "").partition(".")[0] in _OPTIONAL_PACKAGES:
            hint = (
                f"The command {arguments.command} needs torch, transformers, rich and matplotlib: "
                'pip install "turboquant-cpp[demo]"\n'
            )
        subparsers[arguments.command].exit(USER_ERROR, f"turboquant-cpp: {error}\n{hint}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, the shell's convention
    return USER_ERROR


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="turboquant-cpp",
        description="TurboQuant compression of transformer key/value caches.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    by_name = {}
    for name, summary in _COMMANDS.items():
        command = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module = importlib.import_module(f"turboquant_cpp.cli.{_module_name(name)}")
        module.add_arguments(command)
        by_name[name] = command
    return parser, by_name


def _module_name(command: str) -> str:
    return {"eval": "evaluate"}.get(command, command)
