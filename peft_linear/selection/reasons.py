# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A sentence with numbers for every candidate: why it was chosen or not."""

from __future__ import annotations

from collections.abc import Mapping

from .choice import Choice
from .criteria import Criterion, rank_by_score


TIE = 1e-9  # relative difference of scores that is rounding
FORCED = " (worse; the best module that still fits)"


def explain(
    choice: Choice, scores: Mapping[str, float], criterion: Criterion, num_parameters: Mapping[str, int]
) -> dict[str, str]:
    """A sentence for every candidate, in the order of `scores`."""
    ranks = {name: rank for rank, name in enumerate(rank_by_score(scores, criterion), start=1)}
    reasons = {}
    for name, score in scores.items():
        alone = f"alone {score:.4g}, rank {ranks[name]} of {len(scores)}"
        if name in choice.modules:
            reasons[name] = f"{_picked(choice, name, criterion)}; {alone}"
        else:
            reasons[name] = f"not chosen: {_rejected(choice, name, criterion, num_parameters)}{alone}"
    return reasons


def _picked(choice: Choice, name: str, criterion: Criterion) -> str:
    result = choice.result
    place = result.order.index(name)
    before = result.path[place - 1] if place else result.start
    return f"pick {place + 1} of {len(result.order)}: {_change(criterion, before, result.path[place])}"


def _rejected(choice: Choice, name: str, criterion: Criterion, num_parameters: Mapping[str, int]) -> str:
    """The reason for a rejection; the score of the module alone follows it."""
    result, budget = choice.result, choice.budget
    if name in choice.excluded:
        return "excluded by `exclude`; "
    if name in result.last_round:
        return f"{_instead(criterion, result.last_round[name], result.path[-1])}; "
    left = (budget.parameters or 0) - sum(num_parameters[chosen] for chosen in result.order)
    if budget.parameters is not None and num_parameters[name] > left:
        return f"its {num_parameters[name]:,} parameters do not fit beside the choice, {left:,} are left; "
    beside = budget.spent(dict.fromkeys([*result.order, name], budget.rank)) if budget.by_place else {}
    over = {kind: share for kind, share in beside.items() if share > 1}
    if over:
        most = max(over, key=over.__getitem__)
        return f"it does not fit beside the choice, with it the budget of {most} is used to {over[most]:.0%}; "
    return f"{criterion.label} "


def _change(criterion: Criterion, before: float, after: float) -> str:
    verb = "leaves" if after == before else "lowers" if after < before else "raises"
    judgement = FORCED if criterion.utility(after) < criterion.utility(before) else ""
    change = (
        f"by {abs(after - before):.2g} (from {before:.4g} to {after:.4g})" if after != before else f"at {after:.4g}"
    )
    return f"{verb} the {criterion.label} {change}{judgement}"


def _instead(criterion: Criterion, score: float, taken: float) -> str:
    difference = f"{abs(score - taken):.2g}"
    if abs(score - taken) <= TIE * max(abs(score), abs(taken)):
        judgement = "tied with the pick, which is earlier in the model"
    elif criterion.utility(score) > criterion.utility(taken):
        judgement = f"{difference} better than the pick, but worse per parameter"
    else:
        judgement = f"{difference} worse than the pick"
    return f"in place of the last pick it would give {criterion.label} {score:.4g}, {judgement}"
