# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers in, decision out: criteria, budgets, the search for a set of modules, and what theory predicts for it."""

from ..recommendation.budget import Budget, parse_budget
from ..recommendation.ranks import distribute_ranks, effective_dimensions
from ..recommendation.recommendation import ModuleScore, Recommendation
from .baselines.by_kernels import BASELINES, baseline, equal_parameter_rank, kappa_order
from .baselines.by_model import MODEL_BASELINES, model_order, model_scores
from .criteria import CRITERIA, DEFAULT_CRITERION, Criterion, applicable_criteria, score_modules
from .preconditioning import AdamScales, adam_preconditioned
from .prediction import predict
from .problem import Problem
from .recommend import default_ridge, recommend
from .reliability import Reliability, split_half_reliability


__all__ = [
    "BASELINES",
    "CRITERIA",
    "DEFAULT_CRITERION",
    "MODEL_BASELINES",
    "AdamScales",
    "Budget",
    "Criterion",
    "ModuleScore",
    "Problem",
    "Recommendation",
    "Reliability",
    "adam_preconditioned",
    "applicable_criteria",
    "baseline",
    "default_ridge",
    "distribute_ranks",
    "effective_dimensions",
    "equal_parameter_rank",
    "kappa_order",
    "model_order",
    "model_scores",
    "parse_budget",
    "predict",
    "recommend",
    "score_modules",
    "split_half_reliability",
]
