# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The decision for language models: modules, ranks and learning rate together, from passes over the model itself.

Options (`options`) are compared by what one Adam step of the best size takes off the loss of held-out examples
(`one_step`). All linear modules at the rank that fits is the first option, and the choice unless another one is
better beyond the interval. The learning rate is that of the choice (`learning_rate`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..capture.adaptable import facts_for_peft
from ..capture.layers import Layer
from ..capture.targets import base_model
from ..capture.trial import Trial
from ..errors import OutputError, PeftLinearError, TargetError
from ..recommendation.budget import Budget
from ..recommendation.values import ModuleScore, OptionScore, Settings
from ..report.recommendation import Recommendation
from .learning_rate import LearningRate, find_learning_rate
from .one_step import decide, first_order, score_options
from .options import make_options
from .training import Training


NAME = "one_step_decrease"
LABEL = "first-order decrease of the loss"
FORMULA = "(α/r)·‖∂L/∂B_m‖₁, nats a unit of learning rate"
HIGHEST_RANK = 32
BITS_A_PARAMETER = 2.0  # what a trained parameter holds (Allen-Zhu and Li, arXiv 2404.05405)
_START = 0.5  # of the best single step: where the search for the rate begins


@dataclass(frozen=True)
class LanguageRequest:
    """What a decision for a language model depends on.

    Args:
        layers: {candidate: its layer}, in model order.
        budget, asked_for: As numbers, with the counts of a training step where they are known; and as it was passed.
        excluded: Candidates that are scored, but part of no option.
        ranks: That a module may have; None: 1 to 32, with a budget that counts modules `rank` alone.
        rank, lora_alpha: At which candidates are counted; α is the same at every rank.
        training: Without a learning rate one is looked for, for so many steps.
        seed: Of A and of the resamples.
    """

    layers: Mapping[str, Layer]
    budget: Budget
    asked_for: Any
    excluded: Sequence[str] = ()
    ranks: Sequence[int] | None = None
    rank: int = 8
    lora_alpha: float = 16.0
    training: Training = field(default_factory=Training)
    seed: int = 0

    def recommend(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Recommendation:
        """Runs the passes and decides; the model is left as it was found.

        Raises:
            PeftLinearError: fewer than 4 examples in 2 batches.
            OutputError: no labels, or no gradient reaches the candidates.
            BudgetError: the budget has no room for one module.
        """
        layers, facts_of_peft = self._adaptable(model)
        ranks = self._ranks()
        trial = Trial.of(model, layers, batches, max(ranks), self.lora_alpha, self.seed)
        learning, held_out = trial.batches[0::2], trial.batches[1::2]
        costs = {name: sum(layer.shape) for name, layer in layers.items()}
        rate: LearningRate | None = None
        with trial.running() as run:
            start = run.losses(held_out)
            gradients = run.gradients(learning)
            if not gradients:
                raise OutputError("the loss does not depend on any candidate; are they part of the model's forward?")
            names = [name for name in layers if name in gradients]
            gains = first_order(gradients, dict.fromkeys(names, min(ranks)), self.lora_alpha)
            free = [name for name in names if name not in self.excluded]
            options = make_options(free, self.budget.allows, ranks, gains, upper=self._by_depth)
            scores = score_options(run, options, gradients, held_out, start, costs, self.seed)
            chosen = decide(scores)
            if self.training.learning_rate is None:
                guess = _START * chosen.step_size
                rate = find_learning_rate(run, chosen.ranks, learning, held_out, guess, self.training.steps, self.seed)
        facts = _Facts(
            gains=gains,
            costs=costs,
            start=start.mean,
            examples=sum(batch.size for batch in trial.batches),
            label_tokens=float(start.counts.mean()),
            provenance={
                "model_class": type(base_model(model)).__name__,
                "device": str(trial.device),
                "peft": facts_of_peft,
                "trial": _tried(rate),
            },
        )
        return self._recommendation(scores, chosen, rate, facts)

    @property
    def _by_depth(self) -> bool:
        """Whether a limit is on what grows with the depth of the lowest adapter."""
        return self.budget.time is not None or self.budget.memory is not None

    def _adaptable(self, model: nn.Module) -> tuple[dict[str, Layer], dict[str, Any]]:
        """The candidates that peft adapts, and what a config must be written by.

        Raises:
            TargetError: there are none.
        """
        facts = facts_for_peft(base_model(model), tuple(self.layers), ())
        layers = {name: layer for name, layer in self.layers.items() if name not in facts["refused"]}
        if not layers:
            name, reason = next(iter(facts["refused"].items()))
            raise TargetError(f"an adapter can train none of the modules; {name}: {reason}. Pass other `targets`")
        return layers, facts

    def _ranks(self) -> tuple[int, ...]:
        if self.ranks is not None:
            return tuple(sorted({int(rank) for rank in self.ranks} - {0}))
        return (self.rank,) if self.budget.parameters is None else tuple(range(1, HIGHEST_RANK + 1))

    def _recommendation(
        self, scores: Sequence[OptionScore], chosen: OptionScore, rate: LearningRate | None, facts: _Facts
    ) -> Recommendation:
        order = sorted(facts.gains, key=lambda name: -facts.gains[name])
        rows = tuple(
            ModuleScore(
                name=name,
                score=facts.gains[name],
                rank=place,
                parameters=facts.costs[name] * self.rank,
                chosen=name in chosen.ranks,
                reason=f"part of {chosen.label}" if name in chosen.ranks else f"not part of {chosen.label}",
                condition_number=None,
            )
            for place, name in enumerate(order, start=1)
        )
        fixed, cost = self.training.learning_rate, self.budget.cost
        return Recommendation(
            modules=tuple(name for name in order if name in chosen.ranks),
            scores=rows,
            predicted={},
            criterion=NAME,
            budget=tuple(self.asked_for) if isinstance(self.asked_for, (list, tuple)) else self.asked_for,
            ridge=None,
            settings=Settings(
                asked_for="default-by-evidence",
                criterion_label=LABEL,
                formula=FORMULA,
                set_score=chosen.decrease,
                strategy="options",
                evaluations=len(scores),
                candidates=tuple(facts.gains),
                excluded=tuple(name for name in facts.gains if name in self.excluded),
                budget_modules=self.budget.modules,
                budget_parameters=self.budget.parameters,
                seed=self.seed,
                optimizer="adamw",
                train_batch_size=self.training.batch_size,
                learning_rate=fixed or (rate.rate if rate else None),
                steps=self.training.steps,
                examples=facts.examples,
                outputs=1,
                output_kind="losses",
                space="lora",
                rank=self.rank,
                lora_alpha=self.lora_alpha,
                kernels=facts.provenance,
                time_share=None if cost is None else cost.time_share(chosen.ranks, self.rank),
                memory_share=None if cost is None else cost.memory_share(chosen.ranks, self.rank),
                shapes={name: self.layers[name].shape for name in facts.gains},
            ),
            notes=tuple(_notes(self, scores, chosen, facts)),
            module_ranks=dict(chosen.ranks),
            learning_rate=fixed or (rate.rate if rate else None),
            learning_rate_interval=None if rate is None else rate.interval,
            options=tuple(replace(score, chosen=score is chosen) for score in scores),
        )


def check_ranks(ranks: Sequence[int] | None) -> None:
    """Raises PeftLinearError unless they are integers of at least 0, one of them above 0; None is no restriction."""
    if ranks is None:
        return
    wrong = isinstance(ranks, str) or not isinstance(ranks, Sequence)
    if wrong or any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 0 for rank in ranks):
        raise PeftLinearError(f"ranks must be integers of at least 0 such as (0, 1, 2, 4, 8), got {ranks!r}")
    if not any(ranks):
        raise PeftLinearError(f"ranks={ranks!r} allows no adapter; add a rank of at least 1")


def lowest_rank(ranks: Sequence[int] | None) -> int:
    """Of an adapter, where these ranks are allowed."""
    return 1 if ranks is None else min(rank for rank in ranks if rank)


@dataclass(frozen=True)
class _Facts:
    gains: Mapping[str, float]
    costs: Mapping[str, int]  # parameters a rank
    start: float  # held-out loss before training
    examples: int
    label_tokens: float  # of an example
    provenance: Mapping[str, Any]


def _notes(
    request: LanguageRequest, scores: Sequence[OptionScore], chosen: OptionScore, facts: _Facts
) -> Iterable[str]:
    if facts.examples < 32:
        yield (
            f"Only {facts.examples} examples: scores from fewer than 32 change much with the sample; pass more "
            "batches."
        )
    best = max(scores, key=lambda score: score.decrease)
    if best.interval[0] <= 0:
        yield (
            "No option lowers the loss of held-out examples beyond its interval: these examples share nothing that "
            "one step could learn. Pass more examples, or check the labels."
        )
    if best is not chosen:
        yield (
            f"{best.label} has the largest decrease ({best.decrease:.3f} nats against {chosen.decrease:.3f}), but not "
            f"beyond the interval of the difference; it is best in {best.best_share:.0%} of the resamples."
        )
    if chosen.best_share < 0.5:
        yield (
            f"The choice is the best option in {chosen.best_share:.0%} of the resamples of the examples: another "
            "sample could choose otherwise."
        )
    left = request.budget.parameters
    if left is not None and chosen.parameters < 0.9 * left:
        yield (
            f"The choice has {chosen.parameters:,} of the {left:,} parameters of the budget: the next rank for all "
            "its modules would be above it."
        )
    needed = facts.start * facts.label_tokens * request.training.steps * request.training.batch_size / math.log(2)
    held = BITS_A_PARAMETER * chosen.parameters
    binds = "capacity" if needed > held else "speed"
    yield (
        f"What limits this run is {binds}: its label tokens carry about {needed:.2g} bits at the present loss, and "
        f"{chosen.parameters:,} adapter parameters hold about {held:.2g} bits. "
        + ("A larger budget would hold more." if binds == "capacity" else "A higher rank would not learn more.")
    )
    yield (
        "No final loss is predicted: the decrease is that of one step, by which options are compared; it does not say "
        "how a run ends."
    )


def _tried(rate: LearningRate | None) -> dict[str, Any]:
    if rate is None:
        return {}
    return {"optimizer_steps": rate.steps, "held_out_losses": {f"{key:.3g}": loss for key, loss in rate.tried.items()}}
