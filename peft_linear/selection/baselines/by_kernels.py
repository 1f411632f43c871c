# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Baselines: what people use to choose modules without kernels, and the cheapest numbers that kernels give.

Each baseline is an order of the candidates, best first, that is then cut to a budget, so that all are
compared at the same budget as a recommendation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from ...errors import CriterionError, TargetError
from ...kernels.module_kernels import ModuleKernels
from ...recommendation.budget import BudgetLike, budget_for, fill
from ...recommendation.names import ModuleName, parse_name
from ..problem import Problem


Order = Callable[[ModuleKernels, int], tuple[str, ...]]  # (kernels, seed) -> names, best first


def random_order(kernels: ModuleKernels, seed: int = 0) -> tuple[str, ...]:
    """A uniformly random order by `seed`."""
    shuffled = torch.randperm(len(kernels), generator=torch.Generator().manual_seed(seed))
    return tuple(kernels.names[i] for i in shuffled.tolist())


def first_layers(kernels: ModuleKernels, seed: int = 0) -> tuple[str, ...]:
    """Model order by layer number: the layers nearest to the input."""
    return tuple(sorted(_layered(kernels), key=lambda name: parse_name(name).layer or 0))


def last_layers(kernels: ModuleKernels, seed: int = 0) -> tuple[str, ...]:
    """The layers nearest to the output; model order within a layer."""
    return tuple(sorted(_layered(kernels), key=lambda name: -(parse_name(name).layer or 0)))


def query_value(kernels: ModuleKernels, seed: int = 0) -> tuple[str, ...]:
    """Query and value projections (fused ones too), last layer first: the LoRA paper's choice, cut to the budget."""
    return _only(kernels, lambda name: name.is_query_or_value, "query or value projection")


def attention_only(kernels: ModuleKernels, seed: int = 0) -> tuple[str, ...]:
    """All projections of attention, last layer first."""
    return _only(kernels, lambda name: name.is_attention, "attention module")


def mlp_only(kernels: ModuleKernels, seed: int = 0) -> tuple[str, ...]:
    """All modules of numbered layers that are not attention, last layer first."""
    return _only(kernels, lambda name: name.is_mlp, "MLP module")


def all_linear(kernels: ModuleKernels, seed: int = 0) -> tuple[str, ...]:
    """Every candidate, in model order. For equal parameters take all of them at `equal_parameter_rank` instead."""
    return kernels.names


def gradient_norm(kernels: ModuleKernels, seed: int = 0) -> tuple[str, ...]:
    """Descending norm of the loss gradient in the module's adapter, `sqrt(eᵀ K_m e)`.

    Raises:
        OutputError: the outputs do not determine a loss.
    """
    error = Problem.of(kernels, ridge=1.0).error
    return tuple(sorted(kernels.names, key=lambda name: -float(error @ kernels[name] @ error)))


BASELINES: Mapping[str, Order] = MappingProxyType(
    {
        "random": random_order,
        "first_layers": first_layers,
        "last_layers": last_layers,
        "qv": query_value,
        "attention_only": attention_only,
        "mlp_only": mlp_only,
        "all_linear": all_linear,
        "gradient_norm": gradient_norm,
    }
)


def baseline(name: str, kernels: ModuleKernels, budget: BudgetLike, seed: int = 0) -> tuple[str, ...]:
    """The modules that the baseline `name` takes within a budget, best first.

    A baseline that has fewer eligible modules than the budget allows takes those.

    Raises:
        CriterionError: an unknown baseline.
        TargetError: no candidate is of the kind that the baseline takes.
        BudgetError: as `recommend`.
    """
    if name not in BASELINES:
        raise CriterionError(f"unknown baseline {name!r}; there are: {', '.join(BASELINES)}")
    limit = budget_for(budget, kernels)
    return fill(BASELINES[name](kernels, seed), limit, kernels.num_parameters)


def kappa_order(model: nn.Module, kernels: ModuleKernels) -> tuple[str, ...]:
    """KappaTune, by peft's own `KappaTuneSelector`: ascending condition number of the *weights*; candidates only.

    It ranks `nn.Linear` alone, so candidates of other types (Conv1D) are missing from its order.

    Raises:
        TargetError: it ranks none of the candidates.
        ImportError: this peft has no KappaTuneSelector (it came after 0.17).
    """
    from peft.helpers import KappaTuneSelector  # later than the lowest peft that is admitted

    ranked = KappaTuneSelector(model, show_progress=False).get_best_targets()
    order = tuple(name for name in ranked if name in kernels)
    if not order:
        raise TargetError(f"KappaTune ranks nn.Linear modules only, and none of the {len(kernels)} candidates is one")
    return order


def equal_parameter_rank(kernels: ModuleKernels, parameters: int) -> int:
    """The largest rank at which all candidates together have at most `parameters` adapter parameters; at least 1.

    Adapter parameters are proportional to the rank, `r·(d_in + d_out)` a module.
    """
    per_rank = sum(kernels.num_parameters.values()) / kernels.rank
    return max(1, int(parameters / per_rank + 1e-9))


def _layered(kernels: ModuleKernels) -> list[str]:
    names = [name for name in kernels.names if parse_name(name).layer is not None]
    if not names:
        raise TargetError(f"no candidate's name has a layer number: {', '.join(kernels.names)}")
    return names


def _only(kernels: ModuleKernels, keep: Callable[[ModuleName], bool], what: str) -> tuple[str, ...]:
    eligible = [name for name in kernels.names if keep(parse_name(name))]
    if not eligible:
        raise TargetError(f"no candidate's name reads like a {what}: {', '.join(kernels.names)}")
    return tuple(sorted(eligible, key=lambda name: -(parse_name(name).layer or 0)))
