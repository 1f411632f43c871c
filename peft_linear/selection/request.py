# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`recommend_modules`: from a model and data to a recommendation, with one value that says what is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..capture.batches import read_batches
from ..capture.keywords import MOVED
from ..capture.request import KernelRequest
from ..capture.resources import DEFAULT_RESOURCES, Resources
from ..capture.step_cost import counted_step
from ..capture.targets import base_model, resolve_always_trained
from ..capture.warm_head import STEPS as HEAD_STEPS
from ..capture.warm_head import warmed_head
from ..errors import OutputError, PeftLinearError, TargetError
from ..functional.outputs import Outputs, resolve_output
from ..kernels.module_kernels import ModuleKernels
from ..recommendation.budget import BudgetLike, needs_cost, parse_budget
from ..recommendation.cost import RECORD, StepCost
from ..report.recommendation import Recommendation
from .criteria import DEFAULT_NAME, resolve_criterion
from .exclusion import DEFAULT_EXCLUDE, check_exclude, excluded_candidates
from .language import LanguageRequest, check_ranks, lowest_rank
from .problem import Problem
from .recommend import BY_HEADS, recommend
from .search.search import check_strategy
from .training import Training
from .views import check_ridge


HEAD_DRAWS = 8  # of LoRA's A where an example has one output, for which a draw costs little
LANGUAGE_DRAWS = 32  # their default criterion inverts the kernel, which amplifies the noise of the draws
Heads = tuple[ModuleKernels, ...]


