"""The quantised caches that transformers brings itself, to be measured beside ours."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, Final

from transformers import QuantizedCache

__all__ = ["BACKENDS", "Rival", "RivalUnavailableError", "is_installed", "rival_maker"]


class RivalUnavailableError(RuntimeError):
    """A backend is not installed; the message says how to install it."""


@dataclasses.dataclass(frozen=True)
class _Backend:
    #: Widths the backend takes; none when it has only its own.
    bits: tuple[int, ...]
    #: Module and distribution it needs beside transformers.
    module: str | None
    distribution: str | None
    #: What transformers' guide to caches recommends for ``axis_key`` and ``axis_value``.
    axis: int | None


BACKENDS: Final = {
    "quanto": _Backend((2, 4), "optimum.quanto", "optimum-quanto", axis=0),
    "hqq": _Backend((1, 2, 3, 4, 8), "hqq", "hqq", axis=1),
    "fp8": _Backend((), None, None, axis=None),
}


@dataclasses.dataclass(frozen=True)
class Rival:
    """A quantised cache of transformers.

    Attributes
    ----------
    backend : str
        ``"quanto"``, ``"hqq"`` or, since transformers 5.24, ``"fp8"``.
    bits : int or None
        Width of keys and values; None for ``fp8``.
    residual_length : int, optional
        Tokens kept exact before they are quantised together; None leaves transformers' own default
        (128).

    Examples
    --------
    >>> Rival("quanto", 4).label
    'quanto:4'
    >>> Rival("quanto", 3)
    Traceback (most recent call last):
        ...
    ValueError: bits: expected one of 2, 4 for quanto, got 3
    """

    backend: str
    bits: int | None = None
    residual_length: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {self.backend}")
        widths = BACKENDS[self.backend].bits
        if not widths and self.bits is not None:
            raise ValueError(f"bits: expected none for {self.backend}, got {self.bits}")
        if widths and self.bits not in widths:
            supported = ", ".join(map(str, widths))
            raise ValueError(
                f"bits: expected one of {supported} for {self.backend}, got {self.bits}"
            )

    @property
    def label(self) -> str:
        """Name in tables: backend and width."""
        return self.backend if self.bits is None else f"{self.backend}:{self.bits}"


def rival_maker(rival: Rival, config: Any) -> Callable[[], Any]:
    """Return a function that makes an empty quantised cache of transformers.

    It is configured as transformers does by default, but for the axis of the groups, where its
    guide asks for 0 with quanto and 1 with hqq: groups of 64, scale and zero point each.

    Parameters
    ----------
    rival : Rival
        Which one.
    config
        The model's configuration.

    Returns
    -------
    callable
        Takes nothing, returns a ``QuantizedCache``.

    Raises
    ------
    RivalUnavailableError
        The backend is not installed.
    ValueError
        This release of transformers does not know the backend, or the cache does not fit the model
        (it takes full attention layers alone).
    """
    backend = BACKENDS[rival.backend]
    if backend.module and not is_installed(backend.module):
        raise RivalUnavailableError(
            f"the cache {rival.label} needs {backend.distribution}: "
            f"pip install {backend.distribution}"
        )
    wanted = {
        "nbits": rival.bits,
        "axis_key": backend.axis,
        "axis_value": backend.axis,
        "residual_length": rival.residual_length if backend.bits else None,
    }
    options = {name: value for name, value in wanted.items() if value is not None}

    def make() -> Any:
        return QuantizedCache(rival.backend, config, **options)

    make()  # what does not fit is refused here, not in the middle of a run
    return make


def is_installed(module: str) -> bool:
    """Whether a module, or a part of a package, can be imported.

    Examples
    --------
    >>> is_installed("transformers"), is_installed("no_such_package.part")
    (True, False)
    """
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
