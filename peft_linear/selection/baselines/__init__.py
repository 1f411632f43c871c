# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Selectors to compare a recommendation with."""

from .by_kernels import BASELINES, baseline, equal_parameter_rank, kappa_order
from .by_model import MODEL_BASELINES, model_order, model_scores


__all__ = [
    "BASELINES",
    "MODEL_BASELINES",
    "baseline",
    "equal_parameter_rank",
    "kappa_order",
    "model_order",
    "model_scores",
]
