# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Arms: ways to train LoRA that forget less. `Arm` is plain LoRA; each other arm overrides what it does differently.

The seam is what a class may override: the configuration (`config`), what happens before and after the adapter is
added (`base`, `attach`), the loss (`loss`), how the change is scaled (`scaled`), and three numbers of the training.
An arm of one run is an instance; `@register` makes the class known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn
from torch.optim import Optimizer

from examples.benchmarks.language.arms import candidates
from examples.benchmarks.language.batches import Encoded, pad
from examples.benchmarks.language.training import ALPHA, batch_loss
from peft_linear import KlBudget, ProximalLoraConfig, ProximalReference, attach_proximal, collect_reference
from peft_linear.errors import PeftLinearError

from .measures import rounded
from .plan import LORA, RANK


@dataclass
class Request:
    """What an arm is made for."""

    model: nn.Module  # the base model
    strength: float
    seed: int
    steps: int
    rate_sum: float  # Σ_t η_t of the training as planned
    reference: Sequence[Encoded]
    held_out: Sequence[Encoded]  # of the reference's kind
    memo: dict[str, Any] = field(default_factory=dict)  # what is computed once for a base model

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]


class Arm:
    """LoRA on all linear modules. Strength: none."""

    scales: tuple[float, ...] = (1.0, 0.7)  # of the adapter after training, at which all is measured

    rate_factor = 1.0
    steps_factor = 1.0  # the part of the planned steps that is trained
    weight_decay = 0.0
    fields: dict[str, Any] = {"proximal_lambda": 0.0}  # noqa: RUF012  of ProximalLoraConfig

    def __init__(self, request: Request) -> None:
        self.request = request

    def config(self) -> ProximalLoraConfig:
        return ProximalLoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            target_modules=[candidate.name for candidate in candidates(self.request.model)],
            task_type="CAUSAL_LM",
            **self.fields,
        )

    def base(self, config: ProximalLoraConfig) -> AbstractContextManager[None]:
        """Around the whole run, entered before the adapter is added; must leave the base model as it was."""
        return nullcontext()

    def attach(self, wrapped: PeftModel) -> None:
        """After the adapter was added."""

    def begin(self, optimizer: Optimizer, schedule: Any) -> Callable[[], None]:
        """Returns what is called after every step."""
        return lambda: None

    def notes(self) -> dict[str, Any]:
        """What the arm itself has to record after the training."""
        return {}

    def loss(self, model: nn.Module, batch: list[Encoded]) -> Tensor:
        return batch_loss(model, batch)

    @contextmanager
    def scaled(self, model: nn.Module, factor: float) -> Iterator[None]:
        """Inside the block the change of the weights is `factor` times the trained one."""
        with rescale_adapter_scale(model, factor):
            yield


ARMS: dict[str, type[Arm]] = {}


def register(name: str) -> Callable[[type[Arm]], type[Arm]]:
    def add(arm: type[Arm]) -> type[Arm]:
        ARMS[name] = arm
        return arm

    return add


@register(LORA)
class Lora(Arm):
    """LoRA on all linear modules; scaled down after training, it is an arm of its own. Strength: none."""

    scales = (1.0, 0.85, 0.7, 0.5, 0.35)


def make_arm(name: str, request: Request) -> Arm:
    if name not in ARMS:
        raise PeftLinearError(f"no arm {name!r}; there are {sorted(ARMS)}")
    return ARMS[name](request)


@register("lower_rate")
class LowerRate(Arm):
    """Strength: the factor of the learning rate."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.rate_factor = request.strength


@register("early_stopping")
class EarlyStopping(Arm):
    """Strength: the part of the steps that is trained, of a schedule that is planned for all of them."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.steps_factor = request.strength


@register("weight_decay")
class WeightDecay(Arm):
    """AdamW's. Strength: the decay in multiples of 1/Σ_t η_t."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.weight_decay = request.strength / request.rate_sum


class Pull(Arm):
    """ProximalLoRA, decoupled. Strength: λ."""

    space = "factors"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.fields = {"proximal_space": self.space, "proximal_lambda": request.strength}


@register("pull_factors")
class PullFactors(Pull):
    """ProximalLoRA in factor space. Strength: λ."""


@register("pull_delta")
class PullDelta(Pull):
    """ProximalLoRA in delta space. Strength: λ."""

    space = "delta"


@register("pull_function")
class PullFunction(Pull):
    """ProximalLoRA in function space, on the reference texts. Strength: λ."""

    space = "function"


@register("kl_budget")
class Budget(PullFunction):
    """The pull in function space, λ steered to a budget of KL on held-out texts. Strength: the budget in nats."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.fields = {"proximal_space": self.space}  # λ is "auto"

    def attach(self, wrapped: PeftModel) -> None:
        self.wrapped = wrapped

    def begin(self, optimizer: Optimizer, schedule: Any) -> Callable[[], None]:
        steps = self.request.steps
        attach_proximal(self.wrapped, optimizer, num_steps=steps, scheduler=schedule)
        texts, rows = self.request.held_out, 8
        batches = [pad(texts[start : start + rows], pad_token=0) for start in range(0, len(texts), rows)]
        target = self.request.strength
        self.budget = KlBudget(self.wrapped, optimizer, batches, target, num_steps=steps, scheduler=schedule)
        return lambda: (self.budget.step(), None)[1]

    def notes(self) -> dict[str, Any]:
        return {
            "held_out_kl": self.budget.history[-1].kl,
            "steered": [[each.step, rounded(each.kl), rounded(each.strength)] for each in self.budget.history],
        }


@register("projection_decay")
class ProjectionDecay(Arm):
    """Selective Projection Decay (arXiv 2411.01713), with θ0 as anchor of A and B. Strength: its λ."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.fields = {"proximal_mode": "projection", "proximal_lambda": request.strength}


def function_reference(request: Request) -> ProximalReference:
    """The statistics of function space, taken once for a model."""

    def collect() -> Any:
        texts, rows = request.reference, 8
        batches = [pad(texts[start : start + rows], pad_token=0) for start in range(0, len(texts), rows)]
        names = [candidate.name for candidate in candidates(request.model)]
        return collect_reference(request.model, batches, targets=names, progress=False)

    return request.once("function_reference", collect)
