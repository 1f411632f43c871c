# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Numbers in, decision out: criteria, budgets, the search for a set of modules, and what theory predicts for it."""

from .baselines import BASELINES, baseline, equal_parameter_rank, kappa_order
from .budget import Budget, parse_budget
from .criteria import CRITERIA, DEFAULT_CRITERION, Criterion, applicable_criteria, score_modules
from .model_baselines import MODEL_BASELINES, model_order, model_scores
from .preconditioning import AdamScales, adam_preconditioned
from .prediction import predict
from .problem import Problem
from .ranks import distribute_ranks, effective_dimensions
from .recommend import default_ridge, recommend
from .recommendation import ModuleScore, Recommendation
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
