# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The results: one JSON line a run, appended in one write; a line cut off by a kill is left out when read."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft_linear.errors import PeftLinearError

from .plan import Group, Run


SHIPPED = Path(__file__).parent / "runs.jsonl.gz"
FIELDS = ("model", "task", "budget", "arm", "seed", "rate")


class RecordLog:
    """`<name>.jsonl` in `folder`, and the shipped results before it; a record is known by its values of `fields`."""

    def __init__(self, folder: Path, shipped: Path | None, name: str, fields: Sequence[str]) -> None:
        self.path = folder / f"{name}.jsonl"
        self.lock_path = folder / f"{name}.lock"
        self.fields = tuple(fields)
        folder.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        if shipped is not None and shipped.exists():
            lines += gzip.decompress(shipped.read_bytes()).decode("utf-8").splitlines()
        if self.path.exists():
            lines += self.path.read_text(encoding="utf-8").splitlines()
        self.records: dict[Hashable, dict] = {}
        for record in parse(lines, self.fields):
            self.add(record)

    def key(self, record: dict) -> Hashable:
        return tuple(record[field] for field in self.fields)

    def add(self, record: dict) -> None:
        self.records[self.key(record)] = record

    def append(self, record: dict) -> None:
        """Adds one run; the line reaches the disk whole or is left out at the next reading."""
        key = self.key(record)
        if key in self.records:
            raise PeftLinearError(f"{key} is in {self.path} already; a run is recorded once")
        line = json.dumps(record, separators=(",", ":")) + "\n"
        with self.path.open("ab") as file:
            if file.tell() and not ends_with_newline(self.path):
                line = "\n" + line
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.add(record)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Refuses a second process on the same folder."""
        with self.lock_path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PeftLinearError(f"another queue runs in {self.path.parent}; wait for it or stop it") from None
            yield


class RunLog(RecordLog):
    """The log of the language bench's runs, and the validation losses of each group by its rates."""

    records: dict[Run, dict]

    def __init__(self, folder: Path, shipped: Path | None = SHIPPED, name: str = "runs") -> None:
        self.losses: dict[Group, dict[float, float | None]] = defaultdict(dict)
        super().__init__(folder, shipped, name, FIELDS)

    def key(self, record: dict) -> Run:
        return Run(**{field: record[field] for field in self.fields})

    def add(self, record: dict) -> None:
        super().add(record)
        run = self.key(record)
        self.losses[run.group][run.rate] = record["validation_loss"]

    def seen(self, group: Group) -> dict[float, float | None]:
        """{rate: validation loss} of the group's runs."""
        return dict(self.losses[group])


def parse(lines: Iterable[str], fields: Sequence[str]) -> Iterator[dict]:
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and all(field in record for field in fields):
            yield record


def ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
