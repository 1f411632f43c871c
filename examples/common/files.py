# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""JSON on disk, compressed where the name ends in .gz; equal content gives equal bytes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from peft_linear.files import atomic_file


def read_text(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")


def save_text(path: Path, text: str) -> None:
    """Writes the file, and its folder where there is none."""
    content = text.encode("utf-8")
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress(content, 9, mtime=0) if path.suffix == ".gz" else content)


def read_json(path: Path) -> Any:
    return json.loads(read_text(path))


def save_json(path: Path, value: Any) -> None:
    save_text(path, json.dumps(value, indent=1, default=str) + "\n")
