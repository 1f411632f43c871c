# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""JSON that is read back is checked against types; whatever does not fit is one `FileError` that names the key.

The types are those that the values are declared with: dataclasses and TypedDicts, and in them `str`, `int`, `float`,
`bool`, `None`, `Any`, unions (the first type of the value's kind), `tuple[X, ...]`, `tuple[X, Y]` and
`Mapping[str, X]`. JSON has no infinity and no NaN: a `float` that is one is a string in the file ("Infinity",
"-Infinity", "NaN").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import FileError


DEEPEST = 64  # levels of lists and objects within a value of type Any
LARGEST = 2**63  # integers are smaller
_SPECIAL = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_SHOWN = 60  # characters of a wrong value in a message


@dataclass(frozen=True)
class Place:
    """Where a value is: its file, the keys that lead to it, and what a user can do when it is wrong."""

    file: str
    remedy: str
    keys: str = ""

    def at(self, key: str | int) -> Place:
        """The place of an entry of this object or list."""
        added = f"[{key}]" if isinstance(key, int) else f".{key}" if self.keys else key
        return replace(self, keys=self.keys + added)

    def error(self, expected: str, got: str) -> FileError:
        """The error for a value that is not what is expected here."""
        where = f"{self.file}: {shortened(self.keys)}" if self.keys else self.file
        return FileError(f"{where} must be {expected}, got {got}; {self.remedy}")


def read_json(path: str | os.PathLike, place: Place) -> Any:
    """The value in a JSON file, of any type.

    Raises:
        FileError: the file cannot be read, or `parse_json` raises it.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise FileError(f"{place.file} cannot be read ({error}); {place.remedy}") from error
    return parse_json(content, place)


def parse_json(content: str | bytes, place: Place) -> Any:
    """The value that a JSON text is.

    Raises:
        FileError: it is not UTF-8, not JSON, has a key twice, a number out of range, NaN or Infinity, or is too deep.
    """

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"the number {shortened(text)} is out of range")
        return value

    def integer(text: str) -> int:
        if len(text) > 20 or abs(value := int(text)) >= LARGEST:
            raise ValueError(f"the integer {shortened(text)} is out of range")
        return value

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not a number in JSON")

    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        return json.loads(
            text, object_pairs_hook=_unique, parse_float=number, parse_int=integer, parse_constant=constant
        )
    except RecursionError:
        raise FileError(f"{place.file} is not valid JSON: it is nested too deeply; {place.remedy}") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are
        raise FileError(f"{place.file} is not valid JSON: {error}; {place.remedy}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shortened(repr(key))} is there twice")
        found[key] = value
    return found


def read_as(kind: Any, value: Any, place: Place) -> Any:
    """`value`, parsed from JSON, as the type `kind`: lists become tuples, objects dataclasses where that is declared.

    Raises:
        FileError: it does not fit; the message has the key, what is expected and what is there.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        _check_depth(value, place)
        return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(kind, value, place)
    if origin is tuple and isinstance(value, list):
        many = arguments[-1] is Ellipsis
        if many or len(value) == len(arguments):
            kinds = [arguments[0]] * len(value) if many else arguments
            return tuple(read_as(k, v, place.at(i)) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: read_as(arguments[1], entry, place.at(key)) for key, entry in value.items()}
    elif is_dataclass(kind) and isinstance(value, dict):
        required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        values = _read_fields(kind, required, value, place)
        try:
            return typing.cast(Any, kind)(**values)
        except ValueError as error:  # the package's own errors are
            raise FileError(f"{place.file}: {shortened(place.keys)}: {error}; {place.remedy}") from error
    elif typing.is_typeddict(kind) and isinstance(value, dict):
        return _read_fields(kind, kind.__required_keys__, value, place)
    elif _is_scalar(kind, value):
        return float(_SPECIAL.get(value, value)) if kind is float else value
    raise place.error(described(kind), shown(value))


def check_same(expected: str, found: str, place: Place) -> None:
    """Raises `FileError` unless a checksum in a file is that of its content."""
    if expected != found:
        raise FileError(
            f"{place.file} was changed after it was saved: its checksum is {shortened(expected)}, that of its content "
            f"{found[:12]}…; {place.remedy}"
        )


def json_digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys and the spaces between."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def as_json(value: Any, place: Place) -> Any:
    """`value` as JSON can hold it: tuples as lists, infinities and NaN as strings.

    Raises:
        FileError: it holds something else than numbers, texts, None, lists and mappings with texts as keys.
    """
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise place.error("a mapping with texts as keys", f"the key {wrong[0]!r}")
        return {key: as_json(entry, place.at(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry, place.at(index)) for index, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, int) and not -LARGEST < value < LARGEST:
        raise place.error("an integer of 64 bits", "a larger one")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise place.error("something that JSON can hold", f"a value of type {type(value).__name__}")


def described(kind: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(each) for each in arguments)
    if origin is tuple:
        return "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
    words = {str: "a text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return words.get(kind, "an object")


def shown(value: Any) -> str:
    """A JSON value in a message, short."""
    if isinstance(value, (dict, list)):
        what = "an object" if isinstance(value, dict) else "a list"
        return f"{what} of {len(value)}"
    return "null" if value is None else shortened(json.dumps(value))


def shortened(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _read_fields(kind: Any, required: typing.Iterable[str], value: dict[str, Any], place: Place) -> dict[str, Any]:
    hints = _hints(kind)
    if missing := sorted(set(required) - set(value)):
        raise place.at(missing[0]).error("there", "nothing")
    if unknown := sorted(set(value) - set(hints)):
        raise place.at(unknown[0]).error(f"one of the keys {', '.join(sorted(hints))}", "an unknown one")
    return {key: read_as(hints[key], entry, place.at(key)) for key, entry in value.items()}


def _read_union(kind: Any, value: Any, place: Place) -> Any:
    fitting = [each for each in typing.get_args(kind) if _may_be(each, value)]
    if not fitting:
        raise place.error(described(kind), shown(value))
    return read_as(fitting[0], value, place)


def _may_be(kind: Any, value: Any) -> bool:
    """Whether a type is that of a JSON value, whatever is in it."""
    if isinstance(value, (dict, list)):
        is_list = typing.get_origin(kind) is tuple
        return kind is Any or (not _is_scalar_type(kind) and is_list == isinstance(value, list))
    return kind is Any or _is_scalar(kind, value)


def _is_scalar_type(kind: Any) -> bool:
    return kind in (str, int, float, bool, type(None))


def _is_scalar(kind: Any, value: Any) -> bool:
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number or (isinstance(value, str) and value in _SPECIAL)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return _is_scalar_type(kind) and isinstance(value, kind)


def _check_depth(value: Any, place: Place) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            entry
            for each in level
            if isinstance(each, (dict, list))
            for entry in (each.values() if isinstance(each, dict) else each)
        ]
    if level:
        raise place.error(f"nested at most {DEEPEST} levels deep", "more")


@lru_cache(maxsize=64)
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
