# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A budget: how many modules, or how many adapter parameters, a choice may use."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import BudgetError


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_TEXT = re.compile(r"\s*(\d+(?:[._]\d+)*)\s*([kmb]?)\s*", re.IGNORECASE)
_FORMS = (
    'pass a number of modules (8), a fraction of the candidates\' parameters (0.25) or parameters ("1.5M", "200k")'
)


@dataclass(frozen=True)
class Budget:
    """At most `modules` modules, or at most `parameters` adapter parameters; exactly one of the two is set."""

    modules: int | None
    parameters: int | None

    def fits(self, count: int, parameters: int) -> bool:
        """Whether a set of `count` modules with `parameters` adapter parameters together is within the budget."""
        if self.modules is not None:
            return count <= self.modules
        return parameters <= (self.parameters or 0)

    def __str__(self) -> str:
        if self.modules is not None:
            return f"{self.modules} module{'s' if self.modules != 1 else ''}"
        return f"{self.parameters:,} parameters"


def parse_budget(budget: int | float | str, num_parameters: Mapping[str, int]) -> Budget:
    """What the user wrote, checked against the candidates.

    Args:
        budget: int: number of modules. float in (0, 1]: fraction of the adapter parameters of all candidates.
            str: adapter parameters, "1.5M", "200k", "98304".
        num_parameters: Adapter parameters of each candidate.

    Raises:
        BudgetError: the budget is none of these, selects nothing, or is above what the candidates have.
    """
    if not num_parameters:
        raise BudgetError("there are no candidate modules to spend a budget on; check `targets`")
    total, smallest = sum(num_parameters.values()), min(num_parameters.values())
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise BudgetError(f"budget must be an int, a float or a string, got {budget!r}; {_FORMS}")
    if isinstance(budget, int):
        if not 1 <= budget <= len(num_parameters):
            raise BudgetError(
                f"a budget of {budget} modules, but there are 1 to {len(num_parameters)} to choose; {_FORMS}"
            )
        return Budget(modules=budget, parameters=None)
    if isinstance(budget, float):
        if not (math.isfinite(budget) and 0 < budget <= 1):
            raise BudgetError(f"a fraction must be in (0, 1], got {budget}; {_FORMS}")
        parameters = math.floor(budget * total + 1e-9)
    else:
        parameters = parse_parameters(budget)
        if parameters > total:
            raise BudgetError(
                f"a budget of {parameters:,} parameters, but all candidates together have {total:,}; {_FORMS}"
            )
    if parameters < smallest:
        raise BudgetError(
            f"a budget of {budget!r} is {parameters:,} parameters, but the smallest candidate has {smallest:,}; "
            "raise the budget or lower the rank"
        )
    return Budget(modules=None, parameters=parameters)


def fill(order: Iterable[str], budget: Budget, num_parameters: Mapping[str, int]) -> tuple[str, ...]:
    """The modules of `order`, best first, as far as they fit; a module too large for what is left is passed over."""
    chosen: list[str] = []
    used = 0
    for name in order:
        if budget.fits(len(chosen) + 1, used + num_parameters[name]):
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
