# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`recommend`: from the kernels of the candidates to the modules to adapt."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import KernelError, PeftLinearError
from ..functional.regression import select_ridge
from ..functional.simulation import SMOOTHNESS
from ..kernels.module_kernels import ModuleKernels
from ..recommendation.budget import Budget, parse_budget
from ..recommendation.ranks import rank_basis
from ..recommendation.recommendation import ModuleScore, Recommendation
from .avoided import AVOIDED, check_avoid, left_for_last
from .criteria import DEFAULT_NAME, Criterion, resolve_criterion, score_modules
from .heads import over_heads
from .preconditioning import BATCH_SIZE, adam_preconditioned, check_optimizer
from .prediction import before_training, predict
from .problem import Problem
from .reasons import explain, notes_on
from .reliability import Reliability, split_half_reliability
from .search.search import SearchResult, SubsetScorer, check_strategy, rank_by_score, search


# The default ridge is looked for within these multiples of the mean eigenvalue tr(K)/n, and is the plain mean where
# the outputs have nothing to regress to.
RIDGE_RANGE = (1e-3, 10.0)
RIDGE_STEPS = 17
BY_HEADS = "gradient_energy"  # the criterion that is taken over heads where several are given
SHARE, SHARE_FORMULA = "share of the gradient energy", "least over heads of eᵀ K_m e/Σ_m eᵀ K_m e"


def check_ridge(ridge: float | None) -> None:
    """Raises `KernelError` unless the ridge is above 0, or None for the default."""
    if ridge is not None and not (math.isfinite(ridge) and ridge > 0):
        raise KernelError(f"ridge must be a finite number > 0 (unit: eigenvalues of the kernel), got {ridge}")


def default_ridge(kernels: ModuleKernels) -> float:
    """One λ for every subset: the ridge with the least leave-one-out error of the kernel K of all candidates.

    17 values, log-spaced from 1e-3 to 10 times the mean eigenvalue `tr(K)/n`; that mean itself where there is no
    residual (logits without labels, random projections). O(n³).

    Raises:
        KernelError: the kernel is zero.
    """
    gram = kernels.subset()
    mean = float(gram.trace()) / len(gram)
    if not mean > 0:
        raise KernelError(
            f"the kernel of all {len(kernels)} candidates has trace {mean * len(gram):.3g}: the outputs do not depend "
            "on them, so there is nothing to choose; check that the candidates take a gradient"
        )
    problem = Problem.of(kernels, ridge=mean)
    if "residual" not in problem.provides or kernels.num_examples < 2:
        return mean
    low, high = (math.log10(factor) for factor in RIDGE_RANGE)
    ridges = [mean * factor for factor in torch.logspace(low, high, RIDGE_STEPS, dtype=torch.float64).tolist()]
    return select_ridge(gram, problem.residual, kernels.num_outputs, ridges)


