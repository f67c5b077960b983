"""``turboquant-cpp info``: what is installed and what it supports; needs numpy only."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
from typing import Any

from turboquant_cpp.cli.arguments import add_output_argument
from turboquant_cpp.cli.exit_codes import SUCCESS
from turboquant_cpp.cli.report import gpu_names, installed_version, write_json

__all__ = ["add_arguments", "collect", "run"]

_LARGEST_LISTED_DIM = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what is there, and how to get what is not."""
    facts = collect()
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {_as_text(value)}")
    if arguments.output:
        write_json(arguments.output, facts)
    return SUCCESS


def collect() -> dict[str, Any]:
    """Gather the facts; what is missing is reported, never raised."""
    return {
        "turboquant-cpp": installed_version("turboquant-cpp") or "not installed as a distribution",
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_core_facts(),
        "torch": installed_version("torch") or 'absent: pip install "turboquant-cpp[hf]"',
        "torch operators": _operators(),
        "cuda": _cuda(),
        "transformers": installed_version("transformers")
        or 'absent: pip install "turboquant-cpp[hf]"',
        "rich, matplotlib": "present"
        if installed_version("rich") and installed_version("matplotlib")
        else 'absent: pip install "turboquant-cpp[demo]"',
        "default model": _default_model(),
    }


def _core_facts() -> dict[str, Any]:
    try:
        core = importlib.import_module("turboquant_cpp._core")
        from turboquant_cpp.spec import MAX_BITS, MIN_BITS, CacheConfig
    except ImportError as error:
        return {"core": f"not loaded: {error}"}
    config = CacheConfig(bits=4)

    def is_supported(head_dim: int) -> bool:
        try:
            config.layer_spec(0, head_dim=head_dim, num_kv_heads=1)
        except ValueError:
            return False
        return True

    return {
        "core": core.__version__,
        "simd": core.simd_level(),
        "widths": list(range(MIN_BITS, MAX_BITS + 1)),
        "head dimensions": [d for d in range(8, _LARGEST_LISTED_DIM + 1, 8) if is_supported(d)],
    }


def _operators() -> str:
    if installed_version("torch") is None:
        return "need torch"
    try:
        ops = importlib.import_module("turboquant_cpp.ops")
    except (ImportError, OSError) as error:
        return f"not loaded: {error}"
    return f"loaded, for {', '.join(ops.device_types())} tensors"


def _cuda() -> str:
    if installed_version("torch") is None:
        return "needs torch"
    return ", ".join(gpu_names()) or "no device"


def _default_model() -> str:
    if installed_version("transformers") is None:
        return "needs transformers"
    try:
        from turboquant_cpp.hf.loading import ModelUnavailableError, default_gguf_path
    except ImportError as error:
        return f"not loaded: {error}"
    try:
        return str(default_gguf_path())
    except ModelUnavailableError as error:
        return str(error).replace("\n", " ")


def _as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
