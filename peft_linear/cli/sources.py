# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Reads rows from files, folders and the Hub; `data` finds out what the columns mean."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError


SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)}
LABEL_COLUMNS = ("label", "labels", "class", "target", "category")

Rows = Sequence[Mapping[str, Any]]
Source = tuple[dict[str, Rows], tuple[str, ...] | None]  # rows by split, and names of the labels where it has them


def read_folder(folder: Path) -> Source:
    """The splits of a folder of files, or of one that `datasets.save_to_disk` wrote.

    Raises:
        FileError: it holds neither, or a file that cannot be read.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        loaded = _datasets().load_from_disk(str(folder))
        return _from_datasets(loaded if isinstance(loaded, Mapping) else {"train": loaded}, None)
    splits: dict[str, Rows] = {}
    for split, stems in SPLITS.items():
        found = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        found = [path for path in found if path.is_file()]
        if found:
            splits[split] = read_file(found[0])
    if not splits:
        raise FileError(f"{folder} has no train.jsonl, train.csv or the like; name the files by their split")
    labels = folder / "labels.json"
    return splits, _label_names(labels) if labels.is_file() else None


def read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of one file.

    Raises:
        FileError: the suffix is none of `SUFFIXES`, or the content is not what the suffix says.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise FileError(f"cannot read {path.name}: datasets are {', '.join(SUFFIXES)} files or folders of them")
    text = _read_text(path)
    if suffix in (".csv", ".tsv"):
        return _parse_csv(text, path, "," if suffix == ".csv" else "\t")
    if suffix == ".json" and text.lstrip().startswith("["):
        rows = _parse_json(text, path, None)
    else:
        rows = [_parse_json(line, path, i) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if any(not isinstance(row, dict) for row in rows):
        raise FileError(f"{path} must hold JSON objects, one for each row")
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text: {error}") from error


def _label_names(path: Path) -> tuple[str, ...] | None:
    """Of a folder's labels.json."""
    record = _parse_json(_read_text(path), path, None)
    names = record.get("labels") if isinstance(record, dict) else None
    if not isinstance(names, list):
        raise FileError(f'{path} must hold {{"labels": [names]}}, got {type(record).__name__} without a list of them')
    return tuple(map(str, names)) or None


def _parse_csv(text: str, path: Path, delimiter: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: list[dict[str, Any]] = []
    try:
        for row in reader:
            if None in row:
                raise FileError(
                    f"{path}, line {reader.line_num} has more fields than the header names; quote texts that hold "
                    f"{delimiter!r}, or save the data as JSONL"
                )
            rows.append(row)
    except csv.Error as error:  # a field above the limit of the csv module, for example
        raise FileError(
            f"{path}, line {reader.line_num + 1} cannot be read as {path.suffix[1:].upper()}: {error}; shorten the "
            "text (tokens beyond --max-length are not used), or save the data as JSONL"
        ) from error
    return rows


def _parse_json(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f"{path}, line {line}" if line else str(path)
        reason = "lists or objects are nested too deeply" if isinstance(error, RecursionError) else error
        raise FileError(f"{place} is not valid JSON: {reason}; a row is one flat object, its text a string") from error


def read_hub(name: str, label_column: str | None) -> Source:
    """A dataset of the Hub: the whole name as a dataset, then its last part as a configuration.

    Raises:
        FileError: neither can be loaded; the message has both reasons.
    """
    datasets = _datasets()
    attempts: list[tuple[str, ...]] = [(name,)]
    if "/" in name:
        attempts.append(tuple(name.rsplit("/", 1)))
    reasons = []
    for attempt in attempts:
        try:
            loaded = datasets.load_dataset(*attempt)
            return _from_datasets(loaded, label_column)
        except Exception as error:  # noqa: PERF203 (the Hub's client raises a dozen unrelated types)
            first_line = next(iter(str(error).splitlines()), "")
            reasons.append(f"load_dataset{attempt}: {type(error).__name__}: {first_line}")
    raise FileError(
        f"{name!r} is neither a file or folder here nor a dataset that could be loaded: {'; '.join(reasons)}"
    )


def _from_datasets(loaded: Mapping[str, Any], label_column: str | None) -> Source:
    splits: dict[str, Rows] = {}
    for split, stems in SPLITS.items():
        found = next((name for name in loaded if name in stems), None)
        found = found or next((name for name in loaded if any(name.startswith(f"{s}_") for s in stems)), None)
        if found:
            splits[split] = loaded[found]
    if not splits:
        splits["train"] = loaded[next(iter(loaded))]
    features = next(iter(splits.values())).features  # type: ignore[attr-defined]
    column = label_column or next((c for c in LABEL_COLUMNS if c in features), None)
    names = getattr(features.get(column), "names", None)
    return splits, tuple(names) if names else None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise FileError("this dataset needs the package datasets; install it with: pip install datasets") from error
    return datasets
