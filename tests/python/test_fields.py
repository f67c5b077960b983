"""`Fields` and `parse_json`: types, ranges, names in messages."""

from __future__ import annotations

import pytest
from turboquant_cpp.fields import Fields, FormatError, naming, parse_json

GIVEN = {"n": 3, "on": True, "word": "a", "list": [1, 2], "inner": {"x": 1}, "items": [{"x": 1}]}


def fields() -> Fields:
    return Fields("file", GIVEN)


def test_fields_are_taken_once_and_all():
    taken = fields()
    assert taken.integer("n", 3, 3) == 3
    assert taken.flag("on") is True
    assert taken.choice("word", ("a", "b")) == "a"
    assert taken.integers("list", 1, 2) == [1, 2]
    assert taken.object("inner").integer("x", 0, 1) == 1
    assert [item.integer("x", 0, 1) for item in taken.objects("items")] == [1]
    taken.finish()
    with pytest.raises(FormatError, match=r"file\.n: expected the field, got none"):
        taken.take("n")
    assert GIVEN["n"] == 3


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda f: f.integer("n", 4, 9), r"file\.n: expected an integer of 4 to 9, got 3"),
        (lambda f: f.integer("on", 0, 9), r"file\.on: expected an integer of 0 to 9, got True"),
        (lambda f: f.integer("word", 0, 9), r"file\.word: .*got 'a'"),
        (lambda f: f.flag("n"), r"file\.n: expected true or false, got 3"),
        (lambda f: f.choice("word", ("b", "c")), r"file\.word: expected 'b' or 'c', got 'a'"),
        (lambda f: f.choice("list", ("b",)), r"file\.list: expected 'b', got \[1, 2\]"),
        (lambda f: f.integers("list", 0, 1), r"file\.list\[1\]: expected an integer of 0 to 1"),
        (lambda f: f.integers("n", 0, 1), r"file\.n: expected a list, got 3"),
        (lambda f: f.object("list"), r"file\.list: expected an object, got \[1, 2\]"),
        (lambda f: f.objects("list"), r"file\.list\.0: expected an object, got 1"),
        (lambda f: f.finish(), r"file\.n: expected no such field, got one"),
    ],
)
def test_what_does_not_fit_is_named(take, message):
    with pytest.raises(FormatError, match=message):
        take(fields())


def test_a_message_does_not_repeat_a_large_value():
    with pytest.raises(FormatError) as caught:
        Fields("file", {"n": "x" * 10**6}).integer("n", 0, 1)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a": 1, "a": 1}', "NaN", "-Infinity", "[" * 10**6, "9" * 5000, b"\xff", '{"a" 1}'],
    ids=lambda text: str(text)[:12],
)
def test_what_is_no_json(text):
    with pytest.raises(FormatError, match=r"^field: expected"):
        parse_json("field", text)


def test_json_is_parsed():
    assert parse_json("field", b'{"a": [1, 2.5, "\xc3\xa4", null, {"a": true}]}') == {
        "a": [1, 2.5, "ä", None, {"a": True}]
    }


def test_naming_leaves_other_errors_alone():
    with pytest.raises(FormatError, match=r"^a\.b: wrong"), naming("a"):
        raise ValueError("b: wrong")
    with pytest.raises(FormatError, match=r"^c: wrong"), naming("a"):
        raise FormatError("c: wrong")
    with pytest.raises(MemoryError), naming("a"):
        raise MemoryError
