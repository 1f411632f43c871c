# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Diagnostics of a choice: stability of the ranking, spectra, condition numbers, predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..functional.spectrum import Spectrum
from ..recommendation.values import Reliability
from .choice import Choice
from .criteria import Criterion
from .prediction import before_training, predict
from .reliability import split_half_reliability
from .views import Views


@dataclass(frozen=True, eq=False)
class Evidence:
    """The data behind notes, reasons and reports.

    Args:
        scores: Of every candidate alone.
        reliability: None where there are too few examples or candidates.
        condition_numbers: Of every candidate alone, whatever the criterion.
        spectra, predicted: As in `RecommendationData`.
    """

    views: Views
    criterion: Criterion
    choice: Choice
    scores: Mapping[str, float]
    reliability: Reliability | None
    condition_numbers: Mapping[str, float]
    spectra: Mapping[str, Spectrum]
    predicted: Mapping[str, Any]
    asked_for: str = ""  # the criterion as it was passed


def collect_evidence(
    views: Views, choice: Choice, scores: Mapping[str, float], criterion: Criterion, asked_for: str = ""
) -> Evidence:
    """Cost: 2·splits evaluations of the criterion a candidate on n/2 rows, and one eigendecomposition a candidate."""
    plain, scoring = views.plain, views.scoring
    kernels = plain.kernels
    condition_numbers = scores
    if criterion.name != "condition_number" or scoring.kernels is not kernels:
        ridge = plain.problem.ridge
        condition_numbers = {name: kernels.spectrum([name]).condition_number(ridge) for name in kernels.names}
    return Evidence(
        views=views,
        criterion=criterion,
        choice=choice,
        scores=scores,
        reliability=split_half_reliability(scoring, criterion, scores=scores),
        condition_numbers=condition_numbers,
        spectra=_spectra(views, choice),
        predicted=_predictions(views, choice),
        asked_for=asked_for,
    )


def _spectra(views: Views, choice: Choice) -> dict[str, Spectrum]:
    kernels, problem = views.plain.kernels, views.plain.problem
    spectra = {"chosen": kernels.spectrum(choice.modules), "all": kernels.spectrum()}
    if bool(kernels.base.any()):
        spectra["always trained"] = kernels.spectrum([])
        spectra["chosen, adapters"] = problem.spectrum(kernels.subset(choice.modules) - kernels.base)
        spectra["all, adapters"] = problem.spectrum(kernels.subset() - kernels.base)
    return spectra


def _predictions(views: Views, choice: Choice) -> dict[str, Any]:
    kernels = views.plain.kernels
    predicted: dict[str, Any] = dict(predict(views.plain, choice.modules, views.optimizer))
    predicted["all_candidates"] = predict(views.plain, kernels.names, views.optimizer)
    if bool(kernels.base.any()):
        predicted["always_trained_only"] = predict(views.plain, [], views.optimizer)
    predicted["before_training"] = before_training(views.optimizer.problem)
    return predicted