def recommend(
    kernels: ModuleKernels,
    budget: int | float | str,
    criterion: str = DEFAULT_NAME,
    ridge: float | None = None,
    strategy: str = "greedy",
    seed: int = 0,
    *,
    heads: Sequence[ModuleKernels] = (),
    avoid: str | Sequence[str] = AVOIDED,
    optimizer: str | None = None,
    train_batch_size: int = BATCH_SIZE,
    learning_rate: float | None = None,
    steps: int = 100,
    folds: int = 4,
) -> Recommendation:
    """The best set of modules within the budget by one criterion on `K_S = K_0 + Σ_{m∈S} K_m`, with its evidence.

    The budget is used up: as many modules are taken as fit, also where the criterion no longer improves (a note says
    so). Whether the examples tell the candidates apart at all is asked of random halves of them
    (`Recommendation.signal`); where they do not, a note says so and names the alternative, all candidates at a lower
    rank. Cost: one criterion evaluation for each candidate and round of the search that no bound rules out (O(n³) for
    most; additive criteria need one for each candidate, O(n²)), twenty on n/2 rows and one eigendecomposition for each
    candidate, whose condition number is always shown. 8 of 37 candidates with n = 512 rows take about 2 s on one CPU
    core by an additive criterion, 5 s by leave-one-out error and 11 s by predicted loss; it grows as n³.

    Args:
        kernels: Of the candidates, from `compute_ntk`.
        budget: int: number of modules; float in (0, 1]: fraction of all candidates' adapter parameters; str: adapter
            parameters, "1.5M", "200k".
        criterion: A name of `CRITERIA`, or "default-by-evidence".
        ridge: λ > 0 of the ridge regression, in the unit of the kernel's eigenvalues; default: `default_ridge`. With
            optimizer="adamw" the criterion's is in the same proportion to the default of the kernels that it sees.
        strategy: "greedy" (forward selection, also called "forward"), "backward" (elimination), "swap" (greedy, then
            exchanges of one module until none improves), "top" (best on their own) or "exhaustive"; see `search`.
        seed: Of the cross-validation folds.
        heads: Kernels of the same modules and examples, of losses or logits, through the head as it is and through one
            that was trained for a moment (`training.workflow.through_heads`; `recommend_modules` makes them). Gradient
            energy is then the least of a module's shares through them (`selection.heads`), in place of its energy in
            `kernels`; predictions and spectra stay those of `kernels`.
        avoid: Components of the names of candidates that are scored, but not chosen while others can use the budget:
            by default BERT's pooler (docs/decisions/0012). (): none.
        optimizer: What the modules are to be trained with: "adamw" (Adam too) divides the kernel of every module by
            the size of its gradient, as Adam does its steps (`adam_preconditioned`); "sgd" takes kernels as they are,
            as the formulas of `CRITERIA` do. Default: "adamw" for "default-by-evidence", where the outputs determine
            a loss, and "sgd" for a criterion by name. What the criterion says and the simulated training follow it;
            spectra, condition numbers, distances and ranks do not.
        train_batch_size: Of that training; read with optimizer="adamw" only.
        learning_rate: Of simulated training on the mean cross-entropy, by that optimizer. Default: the largest that
            cannot diverge with all candidates, `2N/λ1(K)`; the same for every subset.
        steps: Of simulated training.
        folds: Of its cross-validation over examples.

    Raises:
        BudgetError: the budget selects nothing, more than there is, or cannot be read; or it leaves too many sets for
            an exhaustive search.
        CriterionError: an unknown criterion or strategy.
        OutputError: the outputs do not provide what the criterion needs.
        KernelError: ridge ≤ 0, a kernel that is zero or not finite, or `heads` of other modules or examples.
        PeftLinearError: `heads` with another criterion than gradient energy; `avoid` that is no names.
    """
    limit = parse_budget(budget, kernels.num_parameters)
    as_it_is = Problem.of(kernels, ridge=1.0)
    chosen_criterion = resolve_criterion(criterion, as_it_is)
    strategy = check_strategy(strategy, len(kernels), limit, chosen_criterion)
    check_ridge(ridge)
    check_avoid(avoid)
    optimizer = check_optimizer(optimizer, criterion, as_it_is, train_batch_size)
    if heads:
        if chosen_criterion.name != BY_HEADS:
            raise PeftLinearError(
                f"looks through several heads are for {BY_HEADS!r}, not for {chosen_criterion.name!r}; leave `heads` "
                "out, or pass the kernels through one of them as the only ones"
            )
        if any(look.names != kernels.names or look.num_examples != kernels.num_examples for look in heads):
            raise KernelError("`heads` must be of the modules and examples that `kernels` are of, in the same order")
        chosen_criterion = replace(chosen_criterion, label=SHARE, formula=SHARE_FORMULA)
    if steps < 1 or folds < 2 or (learning_rate is not None and not 0 < learning_rate < math.inf):
        raise PeftLinearError(
            f"simulated training needs steps ≥ 1, folds ≥ 2 and a finite learning rate > 0, got steps={steps}, "
            f"folds={folds}, learning_rate={learning_rate}"
        )
    seen = adam_preconditioned(kernels, train_batch_size) if optimizer == "adamw" else kernels
    plain = Problem.of(kernels, default_ridge(kernels) if ridge is None else float(ridge), seed=seed)
    everything = kernels.spectrum()
    if learning_rate is None:
        largest = float((everything if seen is kernels else seen.spectrum()).eigenvalues[0])
        curvature = SMOOTHNESS["cross_entropy"] * largest / kernels.num_examples
        learning_rate = 1.0 / curvature if curvature > 0 else 1.0
    seen_ridge = _seen_ridge(seen, kernels, ridge, plain.ridge)
    problem = replace(plain, ridge=seen_ridge, learning_rate=learning_rate, steps=steps, folds=folds)

    judged, judged_problem = seen, problem
    if heads:
        as_trained = [adam_preconditioned(look, train_batch_size) if optimizer == "adamw" else look for look in heads]
        judged = over_heads(as_trained)
        judged_problem = replace(problem, outputs=judged.outputs, output_kind=judged.output_kind)
    singles = score_modules(judged, chosen_criterion, judged_problem)
    avoided = left_for_last(kernels.num_parameters, limit, avoid)
    free = {name: score for name, score in singles.items() if name not in avoided}
    candidates = judged.select_modules(free) if avoided else judged
    result = search(SubsetScorer(candidates, chosen_criterion, judged_problem, free), limit, strategy)
    result = replace(result, evaluations=result.evaluations + len(avoided))
    shown = singles
    if chosen_criterion.name != "condition_number" or seen is not kernels:
        shown = {name: kernels.spectrum([name]).condition_number(plain.ridge) for name in kernels.names}
    reliability = split_half_reliability(judged, chosen_criterion, judged_problem, scores=singles)
    reasons = explain(result, singles, chosen_criterion, limit, kernels.num_parameters, strategy, avoided)
    scores = tuple(
        ModuleScore(
            name=name,
            score=singles[name],
            rank=rank,
            parameters=kernels.num_parameters[name],
            chosen=name in result.order,
            reason=reasons[name],
            condition_number=shown[name],
            interval=None if reliability is None else reliability.score_intervals[name],
        )
        for rank, name in enumerate(rank_by_score(singles, chosen_criterion), start=1)
    )
    spectra = {"chosen": kernels.spectrum(result.order), "all": everything}
    trained = (seen, problem)
    predicted: dict[str, object] = dict(predict(kernels, result.order, plain, trained))
    predicted["all_candidates"] = predict(kernels, kernels.names, plain, trained)
    if bool(kernels.base.any()):
        spectra["always trained"] = kernels.spectrum([])
        spectra["chosen, adapters"] = plain.spectrum(kernels.subset(result.order) - kernels.base)
        spectra["all, adapters"] = plain.spectrum(kernels.subset() - kernels.base)
        predicted["always_trained_only"] = predict(kernels, [], plain, trained)
    predicted["before_training"] = before_training(problem)
    return Recommendation(
        modules=result.order,
        scores=scores,
        predicted=predicted,
        criterion=chosen_criterion.name,
        budget=budget,
        ridge=plain.ridge,
        settings=_settings(seen, problem, chosen_criterion, limit, strategy, criterion, result, reliability)
        | _how_seen(optimizer, train_batch_size, chosen_criterion, heads)
        | {"avoided": list(avoided)}
        | rank_basis(kernels, result.order, plain.ridge),
        notes=notes_on(
            kernels, result, singles, chosen_criterion, judged_problem, spectra["chosen"], reliability, avoided
        ),
        spectra=spectra,
    )


