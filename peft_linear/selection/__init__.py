# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""From kernels to a decision: criteria, budgets, the search for a set of modules, predictions and notes."""

from ..recommendation.budget import Budget, budget_for, parse_budget
from ..recommendation.cost import StepCost
from ..recommendation.ranks import distribute_ranks, effective_dimensions
from ..recommendation.values import ModuleScore, Reliability, Settings
from ..report.recommendation import Recommendation
from .baselines import (
    BASELINES,
    MODEL_BASELINES,
    baseline,
    equal_parameter_rank,
    kappa_order,
    model_order,
    model_scores,
)
from .criteria import CRITERIA, DEFAULT_CRITERION, Criterion, View, applicable_criteria, score_modules
from .dry_run import CostEstimate, estimate_cost
from .preconditioning import AdamScales, adam_preconditioned
from .prediction import predict
from .problem import Problem
from .recommend import recommend
from .reliability import split_half_reliability
from .request import ModuleRequest, recommend_modules
from .training import Training
from .views import default_ridge


__all__ = [
    "BASELINES",
    "CRITERIA",
    "DEFAULT_CRITERION",
    "MODEL_BASELINES",
    "AdamScales",
    "Budget",
    "CostEstimate",
    "Criterion",
    "ModuleRequest",
    "ModuleScore",
    "Problem",
    "Recommendation",
    "Reliability",
    "Settings",
    "StepCost",
    "Training",
    "View",
    "adam_preconditioned",
    "applicable_criteria",
    "baseline",
    "budget_for",
    "default_ridge",
    "distribute_ranks",
    "effective_dimensions",
    "equal_parameter_rank",
    "estimate_cost",
    "kappa_order",
    "model_order",
    "model_scores",
    "parse_budget",
    "predict",
    "recommend",
    "recommend_modules",
    "score_modules",
    "split_half_reliability",
]
