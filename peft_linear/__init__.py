# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""ProximalLoRA and neural-tangent-kernel guided choice of modules, as a plugin for Hugging Face peft.

Importing the package registers the adapter type `PROXIMAL_LORA` with peft, and the proximal term with torch's
optimizers.
"""

from .capture.gap import linearization_gap
from .capture.linearize import LinearizedModel, linearize
from .capture.ntk import compute_ntk
from .capture.resources import Resources
from .errors import PeftLinearError
from .functional.spectrum import Spectrum
from .integrations.callbacks import ProximalCallback
from .integrations.kl_callback import KlToBaseCallback
from .integrations.planned_runs import plan_trainer_runs
from .integrations.recommend_modules import recommend_modules
from .integrations.recommendation_callback import NtkRecommendationCallback
from .integrations.trl_data import language_batches
from .kernels.module_kernels import ModuleKernels
from .kernels.regression import fit_kernel_regression
from .proximal import (
    KlBudget,
    attach_proximal,
    collect_reference,
    kl_to_base,
    kl_to_base_loss,
    proximal_distance,
)
from .report.recommendation import Recommendation
from .selection.recommend import recommend
from .selection.training import Training
from .tuners.proximal_lora import (
    ProximalLoraConfig,
    ProximalLoraModel,
    ProximalReference,
    export_lora,
    set_proximal_reference,
)


__version__ = "0.1.0.dev0"

__all__ = [
    "KlBudget",
    "KlToBaseCallback",
    "LinearizedModel",
    "ModuleKernels",
    "NtkRecommendationCallback",
    "PeftLinearError",
    "ProximalCallback",
    "ProximalLoraConfig",
    "ProximalLoraModel",
    "ProximalReference",
    "Recommendation",
    "Resources",
    "Spectrum",
    "Training",
    "attach_proximal",
    "collect_reference",
    "compute_ntk",
    "export_lora",
    "fit_kernel_regression",
    "kl_to_base",
    "kl_to_base_loss",
    "language_batches",
    "linearization_gap",
    "linearize",
    "proximal_distance",
    "recommend",
    "recommend_modules",
    "set_proximal_reference",
]

plan_trainer_runs()
