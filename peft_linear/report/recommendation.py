# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`Recommendation`: the decision as a value that can be printed, plotted, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..functional.simulation import TrainingCurve
from ..recommendation.data import RecommendationData
from .html import recommendation_html
from .markdown import recommendation_markdown, score_table
from .plots import plot_recommendation


@dataclass(frozen=True, repr=False)
class Recommendation(RecommendationData):
    """The modules to adapt, best first, with the evidence: `RecommendationData`, printed, plotted and as a report.

    `print(recommendation)` shows the choice and the best of the rest, what is predicted, and the notes.
    """

    def __str__(self) -> str:
        return score_table(self)

    def to_markdown(self, full: bool = False) -> str:
        """A Markdown report that fits a screen; with `full` every candidate with its reason, and the settings."""
        return recommendation_markdown(self, full)

    def to_html(
        self,
        *,
        measured: Mapping[str, Any] | None = None,
        history: Sequence[Mapping[str, Any]] | None = None,
        curve: TrainingCurve | None = None,
    ) -> str:
        """The report as one self-contained HTML file: choice, caveats, scores by layer and type, spectra, settings.

        After training it can show the measured values beside the predicted ones.

        Args:
            measured: Numbers under the names of `predicted` ("loss", "accuracy", "distance", …), also with "eval_" or
                "test_" before them: what `trainer.evaluate()` returns can be passed as it is, other entries are left
                out.
            history: `trainer.state.log_history`: drawn, and the last evaluation in it is taken where `measured` does
                not say otherwise.
            curve: What `predict_training` predicted step by step, drawn with the history.

        Raises:
            PeftLinearError: `measured` holds nothing that is predicted, `history` no loss, or there is a curve without
                a history.
        """
        return recommendation_html(self, measured=measured, history=history, curve=curve)

    def plot(self, path: str | os.PathLike) -> None:
        """Draws spectra and scores into an image file; the suffix says which kind. Needs matplotlib."""
        plot_recommendation(self, path)
