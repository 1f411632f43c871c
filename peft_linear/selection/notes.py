# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a reader must know before trusting a choice: each note is one function of the evidence."""

from __future__ import annotations

from collections.abc import Callable

from .baselines.by_kernels import equal_parameter_rank
from .candidates import untrainable
from .criteria import DEFAULT_CRITERION, DEFAULT_NAME
from .evidence import Evidence


FEW_EXAMPLES = 32
BARELY_DIFFERENT = 0.01  # range of the candidates' scores, relative to the largest
WIDE_SPREAD = 0.3  # relative deviation of a module's kernel between draws of A

Note = Callable[[Evidence], "str | None"]


def few_examples(evidence: Evidence) -> str | None:
    count = evidence.views.plain.kernels.num_examples
    if count >= FEW_EXAMPLES:
        return None
    return (
        f"Only {count} examples: scores from fewer than {FEW_EXAMPLES} change much with the sample; pass more batches."
    )


def no_signal(evidence: Evidence) -> str | None:
    reliability, choice = evidence.reliability, evidence.choice
    if reliability is None or reliability.signal:
        return None
    kernels = evidence.views.plain.kernels
    rank = equal_parameter_rank(kernels, sum(kernels.num_parameters[name] for name in choice.modules))
    without = f"; with few examples leave out {', '.join(choice.excluded)}" if choice.excluded else ""
    return (
        f"No signal: between two halves of the examples the ranking of the candidates has a rank correlation of "
        f"{reliability.halves:.2f}, not above the 95 % level of chance ({reliability.threshold:.2f}). Pass more "
        f"examples, or adapt all {len(evidence.scores)} candidates at rank {rank}, which has about as many parameters"
        f"{without}."
    )


def scores_barely_differ(evidence: Evidence) -> str | None:
    low, high = min(evidence.scores.values()), max(evidence.scores.values())
    largest = max(abs(low), abs(high))
    if len(evidence.scores) < 2 or high - low > BARELY_DIFFERENT * largest:
        return None
    share = (high - low) / largest if largest else 0.0
    return (
        f"The candidates' scores differ by {share:.2%} at most ({low:.4g} to {high:.4g}): the choice is hardly "
        "better than a random one."
    )


def most_candidates_change_little(evidence: Evidence) -> str | None:
    scores, start = evidence.scores, evidence.choice.result.start
    gains = [abs(score - start) for score in scores.values()]
    small = sum(gain < BARELY_DIFFERENT * max(gains) for gain in gains)
    if small <= len(scores) / 2:
        return None
    return (
        f"{small} of {len(scores)} candidates, each alone, change the {evidence.criterion.label} by less than "
        f"{BARELY_DIFFERENT:.0%} of the largest change: their order says little."
    )


def smaller_budget_is_better(evidence: Evidence) -> str | None:
    criterion, result = evidence.criterion, evidence.choice.result
    scores = (result.start, *result.path)
    best = max(range(len(scores)), key=lambda i: criterion.utility(scores[i]))
    if best == len(result.path):
        return None
    modules = "module" if best == 1 else "modules"
    return (
        f"The {criterion.label} is best with the first {best} {modules} ({scores[best]:.4g}); the rest of the budget "
        f"takes it to {result.path[-1]:.4g}. A smaller budget may be enough."
    )


def no_gain_on_unseen_examples(evidence: Evidence) -> str | None:
    problem, result = evidence.views.scoring.problem, evidence.choice.result
    if evidence.criterion.name != "leave_one_out" or "residual" not in problem.provides:
        return None
    untrained = float(problem.residual.square().sum()) / problem.num_examples
    if result.path[-1] < untrained:
        return None
    return (
        f"The linear theory predicts no gain on unseen examples: leave-one-out error {result.path[-1]:.4g} "
        f"against {untrained:.4g} without training."
    )


def condition_number_is_the_ridges(evidence: Evidence) -> str | None:
    chosen = evidence.spectra["chosen"]
    if evidence.criterion.name != "condition_number" or chosen.numerical_rank == len(chosen):
        return None
    return (
        f"The kernel of the choice has numerical rank {chosen.numerical_rank} of {len(chosen)}: its condition "
        f"number is λ1/ridge + 1 and depends on the ridge ({evidence.views.scoring.problem.ridge:.3g})."
    )


def draws_differ(evidence: Evidence) -> str | None:
    spreads = evidence.views.plain.kernels.spread
    wide = {name: spread for name, spread in spreads.items() if spread > WIDE_SPREAD}
    if not wide:
        return None
    worst = max(wide, key=wide.__getitem__)
    return (
        f"The kernels of {len(wide)} of {len(evidence.scores)} modules differ by more than {WIDE_SPREAD:.0%} between "
        f"draws of LoRA's random A (most: {worst}, {wide[worst]:.0%}); more draws make the scores more certain."
    )


def excluded_ahead_of_chosen(evidence: Evidence) -> str | None:
    utility, scores, choice = evidence.criterion.utility, evidence.scores, evidence.choice
    worst_chosen = min(utility(scores[name]) for name in choice.modules)
    ahead = [name for name in choice.excluded if utility(scores[name]) > worst_chosen]
    if not ahead:
        return None
    return (
        f"{', '.join(ahead)}: excluded by `exclude`, though its score is better than that of some that are chosen. "
        "A pooler lies right below the head and learns nearly what the head learns; in our measurements it helped in "
        "short runs at small learning rates, and did harm at large ones and where few examples are repeated many "
        "times. Pass exclude=() to rank it like any other module."
    )


def another_default_criterion(evidence: Evidence) -> str | None:
    criterion, problem = evidence.criterion, evidence.views.plain.problem
    if evidence.asked_for != DEFAULT_NAME or criterion.name == DEFAULT_CRITERION:
        return None
    if problem.provides and problem.output_kind != "logits":
        return None  # the documented default of these outputs
    what = problem.what
    if problem.provides:
        return f"Of {what} the default criterion is {criterion.label}, not that of class labels."
    return (
        f"{what[0].upper()}{what[1:]} say nothing of a loss, so the criterion is the {criterion.label}, which does "
        "not know the task. Pass batches with labels and outputs that have a loss, or name the criterion."
    )


def left_out_of_candidates(evidence: Evidence) -> str | None:
    kernels = evidence.views.plain.kernels
    out = {name: reason for name, reason in untrainable(kernels).items() if name not in kernels}
    if not out:
        return None
    by_reason = {reason: [name for name, why in out.items() if why == reason] for reason in out.values()}
    what = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
    return f"No candidates, since an adapter would not train there: {what}."


NOTES: tuple[Note, ...] = (
    few_examples,
    no_signal,
    scores_barely_differ,
    most_candidates_change_little,
    smaller_budget_is_better,
    no_gain_on_unseen_examples,
    condition_number_is_the_ridges,
    draws_differ,
    excluded_ahead_of_chosen,
    another_default_criterion,
    left_out_of_candidates,
)


def notes_on(evidence: Evidence) -> tuple[str, ...]:
    """The notes that apply, in the order of `NOTES`."""
    notes = (note(evidence) for note in NOTES)
    return tuple(note for note in notes if note is not None)
