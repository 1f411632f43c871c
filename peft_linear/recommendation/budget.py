# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A budget: what a choice of modules and ranks may use, in modules, layers, parameters, training time and memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..errors import BudgetError
from ..kernels.module_kernels import ModuleKernels
from .cost import StepCost
from .names import parse_name


One = int | float | str
BudgetLike = One | Sequence[One]  # several: all of them hold
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_TEXT = re.compile(r"\s*(\d+(?:[._]\d+)*)\s*([kmb]?)\s*", re.IGNORECASE)
_KIND = re.compile(r"\s*([A-Za-z]+)\s*:\s*(.*?)\s*")
_KINDS = ("layers", "time", "memory")
_FORMS = (
    'pass a number of modules (8), a fraction of the candidates\' parameters (0.25), parameters ("1.5M", "200k"), '
    '"layers:4", a share of the time or memory of an all-linear LoRA step ("time:0.6", "memory:0.6"), or a list of '
    "several"
)


@dataclass(frozen=True)
class Budget:
    """At most so much of whatever is not None; all limits hold.

    Args:
        modules, parameters, layers: Numbers of them.
        time, memory: Shares of an all-linear LoRA step at `rank`, training memory with the weights.
        rank: Of the adapters that `num_parameters` and the shares are for.
        num_parameters: Adapter parameters of every candidate at `rank`.
        cost: Of a step; only where there is a limit of time or memory.
    """

    modules: int | None = None
    parameters: int | None = None
    layers: int | None = None
    time: float | None = None
    memory: float | None = None
    rank: int = field(default=8, compare=False)
    num_parameters: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    cost: StepCost | None = field(default=None, compare=False, repr=False)

    @property
    def limits(self) -> dict[str, float]:
        """{kind: limit} of those that are set."""
        kinds = ("modules", "parameters", "layers", "time", "memory")
        return {kind: limit for kind in kinds if (limit := getattr(self, kind)) is not None}

    @property
    def simple(self) -> bool:
        """Whether it is one number of modules or parameters, so that modules add up."""
        return len(self.limits) == 1 and not self.by_place

    @property
    def by_place(self) -> bool:
        """Whether it depends on which modules are taken together: what a module takes depends on the others."""
        return self.layers is not None or self.time is not None or self.memory is not None

    def fits(self, count: int, parameters: int) -> bool:
        """Whether `count` modules with `parameters` adapter parameters together are within these two limits."""
        return (self.modules is None or count <= self.modules) and (
            self.parameters is None or parameters <= self.parameters
        )

    def allows(self, ranks: Mapping[str, int]) -> bool:
        """Whether adapters of these ranks are within all limits; rank 0 is no adapter.

        What is allowed stays so with fewer modules and lower ranks.
        """
        return all(share <= 1 + 1e-12 for share in self.spent(ranks).values())

    def spent(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """{kind: share of the limit that adapters of these ranks use}; 1 is used up, more is not allowed."""
        ranks = {name: rank for name, rank in ranks.items() if rank > 0}
        return {kind: self._used(kind, ranks) / limit for kind, limit in self.limits.items()}

    def __str__(self) -> str:
        return ", ".join(_words(kind, limit) for kind, limit in self.limits.items())

    def _used(self, kind: str, ranks: Mapping[str, int]) -> float:
        if kind == "modules":
            return len(ranks)
        if kind == "parameters":
            return sum(self.num_parameters[name] * rank / self.rank for name, rank in ranks.items())
        if kind == "layers":
            return len({(name.stack, name.layer) for name in map(parse_name, ranks) if name.layer is not None})
        if self.cost is None:
            raise BudgetError(f"a budget of {kind} needs the counts of a training step; pass `cost`")
        return self.cost.time(ranks) / self._whole[0] if kind == "time" else self.cost.memory(ranks) / self._whole[1]

    @cached_property
    def _whole(self) -> tuple[float, float]:
        """Time and memory of the all-linear step."""
        if self.cost is None:
            return 1.0, 1.0
        ranks = self.cost.all_linear(self.rank)
        return self.cost.time(ranks), self.cost.memory(ranks)


def needs_cost(budget: object) -> bool:
    """Whether a budget is of time or memory, as far as it can be read."""
    return any(
        isinstance(each, str) and each.strip().lower().startswith(("time", "memory")) for each in as_several(budget)
    )


def as_several(budget: object) -> tuple:
    """The budgets that were passed, one or several."""
    return tuple(budget) if isinstance(budget, (list, tuple)) else (budget,)


def budget_for(budget: BudgetLike, kernels: ModuleKernels) -> Budget:
    """`parse_budget` for the candidates that kernels are of, at their rank.

    Raises:
        BudgetError: as `parse_budget`, or the kernels hold no counts of a training step.
    """
    cost = StepCost.of_kernels(kernels.provenance) if needs_cost(budget) else None
    return parse_budget(budget, kernels.num_parameters, kernels.rank, cost)


def parse_budget(
    budget: BudgetLike,
    num_parameters: Mapping[str, int],
    rank: int = 8,
    cost: StepCost | None = None,
    lowest_rank: int | None = None,
) -> Budget:
    """What the user wrote, checked against the candidates.

    Args:
        budget: int: number of modules. float in (0, 1]: fraction of the adapter parameters of all candidates.
            str: adapter parameters ("1.5M", "200k", "98304"), "layers:4", or "time:0.6" and "memory:0.6": a share of
            an all-linear LoRA step at `rank`. A list or tuple: all of these, the lower one of two of a kind.
        num_parameters: Adapter parameters of each candidate at `rank`.
        cost: Counts of a training step, for "time:" and "memory:"; without it these are only read.
        lowest_rank: Of the adapters that may be chosen (default: `rank`); one of them must fit.

    Raises:
        BudgetError: the budget is none of these, selects nothing, or is above what the candidates have.
    """
    if not num_parameters:
        raise BudgetError("there are no candidate modules to spend a budget on; check `targets`")
    several = as_several(budget)
    if not several:
        raise BudgetError(f"a budget of {budget!r} has no limit in it; {_FORMS}")
    limits: dict[str, float] = {}
    for each in several:
        kind, limit = _parse_one(each, num_parameters)
        limits[kind] = min(limit, limits.get(kind, math.inf))
    found = replace(Budget(rank=rank, num_parameters=num_parameters, cost=cost), **limits)  # type: ignore[arg-type]
    _check_that_one_fits(found, budget, lowest_rank or rank)
    return found


def fill(order: Iterable[str], budget: Budget, num_parameters: Mapping[str, int]) -> tuple[str, ...]:
    """The modules of `order`, best first, as far as they fit; a module too large for what is left is passed over."""
    chosen: list[str] = []
    used = 0
    for name in order:
        if budget.fits(len(chosen) + 1, used + num_parameters[name]) and (
            not budget.by_place or budget.allows(dict.fromkeys([*chosen, name], budget.rank))
        ):
            chosen.append(name)
            used += num_parameters[name]
    return tuple(chosen)


def parse_parameters(text: str, forms: str = _FORMS) -> int:
    """Parameters written as "1.5M", "200k" or "98304".

    Raises:
        BudgetError: the text is not that; `forms` says in the message what would be.
    """
    match = _TEXT.fullmatch(text)
    try:
        number = float(match.group(1)) if match else math.nan
    except ValueError:
        number = math.nan
    if not match or math.isnan(number):
        raise BudgetError(f"cannot read the budget {text!r}; {forms}")
    return math.floor(number * _UNITS[match.group(2).lower()] + 1e-6)


def _parse_one(budget: object, num_parameters: Mapping[str, int]) -> tuple[str, float]:
    """(kind, limit) of one budget."""
    total = sum(num_parameters.values())
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise BudgetError(f"budget must be an int, a float or a string, got {budget!r}; {_FORMS}")
    if isinstance(budget, int):
        if not 1 <= budget <= len(num_parameters):
            raise BudgetError(
                f"a budget of {budget} modules, but there are 1 to {len(num_parameters)} to choose; {_FORMS}"
            )
        return "modules", budget
    if isinstance(budget, float):
        if not (math.isfinite(budget) and 0 < budget <= 1):
            raise BudgetError(f"a fraction must be in (0, 1], got {budget}; {_FORMS}")
        return "parameters", math.floor(budget * total + 1e-9)
    if match := _KIND.fullmatch(budget):
        return _parse_kind(match[1].lower(), match[2], budget, num_parameters)
    parameters = parse_parameters(budget)
    if parameters > total:
        raise BudgetError(
            f"a budget of {parameters:,} parameters, but all candidates together have {total:,}; {_FORMS}"
        )
    return "parameters", parameters


def _parse_kind(kind: str, amount: str, budget: str, num_parameters: Mapping[str, int]) -> tuple[str, float]:
    """(kind, limit) of "layers:4", "time:0.6" or "memory:0.6"."""
    if kind not in _KINDS:
        raise BudgetError(f"there is no budget of {kind!r}, got {budget!r}; {_FORMS}")
    if kind == "layers":
        names = map(parse_name, num_parameters)
        layers = len({(name.stack, name.layer) for name in names if name.layer is not None})
        if not (amount.isascii() and amount.isdigit() and 1 <= int(amount) <= layers):
            raise BudgetError(f"{budget!r} must name 1 to {layers} layers, those with candidates; {_FORMS}")
        return kind, int(amount)
    try:
        share = float(amount)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise BudgetError(f"{budget!r} must be a share in (0, 1] of an all-linear LoRA step; {_FORMS}")
    return kind, share


def _check_that_one_fits(budget: Budget, written: BudgetLike, lowest_rank: int) -> None:
    """Raises BudgetError where no candidate alone is within all limits."""
    candidates = budget.num_parameters
    smallest = min(candidates.values()) * lowest_rank / budget.rank
    if budget.parameters is not None and budget.parameters < smallest:
        raise BudgetError(
            f"a budget of {written!r} is {budget.parameters:,} parameters, but the smallest candidate has "
            f"{smallest:,.0f}; raise the budget or lower the rank"
        )
    if budget.cost is None:
        return
    alone = {name: budget.spent({name: lowest_rank}) for name in candidates}
    for kind in ("time", "memory"):
        limit = getattr(budget, kind)
        if limit is None:
            continue
        least = min(alone, key=lambda name: alone[name][kind])
        if alone[least][kind] > 1:
            raise BudgetError(
                f"a budget of {written!r} fits no module: {least} alone takes {limit * alone[least][kind]:.2f} of the "
                f"{kind} of an all-linear LoRA step, the least of all candidates; raise the share"
            )
    if not any(all(share <= 1 for share in spent.values()) for spent in alone.values()):
        raise BudgetError(f"no module alone is within all of {written!r}; raise one of them")


def _words(kind: str, limit: float) -> str:
    if kind in ("time", "memory"):
        return f"{limit:.0%} of the {kind} of an all-linear step"
    return f"{limit:,} {kind.removesuffix('s') if limit == 1 and kind != 'parameters' else kind}"
