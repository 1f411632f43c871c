# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks that differ by module: a budget of adapter parameters, distributed by effective dimension.

**What rank a module needs.** Fitting k outputs with the linearised model while keeping the change of the weights small
(the sum of nuclear norms, which is what a penalty on LoRA's factors amounts to) is a semidefinite program with k
constraints and one block for each module, and has a solution whose ranks satisfy

    Σ_m r_m(r_m + 1)/2 ≤ k                                                                                (1)

(Pataki, 1998, for the program; Jang, Lee and Ryu, arXiv 2402.11867, for LoRA in the kernel regime). Ridge regression
does not fit all k = n outputs, but d = Σ_i λi/(λi + λ) directions of them, the effective dimension of the kernel
K_S = K_0 + Σ_{m∈S} K_m, and it does so through module m to the extent of

    d_m = tr K_m (K_S + λI)⁻¹,   d_0 + Σ_m d_m = d.                                                       (2)

Two modules with the same kernel share what one of them would have. Counting r_m(r_m + 1)/2 directions for a rank and
d_m for the need, as (1) and (2) do for the sums, the *coverage* of a module is

    r_m(r_m + 1) / (2·d_m),                                                                               (3)

and the ranks chosen here make the smallest coverage as large as the budget allows. So r_m grows as √d_m: four times
the effective dimension, twice the rank. Where the uniform rank covers every module at least once, (1) says that rank
is not what holds the linearised model back.

All of it is about the start of training, and dividing (1) among the modules as (2) does is a choice; whether such
ranks train better than a uniform one is a matter of measurement. The kernels are those of the paper (arXiv
2602.08239, section 4); the rule is not in it.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import BudgetError, PeftLinearError
from ..functional.regression import solve_ridge
from ..kernels.module_kernels import ModuleKernels
from .budget import parse_parameters


_FORMS = 'pass adapter parameters ("1.5M", "200k"), a fraction of all candidates\' parameters (0.25), or None'


def effective_dimensions(kernels: ModuleKernels, modules: Iterable[str], ridge: float) -> dict[str, float]:
    """`d_m = tr K_m (K_S + λI)⁻¹` of every module of S; with the head's they add up to that of K_S.

    One inverse, O(n³), and O(n²) for each module.

    Args:
        kernels: At one rank.
        modules: S.
        ridge: λ > 0, in the unit of the kernels' eigenvalues.
    """
    names = tuple(modules)
    gram = kernels.subset(names)
    inverse = solve_ridge(gram, torch.eye(len(gram), dtype=gram.dtype), ridge)
    return {name: max(float((kernels[name] * inverse).sum()), 0.0) for name in names}


def distribute_ranks(
    dimensions: Mapping[str, float],
    shapes: Mapping[str, Sequence[int]],
    parameters: int,
) -> dict[str, int]:
    """Integer ranks `1 ≤ r_m ≤ min(d_in, d_out)` with `Σ (d_in + d_out)·r_m ≤ parameters` and the best coverage.

    Every module starts with rank 1. Then the next rank goes to the module with the smallest coverage
    `r_m(r_m + 1)/(2·d_m)` among those that are below full rank and for which it fits, until there is none: what is
    left of the budget is less than the cheapest further rank. No ranks within the budget have a larger smallest
    coverage over the modules below full rank: A larger minimum would need all ranks assigned so far and the first one
    that did not fit.
    Equal modules differ by at most one rank; of modules of one shape none with a larger d_m has a smaller rank; a
    common factor of the d_m changes nothing. O(R·log M) for R ranks together.

    Args:
        dimensions: d_m ≥ 0 of each module; the order breaks ties.
        shapes: (d_in, d_out) of each module.
        parameters: P.

    Raises:
        BudgetError: rank 1 everywhere costs more than `parameters`, or full rank everywhere less.
        PeftLinearError: a d_m that is negative or not finite.
    """
    bad = {name: value for name, value in dimensions.items() if not (math.isfinite(value) and value >= 0)}
    if bad:
        raise PeftLinearError(f"effective dimensions must be finite numbers ≥ 0, got {bad}; compute the kernels again")
    cost = {name: shapes[name][0] + shapes[name][1] for name in dimensions}
    most = {name: min(shapes[name]) for name in dimensions}
    left = parameters - sum(cost.values())
    if left < 0:
        raise BudgetError(
            f"{parameters:,} parameters are too few for {len(cost)} modules: rank 1 takes {sum(cost.values()):,}; "
            "raise the budget or recommend fewer modules"
        )
    if parameters > sum(cost[name] * most[name] for name in cost):
        raise BudgetError(
            f"{parameters:,} parameters are more than {len(cost)} modules can hold: full rank takes "
            f"{sum(cost[name] * most[name] for name in cost):,}; lower the budget"
        )
    ranks = dict.fromkeys(dimensions, 1)
    order = {name: place for place, name in enumerate(dimensions)}

    def next_rank(name: str) -> tuple[float, int, int, str]:
        return coverage(ranks[name], dimensions[name]), ranks[name], order[name], name

    waiting = [next_rank(name) for name in ranks if most[name] > 1]
    heapq.heapify(waiting)
    while waiting:
        name = heapq.heappop(waiting)[-1]
        if cost[name] > left:
            continue  # nor will it fit later
        ranks[name] += 1
        left -= cost[name]
        if ranks[name] < most[name]:
            heapq.heappush(waiting, next_rank(name))
    return ranks


def coverage(rank: int, dimension: float) -> float:
    """`r(r + 1)/(2·d)`: the directions counted for a rank, for each that is needed; ∞ where none is."""
    return rank * (rank + 1) / (2 * dimension) if dimension > 0 else math.inf


def rank_patterns(
    ranks: Mapping[str, int], uniform: int, lora_alpha: float, use_rslora: bool = False
) -> tuple[dict[str, int], dict[str, float]]:
    """peft's `rank_pattern` and `alpha_pattern` by which every module has its rank and the scaling of the uniform one.

    The scaling is α/r, with `use_rslora` α/√r. peft takes keys as regular expressions and tries them, in order, on
    the ends of names too: they are escaped and anchored, so that each matches one module.
    """
    power = 0.5 if use_rslora else 1.0
    keys = {name: f"^{re.escape(name)}" for name in ranks}
    alphas = {keys[name]: plain_number(lora_alpha * (rank / uniform) ** power) for name, rank in ranks.items()}
    return {keys[name]: rank for name, rank in ranks.items()}, alphas


def plain_alpha(config: Any) -> float:
    """α by which α/r is the scaling of an adapter with this config: with `use_rslora` α·√r, whose scaling is α/√r."""
    return config.lora_alpha * (math.sqrt(config.r) if getattr(config, "use_rslora", False) else 1)


def plain_number(value: float) -> Any:
    """An int where it is one, as peft's configs are written."""
    return int(value) if value == int(value) else value


def parse_rank_budget(budget: float | str | None, uniform: int, everything: int) -> int:
    """Adapter parameters that were meant.

    Args:
        budget: str: parameters, "1.5M", "200k". float in (0, 1]: fraction of `everything`. None: `uniform`.
        uniform: Parameters of the chosen modules at the uniform rank.
        everything: Parameters of all candidates at that rank.

    Raises:
        BudgetError: the budget is none of these; a number of modules is not one, for they are chosen already.
    """
    if budget is None:
        return uniform
    if isinstance(budget, bool) or not isinstance(budget, (float, str)):
        raise BudgetError(f"the budget of adaptive ranks is a number of parameters, got {budget!r}; {_FORMS}")
    if isinstance(budget, str):
        return parse_parameters(budget, _FORMS)
    if not (math.isfinite(budget) and 0 < budget <= 1):
        raise BudgetError(f"a fraction must be in (0, 1], got {budget}; {_FORMS}")
    return math.floor(budget * everything + 1e-9)
