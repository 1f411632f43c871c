# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Plain sentences with numbers: why each candidate was chosen or not, and what to know before trusting it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..functional.spectrum import Spectrum
from ..kernels.module_kernels import ModuleKernels
from ..recommendation.budget import Budget
from .baselines.by_kernels import equal_parameter_rank
from .criteria import Criterion, rank_by_score
from .problem import Problem
from .reliability import Reliability
from .search.search_result import Change, SearchResult


FEW_EXAMPLES = 32
BARELY_DIFFERENT = 0.01  # range of the candidates' scores, relative to the largest
FORCED = ", which is worse, but the best that fits the budget"
WIDE_SPREAD = 0.3  # relative deviation of a module's kernel between draws of A


def explain(
    result: SearchResult,
    singles: Mapping[str, float],
    criterion: Criterion,
    budget: Budget,
    num_parameters: Mapping[str, int],
    strategy: str,
    avoided: Sequence[str] = (),
) -> dict[str, str]:
    """A sentence for every candidate."""
    ranks = {name: rank for rank, name in enumerate(rank_by_score(dict(singles), criterion), start=1)}
    left = (budget.parameters or 0) - sum(num_parameters[name] for name in result.order)
    scored = {**result.last_round, **result.last_limits}
    left_by = {change.out: change for change in result.changes}
    came_for = {change.into: change.out for change in result.changes}
    reasons = {}
    for name, score in singles.items():
        alone = f"alone {score:.4g}, rank {ranks[name]} of {len(singles)}"
        if name in avoided:
            reasons[name] = f"not chosen: left for last, for others can use the budget; {alone}"
        elif name in result.order:
            place = result.order.index(name)
            before = result.path[place - 1] if place else result.start
            change = _change(criterion, before, result.path[place])
            exchange = f"; came in for {came_for[name]}" if name in came_for else ""
            reasons[name] = f"pick {place + 1} of {len(result.order)}: {change}{exchange}; {alone}"
        elif name in left_by:
            reasons[name] = f"not chosen: {_left(criterion, left_by[name])}; {alone}"
        elif budget.parameters is not None and num_parameters[name] > left and name not in scored:
            reasons[name] = (
                f"not chosen: its {num_parameters[name]:,} parameters do not fit beside the choice, {left:,} are "
                f"left; {alone}"
            )
        elif name in result.last_round:
            reasons[name] = f"not chosen: {_instead(criterion, result.last_round[name], result.path[-1])}; {alone}"
        elif name in result.last_limits:
            reasons[name] = f"not chosen: {_at_best(criterion, result.last_limits[name], result.path[-1])}; {alone}"
        elif strategy == "swap" and not criterion.additive:
            reasons[name] = f"not chosen: in place of no chosen module does it improve the set; {alone}"
        elif strategy == "exhaustive":
            reasons[name] = (
                f"not chosen: not in the best set, whose {criterion.label} is {result.path[-1]:.4g}; {alone}"
            )
        else:
            reasons[name] = f"not chosen: {criterion.label} {alone}"
    return reasons


