# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`recommend`: from the kernels of the candidates to the modules to adapt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import KernelError, PeftLinearError
from ..kernels.module_kernels import ModuleKernels
from ..recommendation.budget import BudgetLike, budget_for
from ..recommendation.cost import RECORD, StepCost
from ..recommendation.ranks import effective_dimensions
from ..recommendation.values import ModuleScore, Settings
from ..report.recommendation import Recommendation
from .candidates import candidates_of
from .choice import choose
from .criteria import DEFAULT_NAME, Criterion, rank_by_score, resolve_criterion, score_modules
from .evidence import Evidence, collect_evidence
from .exclusion import DEFAULT_EXCLUDE, check_exclude
from .notes import notes_on
from .problem import Problem
from .reasons import explain
from .search.search import check_strategy
from .training import Training
from .views import Views, check_ridge


BY_HEADS = "gradient_energy"  # the criterion that combines kernels through several heads
SHARE, SHARE_FORMULA = "share of the gradient energy", "least over heads of eᵀ K_m e/Σ_m eᵀ K_m e"


def recommend(
    kernels: ModuleKernels,
    budget: BudgetLike,
    criterion: str = DEFAULT_NAME,
    ridge: float | None = None,
    strategy: str = "greedy",
    seed: int = 0,
    *,
    heads: Sequence[ModuleKernels] = (),
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    training: Training | None = None,
) -> Recommendation:
    """The best set of modules within the budget by one criterion on `K_S = K_0 + Σ_{m∈S} K_m`, with its evidence.

    The budget is used up: as many modules are taken as fit, also where the criterion no longer improves (a note says
    so). Whether the ranking of the candidates is stable is tested on random halves of the examples
    (`Recommendation.signal`); where it is not, a note says so and names the alternative, all candidates at a lower
    rank. Modules that no adapter can train (never called, or refused by peft) are no candidates; a note names them.
    Cost: one criterion evaluation for each candidate and round of the search (O(n³) for most; additive criteria
    need one for each candidate, O(n²)), twenty on n/2 rows and one eigendecomposition for each candidate, whose
    condition number is always shown. 8 of 37 candidates with n = 512 rows take about 2 s on one CPU core by an
    additive criterion, 5 s by leave-one-out error and 11 s by predicted loss; it grows as n³.

    Args:
        kernels: Of the candidates, from `compute_ntk`.
        budget: int: number of modules; float in (0, 1]: fraction of all candidates' adapter parameters; str: adapter
            parameters, "1.5M", "200k"; "layers:4": layers with adapters; "time:0.6", "memory:0.6": a share of an
            all-linear LoRA step at the kernels' rank. A list of several: all of them.
        criterion: A name of `CRITERIA`, or "default-by-evidence".
        ridge: λ > 0 of the ridge regression, in the unit of the kernel's eigenvalues; default: `default_ridge`. With
            Adam-preconditioned kernels the criterion's ridge is in the same proportion to their default.
        strategy: "greedy" (exact for additive criteria) or "top" (the best on their own); see `search`.
        seed: Of the cross-validation folds and the random halves.
        heads: Kernels of the same modules and examples, of losses or logits, through the head as it is and through one
            that was trained for a few steps (`recommend_modules` computes them). The score of a module is then the
            least of its shares of the gradient energy (`selection.heads`); predictions and spectra stay those of
            `kernels`.
        exclude: Components of the names of candidates that are scored but not chosen, unless the others cannot use the
            budget: by default BERT's pooler (docs/decisions/0012). (): none.
        training: The planned training; default: `Training()`.

    Raises:
        BudgetError: the budget selects nothing, more than there is, or cannot be read.
        CriterionError: an unknown criterion, strategy or optimizer.
        OutputError: the outputs do not provide what the criterion or the optimizer needs.
        KernelError: ridge ≤ 0, a kernel that is zero or not finite, or `heads` of other modules or examples.
        TargetError: an adapter can train none of the modules.
        PeftLinearError: `heads` with another criterion than gradient energy; `exclude` is no list of components.
    """
    kernels, heads = candidates_of(kernels, heads)
    limit = budget_for(budget, kernels)
    problem = Problem.of(kernels, ridge=1.0)
    resolved = resolve_criterion(criterion, problem)
    check_strategy(strategy)
    ridge = check_ridge(ridge)
    check_exclude(exclude)
    training = (training or Training()).resolved(criterion, problem)
    if heads:
        resolved = _by_heads(resolved, kernels, heads)

    views = Views.of(kernels, heads, training, ridge, seed)
    scores = score_modules(views.scoring, resolved)
    choice = choose(views.scoring, scores, resolved, limit, strategy, exclude)
    return _recommendation(collect_evidence(views, choice, scores, resolved, criterion), budget, criterion)


