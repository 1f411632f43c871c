# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Candidates that are scored but not chosen, unless the others cannot use the budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import PeftLinearError
from ..recommendation.budget import Budget


# BERT's pooler lies right below a new head and learns nearly what the head learns: the best single module in short
# runs at small rates, and the one that overfits and breaks first in others (docs/decisions/0012).
DEFAULT_EXCLUDE = ("pooler",)


def check_exclude(exclude: object) -> frozenset[str]:
    """Components of names, from one or several.

    Raises:
        PeftLinearError: something else.
    """
    parts = list(exclude) if isinstance(exclude, Iterable) and not isinstance(exclude, str) else [exclude]
    if not all(isinstance(part, str) for part in parts):
        raise PeftLinearError(
            f'exclude must be components of module names, such as ("pooler",), or (), got {exclude!r}'
        )
    return frozenset(map(str, parts))


def excluded_candidates(
    num_parameters: Mapping[str, int], budget: Budget, exclude: str | Sequence[str] = DEFAULT_EXCLUDE
) -> tuple[str, ...]:
    """The candidates that are not to be chosen within the budget, in model order.

    Args:
        num_parameters: Of every candidate.
        exclude: A component of module names, or several: "pooler" is one of "bert.pooler.dense".

    Returns:
        Those with such a component. Empty if all candidates fit, if the budget is for more modules than there are
        others, or if none of the others fits.

    Raises:
        PeftLinearError: as `check_exclude`.
    """
    parts = check_exclude(exclude)
    excluded = tuple(name for name in num_parameters if parts & set(name.split(".")))
    others = {name: size for name, size in num_parameters.items() if name not in excluded}
    if not others or _fits(budget, num_parameters):
        return ()
    if budget.modules is not None and budget.modules > len(others):
        return ()
    return excluded if any(_fits(budget, {name: size}) for name, size in others.items()) else ()


def _fits(budget: Budget, sizes: Mapping[str, int]) -> bool:
    within = budget.fits(len(sizes), sum(sizes.values()))
    return within and (not budget.by_place or budget.allows(dict.fromkeys(sizes, budget.rank)))
