# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Finished pieces of long work on disk, so that a run that was killed continues where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.common.files import read_text, save_text


class JsonLines:
    """Records in two files: `path`, to which finished work is appended, and `path`.gz, which `pack` moves it to.

    A line that a kill has torn is dropped.

    Args:
        path: A .jsonl file; it is made when the first record is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [lines_of(file) for file in (archive_of(path), path)]
        if path.is_file():
            save_text(path, as_text(self.files[1]))  # without a torn line

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [line for lines in self.files for line in lines]

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """On disk when this returns."""
        text = as_text(lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.files[1] += [json.loads(line) for line in text.splitlines()]

    def pack(self) -> None:
        """Moves what was added into the compressed file; without additions that file stays as it is."""
        if self.path.is_file():
            lines = list({json.dumps(line): line for line in self.lines}.values())  # the setting opens both files
            save_text(archive_of(self.path), as_text(lines))
            self.path.unlink()
            self.files = [lines, []]


class Records:
    """JSON lines whose first one is the setting; each further line is one finished piece of work.

    Args:
        path: The .jsonl file; see `JsonLines`.
        setting: What all records of the file have in common.
        key: Names of the fields that tell records apart.

    Raises:
        SystemExit: the file holds records of another setting.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any], key: Sequence[str]) -> None:
        self.key = tuple(key)
        self.setting = json.loads(json.dumps(setting))
        self.file = JsonLines(path)
        for lines in self.file.files:
            if lines:
                self._check(lines[0].get("setting", {}))
        self.found = {self._key_of(line): line for lines in self.file.files for line in lines[1:]}

    def __contains__(self, key: Sequence[Any]) -> bool:
        return self._hashable(key) in self.found

    def __getitem__(self, key: Sequence[Any]) -> dict[str, Any]:
        return self.found[self._hashable(key)]

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one record; on disk when this returns."""
        opening = [] if self.file.files[1] else [{"setting": self.setting}]
        self.file.append([*opening, record])
        added = self.file.files[1][-1]
        self.found[self._key_of(added)] = added

    def pack(self) -> None:
        """Compresses what was added; to be called when a run is complete."""
        self.file.pack()

    def select(self, keys: Iterable[Sequence[Any]]) -> list[dict[str, Any]]:
        return [self[key] for key in keys]

    def _key_of(self, record: Mapping[str, Any]) -> tuple:
        return self._hashable([record[name] for name in self.key])

    @staticmethod
    def _hashable(key: Sequence[Any]) -> tuple:
        return tuple(tuple(part) if isinstance(part, (list, tuple)) else part for part in key)

    def _check(self, there: Mapping[str, Any]) -> None:
        names = [name for name in {**there, **self.setting} if there.get(name) != self.setting.get(name)]
        if names:
            differences = "; ".join(f"{n}: {there.get(n)!r} there, {self.setting.get(n)!r} here" for n in names)
            raise SystemExit(
                f"{self.file.path} holds results of another setting ({differences}); choose another --output"
            )


def archive_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def stored_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of the compressed file and of `path`; none where there is neither."""
    return [*lines_of(archive_of(path)), *lines_of(path)]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The complete lines of one JSON-lines file; none where there is no file."""
    if not path.is_file():
        return []
    lines = [parsed(text) for text in read_text(path).split("\n")]
    return [line for line in lines if line is not None]


def parsed(text: str) -> dict[str, Any] | None:
    """The JSON object in `text`; None where it is torn or empty."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def as_text(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
