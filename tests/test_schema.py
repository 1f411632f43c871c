# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""JSON against declared types: what fits comes back as these types, what does not is one error with its key."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_linear.errors import FileError, KernelError
from peft_linear.schema import Place, as_json, check_same, json_digest, parse_json, read_as, read_json


HERE = Place("file.json", "make it again")


@dataclass(frozen=True)
class Point:
    x: float
    name: str = "origin"
    pair: tuple[int, int] | None = None
    many: tuple[str, ...] = ()
    other: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.x < 0:
            raise KernelError(f"x is negative: {self.x}")


class Required(TypedDict):
    points: tuple[Point, ...]


class Record(Required, total=False):
    flag: bool
    size: int | str


def test_what_fits_is_read_as_the_declared_types():
    record = {
        "points": [{"x": 1, "pair": [1, 2], "many": ["a"], "other": {"deep": [1, None]}}, {"x": "Infinity"}],
        "size": "2M",
    }
    value = read_as(Record, record, HERE)
    first, second = value["points"]
    assert first == Point(1.0, "origin", (1, 2), ("a",), {"deep": [1, None]}) and type(first.x) is float
    assert second == Point(math.inf) and value["size"] == "2M" and "flag" not in value


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "^file.json: points must be there, got nothing; make it again$"),
        ([], "^file.json must be an object, got a list of 0; make it again$"),
        ({"points": [{"x": "one"}]}, r'points\[0\]\.x must be a number, got "one"'),
        ({"points": [{"x": True}]}, r"points\[0\]\.x must be a number, got true"),
        ({"points": [{"x": -1}]}, r"file.json: points\[0\]: x is negative: -1.0; make it again"),
        ({"points": [{"x": 1, "pair": [1, 2.0]}]}, r"points\[0\]\.pair\[1\] must be an integer, got 2.0"),
        ({"points": [{"x": 1, "pair": 3}]}, r"pair must be a list of 2 or null, got 3"),
        ({"points": [{"x": 1, "y": 1}]}, r"points\[0\]\.y must be one of the keys many, name, other, pair, x, got an"),
        ({"points": [], "size": 1.5}, "size must be an integer or a text, got 1.5"),
        ({"points": [], "flag": "y" * 500}, 'flag must be true or false, got "y{58}…; make it again'),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_where(record, message):
    with pytest.raises(FileError, match=message):
        read_as(Record, record, HERE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**63, 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(JSON, st.sampled_from([Record, Point, tuple[int, ...], Mapping[str, float], int | None, float, Any]))
def test_any_value_is_read_or_refused_and_nothing_else(value, kind):
    try:
        read_as(kind, value, HERE)
    except FileError as error:
        assert str(error).startswith("file.json") and str(error).endswith("make it again")


@given(JSON)
def test_json_that_is_written_is_parsed_again(value):
    stored = as_json(value, HERE)
    text = json.dumps(stored, allow_nan=False)
    assert parse_json(text, HERE) == stored == parse_json(text.encode(), HERE)
    assert json_digest(parse_json(text, HERE)) == json_digest(stored)


@given(st.text() | st.binary())
def test_any_text_is_json_or_refused_and_nothing_else(content):
    try:
        parse_json(content, HERE)
    except FileError as error:
        assert str(error).startswith("file.json is not valid JSON: ") and str(error).endswith("; make it again")


def test_floats_that_json_has_no_numbers_for_are_texts():
    stored = as_json({"a": (math.inf, -math.inf, math.nan, 1.5)}, HERE)
    assert stored == {"a": ["Infinity", "-Infinity", "NaN", 1.5]}
    back = read_as(Mapping[str, tuple[float, ...]], stored, HERE)["a"]
    assert back[:2] == (math.inf, -math.inf) and math.isnan(back[2]) and back[3] == 1.5


def test_a_checksum_is_compared():
    check_same("a", "a", HERE)
    with pytest.raises(FileError, match="file.json was changed after it was saved: its checksum is a, that of .* b"):
        check_same("a", "b", HERE)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "file").write_text('{"a": [1, 2.5]}')
    assert read_json(tmp_path / "file", HERE) == {"a": [1, 2.5]}
    for path in (tmp_path, tmp_path / "missing", tmp_path / ("x" * 300), tmp_path / "nul\0"):
        with pytest.raises(FileError, match="^file.json cannot be read .*; make it again$"):
            read_json(path, HERE)


def test_the_longest_keys_are_shortened_in_messages():
    with pytest.raises(FileError) as caught:
        read_as(Mapping[str, int], {"k" * 5000: "v" * 5000}, HERE)
    assert len(str(caught.value)) < 250


def test_unions_of_the_typing_module_are_read_too():
    assert read_as(typing.Optional[int], None, HERE) is None  # noqa: UP045
    assert read_as(typing.Union[int, str], "x", HERE) == "x"  # noqa: UP007
