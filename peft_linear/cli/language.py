# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Language data on the command line: which task rows are for, which columns are taken, and TRL's batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import FileError
from ..integrations.language_rows import FIVE_FORMATS, FORMATS, KEPT, PREPARED, find_format, unknown_format
from ..integrations.trl_data import language_batches
from .sources import LABEL_COLUMNS, Rows


COLUMNS = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "sharegpt": ("conversations", "system"),
    PREPARED: ("input_ids", "labels"),
}
Row = Mapping[str, Any]


def infer_task(row: Row, text_columns: Sequence[str] | None, label_column: str | None, source: str) -> str:
    """ "causal-lm" for chats and for texts without a label, "classification" for rows with a label.

    Raises:
        FileError: the row is a chat and has a label, or is neither; or columns were named that are not there.
    """
    _require_columns(row, text_columns or (), source)
    labels = [name for name in ([label_column] if label_column else LABEL_COLUMNS) if name in row]
    found = find_format(_only(row, text_columns) if text_columns else row, (text_columns or ["text"])[0])
    if found is None and not labels and not label_column:
        raise FileError(
            f"{source} has no label column of {', '.join(LABEL_COLUMNS)}, and is in none of the formats that language "
            f"models are trained on: {FIVE_FORMATS}. Its columns are {', '.join(row)}; name the one with the text "
            "with --text-column"
        )
    if found in (None, "text"):
        return "classification" if labels or label_column else "causal-lm"
    if labels and (label_column or not text_columns):
        raise FileError(
            f"{source} holds chats ({', '.join(name for name in COLUMNS[found] if name in row)}) and labels "
            f"({labels[0]}); pass --task causal-lm to train on the chats, or --task classification with "
            "--text-column to classify a text"
        )
    return "causal-lm"


def language_columns(row: Row, wanted: Sequence[str] | None, source: str) -> tuple[str, ...]:
    """The columns of a row that are of its format; none where it is in none of the five.

    Raises:
        FileError: columns were named that are not there, or are of no format; or preferences or images.
    """
    if not wanted:
        found = find_format(row)
        if found is None and {"chosen", "rejected", "image", "images"} & set(row):
            raise FileError(f"{source}: {unknown_format(row)}")
        return () if found is None else tuple(name for name in COLUMNS[found] if name in row)
    _require_columns(row, wanted, source)
    found = find_format(_only(row, wanted), wanted[0])
    if found is None or (found == "text" and len(wanted) > 1):
        raise FileError(
            f"{source}: the columns {', '.join(wanted)} are in none of the formats that language models are trained "
            f"on: {FIVE_FORMATS}. A pair of texts is for a classifier: rename its columns to prompt and completion"
        )
    return tuple(wanted)


def batches_as_in_training(
    rows: Rows,
    columns: Sequence[str],
    tokenizer: Any,
    *,
    examples: int,
    batch_size: int,
    seed: int,
    **settings: Any,
) -> list[dict[str, Any]]:
    """`language_batches` of these columns.

    Args:
        settings: Of `trl.SFTConfig`; None: TRL's default.
    """
    kept: Any = rows
    if hasattr(rows, "column_names"):
        kept = kept.select_columns([name for name in (*columns, *KEPT) if name in kept.column_names])
    else:
        kept = [_only(row, (*columns, *KEPT)) for row in rows]
    named = {"dataset_text_field": columns[0]} if len(columns) == 1 and columns[0] not in FORMATS else {}
    given = {name: value for name, value in settings.items() if value is not None}
    return language_batches(kept, tokenizer, {**named, **given}, examples=examples, batch_size=batch_size, seed=seed)


def _require_columns(row: Row, wanted: Sequence[str], source: str) -> None:
    missing = [name for name in wanted if name not in row]
    if missing:
        raise FileError(f"{source} has no column {', '.join(missing)}; its columns are {', '.join(row)}")


def _only(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in columns if name in row}
