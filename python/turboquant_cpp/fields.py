"""Reading descriptions that may come from anyone: every field is checked before it is used."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

__all__ = ["Fields", "FormatError", "naming", "objects_of", "parse_json", "refused"]

_SHOWN: Final = 60  # characters of a wrong value that a message repeats


class FormatError(ValueError):
    """A file is damaged, of a newer version, or never was a cache; the message names the field."""

    __module__ = "turboquant_cpp"


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn what the block refuses into a `FormatError` of the field `path`."""
    try:
        yield
    except FormatError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"{path}.{error}") from error


def refused(path: str, expected: str, actual: object) -> FormatError:
    """The error for a field that is not as expected."""
    text = repr(actual)
    if len(text) > _SHOWN:
        text = f"{text[:_SHOWN]}... ({type(actual).__name__})"
    return FormatError(f"{path}: expected {expected}, got {text}")


def parse_json(path: str, text: str | bytes) -> Any:
    """A JSON value without duplicate keys, NaN or infinity.

    Raises
    ------
    FormatError
        Naming `path`, when the text is no such value or is nested too deeply.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise refused(path, "distinct keys", next(key for key in keys if keys.count(key) > 1))
        return found

    def constant(name: str) -> Any:
        raise refused(path, "finite numbers", name)

    try:
        return json.loads(text, object_pairs_hook=distinct, parse_constant=constant)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON, got text that is not ({error})") from error


class Fields:
    """A JSON object whose fields are taken one by one, each with its type and its range.

    Parameters
    ----------
    path : str
        How messages call the object.
    value : object
        What a parser found there.

    Raises
    ------
    FormatError
        Here and in every method, naming the field: it is missing, of another type, out of range,
        or left over (`finish`).
    """

    def __init__(self, path: str, value: object) -> None:
        if not isinstance(value, dict):
            raise refused(path, "an object", value)
        self.path = path
        self._left = dict(value)

    def take(self, name: str) -> Any:
        """The field as it is."""
        if name not in self._left:
            raise FormatError(f"{self.path}.{name}: expected the field, got none")
        return self._left.pop(name)

    def has(self, name: str) -> bool:
        """Whether the field is there and was not taken yet."""
        return name in self._left

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer of low to high."""
        return _integer(f"{self.path}.{name}", self.take(name), low, high)

    def flag(self, name: str) -> bool:
        """A truth value."""
        value = self.take(name)
        if not isinstance(value, bool):
            raise refused(f"{self.path}.{name}", "true or false", value)
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of a few words."""
        value = self.take(name)
        if value not in choices:
            raise refused(f"{self.path}.{name}", " or ".join(map(repr, choices)), value)
        return str(value)

    def integers(self, name: str, low: int, high: int) -> list[int]:
        """A list of integers of low to high."""
        path = f"{self.path}.{name}"
        return [
            _integer(f"{path}[{i}]", value, low, high)
            for i, value in enumerate(_list(path, self.take(name)))
        ]

    def object(self, name: str) -> Fields:
        """An object."""
        return Fields(f"{self.path}.{name}", self.take(name))

    def objects(self, name: str) -> list[Fields]:
        """A list of objects; messages number them."""
        return objects_of(f"{self.path}.{name}", self.take(name))

    def finish(self) -> None:
        """Every field has been taken."""
        for name in self._left:
            raise FormatError(f"{self.path}.{name[:_SHOWN]}: expected no such field, got one")


def objects_of(path: str, value: object) -> list[Fields]:
    """A list of objects that a parser found, numbered in messages.

    Raises
    ------
    FormatError
        When it is none.
    """
    return [Fields(f"{path}.{i}", item) for i, item in enumerate(_list(path, value))]


def _list(path: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise refused(path, "a list", value)
    return value


def _integer(path: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refused(path, f"an integer of {low} to {high}", value)
    return value
