# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A section of a model card that says which modules are adapted, and why."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from ..files import write_bytes
from ..recommendation.data import RecommendationData
from .escaping import plain
from .formatting import budget_words, criterion_label
from .markdown import choice_table, prediction_table


BEGIN = "<!-- peft_linear:recommendation:begin -->"
_MOST_NAMES = 24  # in the table of a card
END = "<!-- peft_linear:recommendation:end -->"
_SECTION = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)


def model_card_section(recommendation: RecommendationData, adapted: Collection[str] | None = None) -> str:
    """The section's Markdown, between two comments by which it is found again.

    Args:
        recommendation: What was recommended.
        adapted: The modules that the published adapter is on, where they may be others than those recommended;
            default: those.
    """
    rec = recommendation
    label = plain(criterion_label(rec))
    notes = "".join(f"\n- {plain(note)}" for note in rec.notes)
    followed = adapted is None or set(adapted) == set(rec.modules)
    chosen = f"{len(rec.modules)} of {len(rec.scores)} candidate modules were"
    opening = (
        f"{chosen} chosen" if followed else f"The adapter is on {len(adapted or ())} modules. {chosen} recommended"
    )
    return (
        f"{BEGIN}\n## Which modules are adapted\n\n"
        f"{opening} before training by their neural "
        f"tangent kernels ({label}, budget: {plain(budget_words(rec.budget))}), with peft-linear; "
        "method: [Linearization Explains Fine-Tuning in Large Language Models](https://arxiv.org/abs/2602.08239).\n\n"
        f"Recommended: {plain(rec.rule.text)}.\n\n"
        f"{_names(rec)}{prediction_table(rec.predicted)}\n{notes}{chr(10) if notes else ''}{END}"
    )


def _names(rec: RecommendationData) -> str:
    """The table of modules, where it is not longer than a reader reads."""
    return f"{choice_table(rec)}\n\n" if len(rec.modules) <= _MOST_NAMES else ""


def with_model_card_section(
    card: str, recommendation: RecommendationData, adapted: Collection[str] | None = None
) -> str:
    """`card` with the section appended, or in place of an existing one: doing it twice changes nothing.

    A section is what lies between the two comments with neither of them inside; all else stays as it is, character by
    character. The section's line ends are as the card's first.
    """
    section = model_card_section(recommendation, adapted)
    found = _SECTION.search(card)
    before, after = (card, "") if found is None else (card[: found.start()], card[found.end() :])
    first = re.search(r"\r?\n", before + after)
    end = first[0] if first else "\n"
    section = section.replace("\n", end)
    if found is not None:
        return before + section + (after or end)  # peft and transformers cut the last line's end
    blank = len(card[len(card.rstrip("\r\n")) :].splitlines())  # line ends that are there
    return card + end * max(0, 2 - blank if card else 0) + section + end


def update_model_card(
    path: str | os.PathLike, recommendation: RecommendationData, adapted: Collection[str] | None = None
) -> None:
    """Writes the section into the model card at `path` (a README.md), which is made if it does not exist.

    Raises:
        FileError: the card cannot be written.
    """
    file = Path(path)
    content = file.read_bytes() if file.is_file() else b""
    card = content.decode("utf-8", "surrogateescape")  # bytes that are no UTF-8 stay as they are, and all line ends
    write_bytes(file, with_model_card_section(card, recommendation, adapted).encode("utf-8", "surrogateescape"))
