# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A section of a model card that says which modules are adapted, and why."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from ..files import write_text
from ..recommendation.data import RecommendationData
from .formatting import criterion_label
from .markdown import choice_table, prediction_table


BEGIN = "<!-- peft_linear:recommendation:begin -->"
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
    label = criterion_label(rec)
    notes = "".join(f"\n- {note}" for note in rec.notes)
    followed = adapted is None or set(adapted) == set(rec.modules)
    chosen = f"{len(rec.modules)} of {len(rec.scores)} candidate modules were"
    opening = (
        f"{chosen} chosen" if followed else f"The adapter is on {len(adapted or ())} modules. {chosen} recommended"
    )
    return (
        f"{BEGIN}\n## Which modules are adapted\n\n"
        f"{opening} before training by their neural "
        f"tangent kernels ({label}, budget {rec.budget!r}), with peft-linear; "
        "method: [Linearization Explains Fine-Tuning in Large Language Models](https://arxiv.org/abs/2602.08239).\n\n"
        f"{choice_table(rec)}\n\n{prediction_table(rec.predicted)}\n{notes}{chr(10) if notes else ''}{END}"
    )


def with_model_card_section(
    card: str, recommendation: RecommendationData, adapted: Collection[str] | None = None
) -> str:
    """`card` with the section appended, or in the place of the one that is there: doing it twice changes nothing.

    A section is what lies between the two comments with neither of them inside; nothing else of the card is touched.
    """
    section = model_card_section(recommendation, adapted)
    found = _SECTION.search(card)
    if found is None:
        head = card.rstrip("\r\n")
        return f"{head}\n\n{section}\n" if head else f"{section}\n"
    return card[: found.start()] + section + (card[found.end() :] or "\n")


def update_model_card(
    path: str | os.PathLike, recommendation: RecommendationData, adapted: Collection[str] | None = None
) -> None:
    """Writes the section into the model card at `path` (a README.md), which is made if it does not exist."""
    file = Path(path)
    card = file.read_bytes().decode("utf-8") if file.is_file() else ""  # line ends stay as they are
    write_text(file, with_model_card_section(card, recommendation, adapted))
