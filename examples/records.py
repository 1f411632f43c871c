# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Finished pieces of long work on disk, so that a run that was killed goes on; and what it was measured on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peft_linear.files import write_text


class Records:
    """A JSON-lines file whose first line is the setting; each further line is one finished piece of work.

    A line that a kill has torn is dropped, and what it described is done again.

    Args:
        path: The file; it is made when the first record is added.
        setting: What all records of the file have in common.
        key: Names of the fields that tell records apart.

    Raises:
        SystemExit: the file holds records of another setting.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any], key: Sequence[str]) -> None:
        self.path, self.key = path, tuple(key)
        self.setting = json.loads(json.dumps(setting))
        self.found: dict[tuple, dict[str, Any]] = {}
        lines = read_lines(path)
        if lines:
            self._check(lines[0].get("setting", {}))
            self.found = {self._key_of(line): line for line in lines[1:]}
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))  # without a torn line

    def __contains__(self, key: Sequence[Any]) -> bool:
        return self._hashable(key) in self.found

    def __getitem__(self, key: Sequence[Any]) -> dict[str, Any]:
        return self.found[self._hashable(key)]

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one record; on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [] if self.path.is_file() else [{"setting": self.setting}]
        lines.append(dict(record))
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        record = json.loads(json.dumps(record))
        self.found[self._key_of(record)] = record

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
            raise SystemExit(f"{self.path} holds results of another setting ({differences}); choose another --output")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; none where there is no file."""
    if not path.is_file():
        return []
    lines = [parsed(text) for text in path.read_text(encoding="utf-8").split("\n")]
    return [line for line in lines if line is not None]


def parsed(text: str) -> dict[str, Any] | None:
    """The JSON object in `text`; None where it is torn or empty."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def circumstances(command: str, day: str | None) -> dict[str, Any]:
    """Machine, date, command and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": command,
        "date": day or date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads used, {device}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
