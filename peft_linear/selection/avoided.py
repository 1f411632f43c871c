# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Candidates that a choice leaves for last, whatever their score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import PeftLinearError
from ..recommendation.budget import Budget


# BERT's pooler lies right below a new head and learns nearly what the head learns: the best single module in short
# runs at small rates, and the one that overfits and breaks first in others (docs/decisions/0012).
AVOIDED = ("pooler",)


def check_avoid(avoid: object) -> frozenset[str]:
    """Parts of names, from one or several.

    Raises:
        PeftLinearError: something else.
    """
    parts = list(avoid) if isinstance(avoid, Iterable) and not isinstance(avoid, str) else [avoid]
    if not all(isinstance(part, str) for part in parts):
        raise PeftLinearError(f'avoid must be parts of module names, such as ("pooler",), or (), got {avoid!r}')
    return frozenset(map(str, parts))


def left_for_last(
    num_parameters: Mapping[str, int], budget: Budget, avoid: str | Sequence[str] = AVOIDED
) -> tuple[str, ...]:
    """The candidates that a choice within the budget does without, in model order.

    Args:
        num_parameters: Of every candidate.
        avoid: A component of module names, or several: "pooler" is one of "bert.pooler.dense".

    Returns:
        Those with such a component. None where the others cannot use the budget: where it has room for all candidates,
        for more modules than there are others, or for none of the others.

    Raises:
        PeftLinearError: as `check_avoid`.
    """
    parts = check_avoid(avoid)
    avoided = tuple(name for name in num_parameters if parts & set(name.split(".")))
    others = [size for name, size in num_parameters.items() if name not in avoided]
    if not others or budget.fits(len(num_parameters), sum(num_parameters.values())):
        return ()
    if budget.modules is not None:
        return avoided if budget.modules <= len(others) else ()
    return avoided if budget.fits(1, min(others)) else ()
