"""The caches that ``eval`` puts beside the exact one: ours at several widths, transformers' own."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turboquant_cpp.cli import arguments as options
from turboquant_cpp.cli.exit_codes import UserError, as_user_error
from turboquant_cpp.cli.measured import width_label

__all__ = ["Candidate", "add_arguments", "candidates", "check_steps", "rival_spec"]

#: hqq packs up to eight groups of 64 numbers into one row, and cannot pack a part of one.
_HQQ_STEP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A cache to measure.

    Attributes
    ----------
    fields : dict
        What a report says about it beside its figures: options of our cache, or ``backend`` and
        ``bits`` of another.
    maker : callable
        Takes a `LoadedModel`, returns a function that makes an empty cache for it.
    """

    fields: dict[str, Any]
    maker: Callable[[Any], Callable[[], Any]]


def rival_spec(text: str) -> tuple[str, int | None]:
    """Parse ``quanto:4`` or ``fp8``.

    Examples
    --------
    >>> rival_spec("quanto:4"), rival_spec("fp8")
    (('quanto', 4), ('fp8', None))
    """
    backend, colon, bits = text.partition(":")
    if not backend or (colon and not bits.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"expected BACKEND:BITS, such as quanto:4 or hqq:2, or fp8, got {text!r}"
        )
    return backend, int(bits) if colon else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --widths, --against, --residual-length and --exact-chunk."""
    parser.add_argument(
        "--widths",
        type=options.widths,
        nargs="+",
        default=[(5, 4), (4, 4), (4, 2), (3, 3), (2, 2)],
        metavar="K+V",
        help="key and value bits of each cache",
    )
    parser.add_argument(
        "--against",
        type=rival_spec,
        nargs="+",
        default=[],
        metavar="BACKEND:BITS",
        help="transformers' quantised caches beside ours: quanto:4, quanto:2 (pip install "
        "optimum-quanto), hqq:4, hqq:2 (pip install hqq), fp8 (transformers 5.24)",
    )
    parser.add_argument(
        "--residual-length",
        type=options.positive_int,
        help="tokens that quanto and hqq keep exact; default: transformers' own, 128",
    )
    parser.add_argument(
        "--exact-chunk",
        action="store_true",
        help="our caches read the chunk just given as it is, as generate() and transformers' own "
        "caches do; default: through its codes, as any later step does",
    )


def candidates(arguments: argparse.Namespace) -> dict[str, Candidate]:
    """Name every cache that the arguments ask for, after checking what can be checked early.

    With ``--policy auto`` a cache that decides its widths stands beside each uniform one.
    """
    found: dict[str, Candidate] = {}
    prefill = "exact" if arguments.exact_chunk else "quantized"
    for k_bits, v_bits in arguments.widths:
        arguments.k_bits, arguments.v_bits = k_bits, v_bits
        cache_options = options.cache_options(arguments)
        label = width_label(k_bits, v_bits)
        decides = ("policy", "bytes_per_token")
        uniform = {name: value for name, value in cache_options.items() if name not in decides}
        found[label] = Candidate(uniform, _ours(uniform, prefill))
        if cache_options.get("policy") == "auto":
            found[f"{label} auto"] = Candidate(cache_options, _ours(cache_options, prefill))
    if arguments.against:
        from turboquant_cpp.hf.rivals import Rival

        for backend, bits in arguments.against:
            with as_user_error():
                rival = Rival(backend, bits, arguments.residual_length)
            found[rival.label] = Candidate(dataclasses.asdict(rival), _theirs(rival))
    return found


def check_steps(candidates: Mapping[str, Candidate], **tokens: Sequence[int]) -> None:
    """Refuse numbers of tokens, by the option that gave them, after which hqq cannot pack."""
    if all(candidate.fields.get("backend") != "hqq" for candidate in candidates.values()):
        return
    for option, values in tokens.items():
        for value in values:
            if value % _HQQ_STEP_TOKENS:
                raise UserError(
                    f"--{option}: expected a multiple of {_HQQ_STEP_TOKENS} beside hqq, got {value}"
                )


def _ours(cache_options: dict[str, Any], prefill: str) -> Callable[[Any], Callable[[], Any]]:
    def maker(loaded: Any) -> Callable[[], Any]:
        from turboquant_cpp.cli.session import cache_maker

        make: Callable[[], Any] = cache_maker(loaded, {**cache_options, "prefill": prefill})
        return make

    return maker


def _theirs(rival: Any) -> Callable[[Any], Callable[[], Any]]:
    def maker(loaded: Any) -> Callable[[], Any]:
        from turboquant_cpp.hf.rivals import RivalUnavailableError, rival_maker

        try:
            with as_user_error():
                return rival_maker(rival, loaded.model.config)
        except RivalUnavailableError as error:
            raise UserError(str(error)) from error

    return maker
