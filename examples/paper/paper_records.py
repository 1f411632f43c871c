# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The words for what was found beside a claim, and the report of an experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_linear.files import write_text
from peft_linear.report.markdown import markdown_table


HELD, NOT_SHOWN, CONTRARY = "held", "not shown", "the contrary was measured"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper beside what was measured."""

    claim: str
    measured: str
    verdict: str


def verdict(low: float, high: float) -> str:
    """Of a claim that a number is positive, from the number's interval."""
    if low > 0:
        return HELD
    return CONTRARY if high < 0 else NOT_SHOWN


def write_report(
    folder: Path,
    title: str,
    claims: Sequence[Claim],
    sections: Sequence[str],
    setting: Mapping[str, Any],
    results: Mapping[str, Any],
) -> None:
    """README.md and results.json of one experiment."""
    text = [
        f"# {title}",
        markdown_table(
            ("the paper's claim", "measured", "verdict"), [(c.claim, c.measured, f"**{c.verdict}**") for c in claims]
        ),
        *sections,
        "## Setting",
        markdown_table(("", ""), [(key, str(value)) for key, value in setting.items()]),
        "Every run is in runs.jsonl, the same numbers as a file in results.json.",
    ]
    write_text(folder / "README.md", "\n\n".join(text) + "\n")
    found = [{"claim": c.claim, "measured": c.measured, "verdict": c.verdict} for c in claims]
    write_text(
        folder / "results.json", json.dumps({**setting, "claims": found, **results}, indent=2, default=str) + "\n"
    )