def _seen_ridge(seen: ModuleKernels, kernels: ModuleKernels, asked_for: float | None, plain: float) -> float:
    """λ for the kernels that the optimizer sees: what `plain` is to the default of `kernels`, to their own default."""
    if seen is kernels:
        return plain
    return default_ridge(seen) * (1.0 if asked_for is None else asked_for / default_ridge(kernels))


def _how_seen(
    optimizer: str, train_batch_size: int, criterion: Criterion, heads: Sequence[ModuleKernels]
) -> dict[str, object]:
    """Settings that say through whose eyes the criterion saw the kernels, and its formula then."""
    settings: dict[str, object] = {"optimizer": optimizer}
    if optimizer == "adamw":
        formula = f"{criterion.formula}, with K_m/s_m as AdamW sees it"
        settings |= {"train_batch_size": train_batch_size, "formula": formula}
    if heads:
        told = ((look.provenance.get("head_steps", 0), look.provenance.get("draws")) for look in heads)
        settings["heads"] = [{"head_steps": head_steps, "draws": draws} for head_steps, draws in told]
    return settings


def _settings(
    kernels: ModuleKernels,
    problem: Problem,
    criterion: Criterion,
    limit: Budget,
    strategy: str,
    asked_for: str,
    result: SearchResult,
    reliability: Reliability | None,
) -> dict[str, object]:
    settings = {
        "asked_for": asked_for,
        "criterion_label": criterion.label,
        "formula": criterion.formula,
        "higher_is_better": criterion.higher_is_better,
        "strategy": strategy,
        "evaluations": result.evaluations,
        "skipped": result.skipped,
        "start_score": result.start,
        "set_score": result.path[-1],
        "candidates": list(kernels.names),
        "budget_modules": limit.modules,
        "budget_parameters": limit.parameters,
        "seed": problem.seed,
        "learning_rate": problem.learning_rate,
        "steps": problem.steps,
        "folds": problem.folds,
        "criterion_ridge": problem.ridge,
        "examples": kernels.num_examples,
        "outputs": kernels.num_outputs,
        "output_kind": kernels.output_kind,
        "space": kernels.space,
        "rank": kernels.rank,
        "lora_alpha": kernels.lora_alpha,
        "always_trained": bool(kernels.base.any()),
        "reliability": None if reliability is None else reliability.to_dict(),
        "kernels": dict(kernels.provenance),
    }
    return json.loads(json.dumps(settings, default=str))  # what a file gives back, so that a saved copy is equal