@dataclass(frozen=True)
class ModuleRequest:
    """What `recommend_modules` is asked for; the command line and the Trainer callback make the same value.

    Args:
        budget, criterion, ridge, strategy, seed, exclude, training: As for `recommend`.
        head_steps: As for `recommend_modules`.
        kernels: Fields of `KernelRequest` by name; `outputs` and `draws` have other defaults here.
        ranks: Ranks that a module of a language model may have.
        resources: As for `compute_ntk`.

    Raises:
        CriterionError, KernelError, PeftLinearError: arguments that no model could make valid.
    """

    budget: BudgetLike
    criterion: str = DEFAULT_NAME
    ridge: float | None = None
    strategy: str = "greedy"
    seed: int = 0
    head_steps: int | None = None
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE
    training: Training = field(default_factory=Training)
    kernels: Mapping[str, Any] = field(default_factory=dict)
    resources: Resources = DEFAULT_RESOURCES
    ranks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_ranks(self.ranks)
        accepted = [f.name for f in fields(KernelRequest)]
        unknown = sorted(set(self.kernels) - set(accepted))
        if moved := [name for name in unknown if name in MOVED]:
            raise PeftLinearError(f"{moved[0]!r} is no longer taken; pass {MOVED[moved[0]]}")
        if unknown:
            raise PeftLinearError(
                f"unknown arguments {', '.join(unknown)}; compute_ntk takes: {', '.join([*accepted, 'resources'])}"
            )
        check_strategy(self.strategy)
        check_ridge(self.ridge)
        check_exclude(self.exclude)
        if self.head_steps is not None and self.head_steps < 0:
            raise PeftLinearError(f"head_steps must be at least 0, got {self.head_steps}")

    def candidates(self, model: nn.Module) -> dict[str, int]:
        """Adapter parameters of every candidate; checks the request without running the model.

        Raises:
            TargetError, BudgetError, CriterionError: as `recommend_modules`.
            OutputError: outputs of this kind do not provide what the criterion needs, even with labels.
        """
        request = self.kernel_request(model)
        labelled = _labelled(request.outputs)
        resolve_criterion(self.criterion, labelled)
        self.training.resolved(self.criterion, labelled)
        if self.head_steps and not resolve_always_trained(model, request.always_trained):
            raise TargetError(
                f"head_steps={self.head_steps}, but {type(base_model(model)).__name__} has no task head that is "
                "always trained; leave head_steps at 0, or name the head in `always_trained`"
            )
        sizes = request.candidates(model)
        lowest = lowest_rank(self.ranks) if self.is_for_language(model) else None
        parse_budget(self.budget, sizes, request.rank, lowest_rank=lowest)
        return sizes

    def compute_kernels(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[ModuleKernels, Heads]:
        """The kernels that `recommend` needs, and its `heads` where the criterion combines several.

        Gradient energy of labelled logits has heads (`kernels_through_heads`). Other criteria take the model as it is
        or, with `head_steps`, through the trained head alone, which the kernels' provenance then says.
        """
        request = self.kernel_request(model)
        batches = [batches] if isinstance(batches, Mapping) else list(batches)  # read more than once
        self._check_step_budget(model, request, batches)
        by_heads = resolve_criterion(self.criterion, _labelled(request.outputs)).name == BY_HEADS
        if self.head_steps and not by_heads:
            with warmed_head(model, batches, self.head_steps, always_trained=request.always_trained):
                return _after(self.head_steps, request.compute(model, batches, self.resources)), ()
        kernels = request.compute(model, batches, self.resources)
        problem = Problem.of(kernels, ridge=1.0)
        if self.head_steps and "logits" not in problem.provides:
            raise OutputError(
                f"head_steps={self.head_steps} trains the head on class labels, and these are {problem.what}; leave "
                "head_steps out"
            )
        head_steps = self.head_steps
        if head_steps is None:
            head_steps = HEAD_STEPS if resolve_always_trained(model, request.always_trained) else 0
        if not by_heads or not head_steps or "logits" not in problem.provides:
            return kernels, ()
        request = replace(request, draws=self.kernels.get("draws", _head_draws(request.space)))
        return kernels, kernels_through_heads(request, model, batches, head_steps, self.resources)

    def _check_step_budget(
        self, model: nn.Module, request: KernelRequest, batches: Sequence[Mapping[str, Any]]
    ) -> None:
        """Raises BudgetError before any long work where a budget of time or memory cannot be kept."""
        if not needs_cost(self.budget) or not batches:
            return
        sizes = request.candidates(model)
        batch = read_batches(batches[:1], model, needs_labels=False, what="the budget")[0]
        counts = counted_step(model, batch, sizes, request.always_trained)
        parse_budget(self.budget, sizes, request.rank, StepCost.of_kernels({RECORD: counts}))

    def recommend(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Recommendation:
        """Checks, computes and chooses; for a language model by `LanguageRequest`, if nothing else is asked for."""
        sizes = self.candidates(model)
        if self.is_for_language(model):
            batches = [batches] if isinstance(batches, Mapping) else list(batches)
            return self.language(model, sizes, batches).recommend(model, batches)
        if self.ranks is not None:
            raise PeftLinearError(
                "`ranks` are chosen for language models, by the default criterion, with space='lora' and without "
                "`outputs`; leave `ranks` out, or the other arguments"
            )
        return self.choose(*self.compute_kernels(model, batches))

    def is_for_language(self, model: nn.Module) -> bool:
        """Whether the decision is that for language models (`selection.language`): the default, where nothing that
        is asked for needs kernels."""
        plain = self.criterion == DEFAULT_NAME and self.strategy == "greedy" and self.ridge is None
        lora = self.kernels.get("space", "lora") == "lora"
        needs_kernels = self.head_steps or {"outputs", "draws", "always_trained"} & set(self.kernels)
        adam = self.training.optimizer in (None, "adamw")
        return plain and lora and adam and not needs_kernels and default_outputs(model) == "log_likelihood"

    def language(
        self, model: nn.Module, sizes: Mapping[str, int], batches: Sequence[Mapping[str, Any]]
    ) -> LanguageRequest:
        """The request of a decision for a language model; `sizes` as `candidates` gives them.

        Raises:
            BudgetError: a budget of time or memory cannot be kept.
        """
        request = self.kernel_request(model)
        layers = request.layers(model)
        adapted = any(isinstance(layer.module, BaseTunerLayer) for layer in layers.values())
        ranks = (request.rank,) if adapted and self.ranks is None else self.ranks  # an adapter's rank is fixed
        batch = read_batches(batches[:1], model, needs_labels=True, what="the decision")[0]
        counts = counted_step(model, batch, sizes, request.always_trained)
        known = "error" not in counts or needs_cost(self.budget)
        cost = StepCost.of_kernels({RECORD: counts}) if known else None
        budget = parse_budget(self.budget, sizes, request.rank, cost, lowest_rank(ranks))
        return LanguageRequest(
            layers=layers,
            budget=budget,
            excluded=excluded_candidates(sizes, budget, self.exclude),
            asked_for=self.budget,
            ranks=ranks,
            rank=request.rank,
            lora_alpha=request.lora_alpha,
            training=self.training,
            seed=self.seed,
        )

    def choose(self, kernels: ModuleKernels, heads: Heads = ()) -> Recommendation:
        """`recommend` of these kernels."""
        return recommend(
            kernels,
            self.budget,
            self.criterion,
            self.ridge,
            self.strategy,
            self.seed,
            heads=heads,
            exclude=self.exclude,
            training=self.training,
        )

    def kernel_request(self, model: nn.Module) -> KernelRequest:
        """The kernels that are asked for, with the defaults that depend on the model."""
        options = {"seed": self.seed, "outputs": default_outputs(model), **self.kernels}
        request = KernelRequest(**options)
        has_loss = "error" in resolve_output(request.outputs).with_labels
        language = default_outputs(model) == "log_likelihood"
        if "draws" not in options and request.space == "lora" and language and has_loss:
            return replace(request, draws=LANGUAGE_DRAWS)
        return request


def default_outputs(model: nn.Module) -> str:
    """ "log_likelihood" for a model with output embeddings (a language model), "logits" for any other."""
    embeddings = getattr(base_model(model), "get_output_embeddings", lambda: None)()
    return "logits" if embeddings is None else "log_likelihood"


def kernels_through_heads(
    request: KernelRequest,
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    head_steps: int = HEAD_STEPS,
    resources: Resources = DEFAULT_RESOURCES,
) -> tuple[ModuleKernels, ModuleKernels]:
    """Kernels of the losses through the task head as it is, and after `head_steps` steps of training it alone.

    One backward pass a batch each, so that LoRA's random A can be averaged over several draws.

    Args:
        request: Its `outputs` are not used.
        resources: Their `folder` is not used.
    """
    request, resources = replace(request, outputs="loss"), replace(resources, folder=None)
    untrained = request.compute(model, batches, resources)
    with warmed_head(model, batches, head_steps, always_trained=request.always_trained):
        return untrained, _after(head_steps, request.compute(model, batches, resources))


def recommend_modules(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    budget: BudgetLike,
    criterion: str = DEFAULT_NAME,
    ridge: float | None = None,
    strategy: str = "greedy",
    *,
    seed: int = 0,
    head_steps: int | None = None,
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    training: Training | None = None,
    **kernels: Any,
) -> Recommendation:
    """`recommend(compute_ntk(model, batches), budget)`, after the arguments are checked without running the model.

    Args:
        model, batches: As for `compute_ntk`; the model is left as it was found.
        budget, criterion, ridge, strategy: As for `recommend`.
        exclude, training: As for `recommend`.
        head_steps: Steps for which the task head is trained, alone and for this computation only (`warmed_head`).
            Gradient energy takes the least of a module's shares through the head as it is and through the trained one
            (default: 20 steps, where there is a head); 0: the head as it is. Other criteria take the trained head
            alone where steps are given; their default is 0.
        seed: Of LoRA's random A, the cross-validation folds and the random halves.
        **kernels: Other arguments of `compute_ntk` (`targets`, `space`, `rank`, `draws`, `outputs`, `resources`, …),
            and `ranks`. For a language model, if nothing but `targets`, `rank`, `lora_alpha`, `ranks` and `resources`
            is passed, modules, ranks and learning rate are one decision without kernels (`selection.language`);
            `ranks` are those that a module may have, by default 1 to 32, for budgets that count modules `rank` alone.
            Otherwise `outputs` defaults to "log_likelihood" for language models, then `draws` to 32, and to "logits"
            for others, with 8 draws for the kernels through heads. `draws` that are passed are taken everywhere.

    Raises:
        PeftLinearError: or a subclass, as `compute_ntk` and `recommend`.
    """
    resources, ranks = kernels.pop("resources", DEFAULT_RESOURCES), kernels.pop("ranks", None)
    if (progress := kernels.pop("progress", None)) is not None:
        resources = replace(resources, progress=progress)
    request = ModuleRequest(
        budget=budget,
        criterion=criterion,
        ridge=ridge,
        strategy=strategy,
        seed=seed,
        head_steps=head_steps,
        exclude=exclude,
        training=training or Training(),
        kernels=kernels,
        resources=resources,
        ranks=ranks,
    )
    return request.recommend(model, batches)


def _head_draws(space: str) -> int:
    return HEAD_DRAWS if space == "lora" else 1


def _labelled(outputs: Outputs) -> Problem:
    """Outputs of that kind with class labels, to ask which criteria they allow."""
    return Problem(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), resolve_output(outputs).name, ridge=1.0)


def _after(head_steps: int, kernels: ModuleKernels) -> ModuleKernels:
    return replace(kernels, provenance={**kernels.provenance, "head_steps": head_steps})