def notes_on(
    kernels: ModuleKernels,
    result: SearchResult,
    singles: Mapping[str, float],
    criterion: Criterion,
    problem: Problem,
    chosen: Spectrum,
    reliability: Reliability | None = None,
    avoided: Sequence[str] = (),
) -> tuple[str, ...]:
    """What would make a careful reader doubt the choice; empty where nothing does."""
    notes = []
    if kernels.num_examples < FEW_EXAMPLES:
        notes.append(
            f"Only {kernels.num_examples} examples: scores from fewer than {FEW_EXAMPLES} change much with the "
            "sample; pass more batches."
        )
    if reliability is not None and not reliability.signal:
        parameters = sum(kernels.num_parameters[name] for name in result.order)
        rank = equal_parameter_rank(kernels, parameters)
        without = f"; with few examples leave out {', '.join(avoided)}" if avoided else ""
        notes.append(
            f"No signal: between two halves of the examples the order of the candidates has a rank correlation of "
            f"{reliability.halves:.2f}, which chance gives too (up to {reliability.threshold:.2f}). Pass more "
            f"examples, or adapt all {len(singles)} candidates at rank {rank}, which has about as many parameters"
            f"{without}."
        )
    low, high = min(singles.values()), max(singles.values())
    largest = max(abs(low), abs(high))
    if len(singles) > 1 and high - low <= BARELY_DIFFERENT * largest:
        share = (high - low) / largest if largest else 0.0
        notes.append(
            f"The candidates' scores differ by {share:.2%} at most ({low:.4g} to {high:.4g}): the choice is hardly "
            "better than a random one."
        )
    gains = [abs(score - result.start) for score in singles.values()]
    small = sum(gain < BARELY_DIFFERENT * max(gains) for gain in gains)
    if small > len(singles) / 2:
        notes.append(
            f"{small} of {len(singles)} candidates, each alone, move the {criterion.label} by less than "
            f"{BARELY_DIFFERENT:.0%} of what the one that moves it most does: their order says little."
        )
    utilities = [criterion.utility(score) for score in (result.start, *result.path)]
    best = max(range(len(utilities)), key=utilities.__getitem__)
    if best < len(result.path):
        modules = "module" if best == 1 else "modules"
        at_best = (result.start, *result.path)[best]
        notes.append(
            f"The {criterion.label} is best with the first {best} {modules} ({at_best:.4g}); the rest of the budget "
            f"takes it to {result.path[-1]:.4g}. A smaller budget may do."
        )
    if "residual" in problem.provides and criterion.name == "leave_one_out":
        nothing = float(problem.residual.square().sum()) / problem.num_examples
        if result.path[-1] >= nothing:
            notes.append(
                f"The linear theory predicts no gain on unseen examples: leave-one-out error {result.path[-1]:.4g} "
                f"against {nothing:.4g} of the model as it is."
            )
    if criterion.name == "condition_number" and chosen.numerical_rank < len(chosen):
        notes.append(
            f"The kernel of the choice has numerical rank {chosen.numerical_rank} of {len(chosen)}: its condition "
            f"number is λ1/ridge + 1 and depends on the ridge ({problem.ridge:.3g})."
        )
    wide = {name: spread for name, spread in kernels.spread.items() if spread > WIDE_SPREAD}
    if wide:
        worst = max(wide, key=wide.__getitem__)
        notes.append(
            f"The kernels of {len(wide)} of {len(singles)} modules differ by more than {WIDE_SPREAD:.0%} between "
            f"draws of LoRA's random A (most: {worst}, {wide[worst]:.0%}); more draws would make the scores surer."
        )
    worst_chosen = min(criterion.utility(singles[name]) for name in result.order)
    passed_over = [name for name in avoided if criterion.utility(singles[name]) > worst_chosen]
    if passed_over:
        notes.append(
            f"{', '.join(passed_over)}: left for last, though alone ahead of some that are chosen. A pooler lies "
            "right below the head and learns nearly what the head learns; in our measurements it paid in short runs "
            "at small learning rates, and did harm at large ones and where few examples are seen many times. Pass "
            "avoid=() to have it chosen by its score."
        )
    return tuple(notes)


def _change(criterion: Criterion, before: float, after: float, if_worse: str = FORCED) -> str:
    verb = "leaves" if after == before else "lowers" if after < before else "raises"
    judgement = if_worse if criterion.utility(after) < criterion.utility(before) else ""
    change = (
        f"by {abs(after - before):.2g} (from {before:.4g} to {after:.4g})" if after != before else f"at {after:.4g}"
    )
    return f"{verb} the {criterion.label} {change}{judgement}"


def _left(criterion: Criterion, change: Change) -> str:
    if change.into is None:
        effect = _change(criterion, change.before, change.after, if_worse="")
        return f"removed {_ordinal(change.round)}, as the one missed least: that {effect}"
    return f"exchanged for {change.into}, which {_change(criterion, change.before, change.after)}"


def _ordinal(number: int) -> str:
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _at_best(criterion: Criterion, limit: float, taken: float) -> str:
    """Of a module that was not scored, for a bound rules it out."""
    judgement = "less for its parameters" if criterion.utility(limit) > criterion.utility(taken) else "worse"
    return f"in place of the last pick it would give {criterion.label} {limit:.4g} at best, which is {judgement}"


def _instead(criterion: Criterion, score: float, taken: float) -> str:
    difference = f"{abs(score - taken):.2g}"
    if criterion.utility(score) > criterion.utility(taken):
        judgement = f"{difference} better than the pick, but at more parameters for what it gives"
    else:
        judgement = f"{difference} worse than the pick" if score != taken else "as good as the pick, which comes first"
    return f"in place of the last pick it would give {criterion.label} {score:.4g}, {judgement}"
