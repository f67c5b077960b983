"""Exit codes of the command line and the error that a user can mend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["GATE_FAILED", "SUCCESS", "USER_ERROR", "UserError", "as_user_error"]

SUCCESS = 0
GATE_FAILED = 1
USER_ERROR = 2  # argparse's own


class UserError(Exception):
    """Wrong input or something missing; the message says what to do next."""


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
    """Turn the library's complaints about arguments and files into `UserError`.

    Examples
    --------
    >>> with as_user_error():
    ...     raise ValueError("bits: expected an integer of 1 to 8, got 9")
    Traceback (most recent call last):
        ...
    turboquant_cpp.cli.exit_codes.UserError: bits: expected an integer of 1 to 8, got 9
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from error