def _by_heads(criterion: Criterion, kernels: ModuleKernels, heads: Sequence[ModuleKernels]) -> Criterion:
    """The criterion as it is labelled over several heads."""
    if criterion.name != BY_HEADS:
        raise PeftLinearError(
            f"`heads` requires criterion={BY_HEADS!r}, got {criterion.name!r}; leave `heads` out, or pass the kernels "
            "through one of them as the only ones"
        )
    if any(each.names != kernels.names or each.num_examples != kernels.num_examples for each in heads):
        raise KernelError("`heads` must be of the modules and examples that `kernels` are of, in the same order")
    return replace(criterion, label=SHARE, formula=SHARE_FORMULA)


def _recommendation(evidence: Evidence, budget: BudgetLike, asked_for: str) -> Recommendation:
    choice, criterion = evidence.choice, evidence.criterion
    kernels = evidence.views.plain.kernels
    reasons = explain(choice, evidence.scores, criterion, kernels.num_parameters)
    intervals = evidence.reliability.score_intervals if evidence.reliability else {}
    scores = tuple(
        ModuleScore(
            name=name,
            score=evidence.scores[name],
            rank=rank,
            parameters=kernels.num_parameters[name],
            chosen=name in choice.modules,
            reason=reasons[name],
            condition_number=evidence.condition_numbers[name],
            interval=intervals.get(name),
        )
        for rank, name in enumerate(rank_by_score(evidence.scores, criterion), start=1)
    )
    return Recommendation(
        modules=choice.modules,
        scores=scores,
        predicted=evidence.predicted,
        criterion=criterion.name,
        budget=budget if isinstance(budget, (int, float, str)) else tuple(budget),
        ridge=evidence.views.plain.problem.ridge,
        settings=_settings(evidence, asked_for),
        notes=notes_on(evidence),
        spectra=evidence.spectra,
    )


def _settings(evidence: Evidence, asked_for: str) -> Settings:
    views, choice, criterion = evidence.views, evidence.choice, evidence.criterion
    kernels, problem = views.plain.kernels, views.optimizer.problem
    adam = views.training.optimizer == "adamw"
    reliability = evidence.reliability
    return Settings(
        asked_for=asked_for,
        criterion_label=criterion.label,
        formula=f"{criterion.formula}, with Adam-preconditioned K_m/s_m" if adam else criterion.formula,
        higher_is_better=criterion.higher_is_better,
        criterion_ridge=problem.ridge,
        start_score=choice.result.start,
        set_score=choice.result.path[-1],
        strategy=choice.strategy,
        evaluations=choice.result.evaluations,
        candidates=kernels.names,
        excluded=choice.excluded,
        budget_modules=choice.budget.modules,
        budget_parameters=choice.budget.parameters,
        seed=problem.seed,
        optimizer=views.training.optimizer,
        train_batch_size=views.training.batch_size if adam else None,
        learning_rate=problem.learning_rate,
        steps=problem.steps,
        examples=kernels.num_examples,
        outputs=kernels.num_outputs,
        output_kind=kernels.output_kind,
        space=kernels.space,
        rank=kernels.rank,
        lora_alpha=kernels.lora_alpha,
        always_trained=bool(kernels.base.any()),
        heads=tuple(_head(each) for each in views.heads),
        reliability=None if reliability is None else replace(reliability, score_intervals={}),
        kernels=_as_in_a_file({k: v for k, v in views.optimizer.kernels.provenance.items() if k != RECORD}),
        **_step_shares(kernels, choice.modules),
        effective_dimension=effective_dimensions(kernels, choice.modules, views.plain.problem.ridge),
        shapes=kernels.shapes,
    )


def _step_shares(kernels: ModuleKernels, modules: Sequence[str]) -> dict[str, float]:
    """Of an all-linear LoRA step; none where the kernels hold no counts."""
    if "modules" not in kernels.provenance.get(RECORD, {}):
        return {}
    cost, ranks = StepCost.of_kernels(kernels.provenance), dict.fromkeys(modules, kernels.rank)
    return {
        "time_share": cost.time_share(ranks, kernels.rank),
        "memory_share": cost.memory_share(ranks, kernels.rank),
    }


def _head(kernels: ModuleKernels) -> dict[str, int | None]:
    return {"head_steps": kernels.provenance.get("head_steps", 0), "draws": kernels.provenance.get("draws")}


def _as_in_a_file(provenance: Any) -> Any:
    """Through JSON, so that a saved copy is equal."""
    return json.loads(json.dumps(dict(provenance), default=str))
