"""Options that several commands share."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from turboquant_cpp.cli.exit_codes import as_user_error

__all__ = [
    "add_attention_argument",
    "add_model_arguments",
    "add_output_argument",
    "add_protocol_arguments",
    "add_recipe_arguments",
    "add_text_argument",
    "add_width_arguments",
    "cache_options",
    "checked_options",
    "layer_widths",
    "positive_int",
    "widths",
]

_CACHE_OPTIONS = (
    "bits",
    "k_bits",
    "v_bits",
    "preset",
    "recipe",
    "window_tokens",
    "sink_tokens",
    "center_keys",
    "smooth_keys",
    "k_scale_rule",
    "v_scale_rule",
    "scale_dtype",
    "codebook",
    "exact_first_layers",
    "exact_last_layers",
    "policy",
    "bytes_per_token",
    "seed",
)
_DEFAULT_BITS = 4
_SCALE_RULES = ("norm", "norm_preserving", "least_squares", "unbiased")


def positive_int(text: str) -> int:
    """Parse a number of at least 1.

    Examples
    --------
    >>> positive_int("8")
    8
    """
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def widths(text: str) -> tuple[int, int]:
    """Parse ``5+4`` or ``3``.

    Examples
    --------
    >>> widths("5+4")
    (5, 4)
    """
    keys, plus, values = text.partition("+")
    if not keys.isdecimal() or (plus and not values.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"expected KEYS+VALUES or one number, such as 5+4 or 3, got {text!r}"
        )
    return int(keys), int(values or keys)


def layer_widths(text: str) -> tuple[int, tuple[int, int]]:
    """Parse ``0:8+6`` or ``0:8``.

    Examples
    --------
    >>> layer_widths("0:8+6")
    (0, (8, 6))
    """
    layer, colon, both = text.partition(":")
    if not layer.isdecimal() or not colon:
        raise argparse.ArgumentTypeError(f"expected LAYER:KEYS+VALUES such as 0:8+6, got {text!r}")
    return int(layer), widths(both)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --gguf-file, --dtype and --device."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="hub name, directory or .gguf file; default: the packaged SmolLM2-135M-Instruct",
    )
    group.add_argument("--gguf-file", metavar="FILE", help="GGUF file inside the repository NAME")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="arithmetic of the model",
    )
    group.add_argument("--device", help="torch device; default: cuda when present, else cpu")


def add_width_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --bits, --k-bits, --v-bits and --preset."""
    group = parser.add_argument_group("widths")
    group.add_argument(
        "--bits", type=int, help=f"key and value bits, 1 to 8; default: {_DEFAULT_BITS}"
    )
    group.add_argument("--k-bits", type=int, help="key bits, instead of --bits")
    group.add_argument("--v-bits", type=int, help="value bits, instead of --bits")
    group.add_argument(
        "--preset",
        choices=("quality", "balanced", "max"),
        help="widths by purpose, instead of --bits: 5+4, 4+4, 3+2",
    )


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the cache's controls beside its widths."""
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--recipe",
        default="recommended",
        choices=("recommended", "plain"),
        help="plain: the paper's quantiser, every token quantised at once",
    )
    group.add_argument("--window-tokens", type=int, help="exact recent tokens, a multiple of 64")
    group.add_argument("--sink-tokens", type=int, help="exact first tokens")
    for name, what in (
        ("--center-keys", "store each block's mean key"),
        ("--smooth-keys", "divide key channels by their spread"),
    ):
        group.add_argument(
            name,
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=f"{what}; default: the recipe's",
        )
    for side, what in (("k", "keys"), ("v", "values")):
        group.add_argument(
            f"--{side}-scale-rule",
            choices=_SCALE_RULES,
            help=f"which scale is stored with codes of {what}; default: the recipe's",
        )
    group.add_argument(
        "--scale-dtype",
        choices=("float32", "float16"),
        help="how scales are stored; default: the recipe's",
    )
    group.add_argument(
        "--codebook",
        default="scalar",
        choices=("scalar", "vector"),
        help="vector: less error at 2, 3 and 4 bits, slower to encode",
    )
    group.add_argument(
        "--layer-bits",
        type=layer_widths,
        nargs="+",
        default=[],
        metavar="LAYER:K+V",
        help="layers with widths of their own, such as 0:8+8",
    )
    group.add_argument("--exact-first-layers", type=int, help="first layers kept uncompressed")
    group.add_argument("--exact-last-layers", type=int, help="last layers kept uncompressed")
    group.add_argument(
        "--policy",
        choices=("uniform", "auto"),
        help="auto: every layer's widths are decided from the first 512 tokens",
    )
    group.add_argument(
        "--bytes-per-token",
        type=int,
        help="budget of --policy auto, all layers together; default: what the widths take",
    )
    group.add_argument("--seed", type=int, default=42, help="seed of the rotations")


def add_attention_argument(parser: argparse.ArgumentParser) -> None:
    """Add --attention."""
    parser.add_argument(
        "--attention",
        default="turboquant",
        choices=("turboquant", "sdpa", "eager"),
        help="turboquant reads the packed codes; the others read dequantised keys and values",
    )


def add_text_argument(parser: argparse.ArgumentParser) -> None:
    """Add --text."""
    parser.add_argument(
        "--text",
        type=pathlib.Path,
        metavar="FILE",
        help="UTF-8 text to read; default: the packaged passage",
    )


def add_protocol_arguments(
    parser: argparse.ArgumentParser, *, windows: int, length: int, chunk: int = 8
) -> None:
    """Add --windows, --length and --chunk."""
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--windows", type=positive_int, default=windows, help="windows, spread over the text"
    )
    group.add_argument("--length", type=positive_int, default=length, help="tokens of each window")
    group.add_argument("--chunk", type=positive_int, default=chunk, help="tokens per forward pass")


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Add --output."""
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="FILE", help="write the figures as JSON"
    )


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of the cache after checking them, before anything slow starts."""
    from turboquant_cpp import CacheConfig

    options = {name: value for name, value in options.items() if value is not None}
    with as_user_error():
        CacheConfig.from_options(options)
    return options


def cache_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of `CompressedDynamicCache` from parsed arguments, checked."""
    given = {name: getattr(arguments, name, None) for name in _CACHE_OPTIONS}
    if given["bits"] is None and given["preset"] is None:
        given["bits"] = _DEFAULT_BITS
    given["layer_bits"] = dict(getattr(arguments, "layer_bits", ())) or None
    return checked_options(given)
