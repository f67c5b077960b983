"""JSON reports: where and with what a figure was measured goes with the figure."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from typing import Any

from turboquant_cpp.cli.exit_codes import UserError

__all__ = ["environment", "gpu_names", "installed_version", "read_json", "to_json", "write_json"]


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None when it is absent.

    Examples
    --------
    >>> installed_version("no-such-distribution") is None
    True
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_names() -> list[str]:
    """Names of the CUDA devices that torch sees; none without torch."""
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def environment() -> dict[str, Any]:
    """Versions and machine of this run."""
    from turboquant_cpp import __version__, _core

    return {
        "turboquant_cpp": __version__,
        "simd": _core.simd_level(),
        "torch": installed_version("torch"),
        "transformers": installed_version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpus": gpu_names(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def to_json(report: dict[str, Any]) -> str:
    """Serialise a report; numbers that JSON does not have (NaN, infinity) become null.

    Examples
    --------
    >>> print(to_json({"kl": float("nan")}))
    {
      "kl": null
    }
    """
    return json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)


def write_json(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Write a report, making its directory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(report) + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a report back."""
    try:
        report = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(report, dict):
        raise UserError(f"{path} is not a report of this program: expected a JSON object")
    return report


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
