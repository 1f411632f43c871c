# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What both experiments train: LoRA on query, key and value of chosen layers, and its linearised model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from examples.common.tasks import Features, Task
from examples.common.training import batches_of_epochs, evaluate, exactly, on_device, trained_parameters
from peft_linear import ProximalLoraConfig
from peft_linear.capture.targets import resolve_always_trained
from peft_linear.functional.proximal import factor_proximal_step_, inner_product


LOSSES = ("cross_entropy", "squared")
OPTIMIZERS = ("adamw", "sgd")
LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|block)\.(\d+)\.")
PROJECTIONS = {"query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "c_attn"}


@dataclass(frozen=True)
class Protocol:
    """How every run is trained. Rank, α, rate, schedule and epochs are those of the authors' released code."""

    rank: int = 8
    lora_alpha: int = 8
    epochs: int = 10
    batch_size: int = 16
    micro_batch: int = 16  # examples in one backward pass; gradients of a batch are accumulated
    learning_rate: float = 4e-3  # of AdamW; that of SGD follows from the kernel
    warmup: float = 0.06  # share of the steps, then linear decay to 0
    dropout: bool = False  # in the model and, 0.1, in LoRA; the linearised model has none

    def steps(self, task: Task) -> int:
        """Optimizer steps of one run; what is left of an epoch after its last whole batch is dropped."""
        return self.epochs * (len(task.train) // self.batch_size)


@dataclass(frozen=True)
class Score:
    """Of a model on one split, dropout off; infinite loss where the run diverged."""

    loss: float
    accuracy: float


def projections_by_layer(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """{layer: names of its query, key and value modules}, by the usual names.

    Raises:
        SystemExit: the model has none of them.
    """
    found: dict[int, list[str]] = {}
    for name, _ in model.named_modules():
        layer = LAYER.search(name)
        if layer and name.rpartition(".")[2] in PROJECTIONS:
            found.setdefault(int(layer[1]), []).append(name)
    if not found:
        raise SystemExit(f"{type(model).__name__} has no layers with modules called {', '.join(sorted(PROJECTIONS))}")
    return {layer: tuple(found[layer]) for layer in sorted(found)}


def adapted(model: nn.Module, names: Sequence[str], protocol: Protocol, pull: float | None = None) -> PeftModel:
    """LoRA on `names` with a trained head; ProximalLoRA (selective) of strength `pull` where one is given."""
    shared = {
        "r": protocol.rank,
        "lora_alpha": protocol.lora_alpha,
        "lora_dropout": 0.1 if protocol.dropout else 0.0,
        "target_modules": exactly(names),
        "task_type": "SEQ_CLS",
    }
    if pull is None:
        return get_peft_model(model, LoraConfig(**shared))
    config = ProximalLoraConfig(**shared, proximal_lambda=pull, proximal_selective=True)
    return get_peft_model(model, config)


def loss_of(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Mean over the examples of the cross-entropy, or of `½‖f − onehot(y)‖²`."""
    if kind == "squared":
        return 0.5 * (logits - F.one_hot(labels, logits.shape[1]).to(logits)).square().sum(dim=1).mean()
    return F.cross_entropy(logits, labels)


def fit(
    model: nn.Module, task: Task, seed: int, protocol: Protocol, optimizer: torch.optim.Optimizer, loss: str
) -> None:
    """Trains in place: batches ordered by `seed`, warm-up and linear decay; stops at a loss that is not finite."""
    steps = protocol.steps(task)
    scheduler = get_linear_schedule_with_warmup(optimizer, int(protocol.warmup * steps), steps)
    model.train(protocol.dropout)
    for batch in batches_of_epochs(task, seed, steps, protocol.batch_size):
        labels = batch.pop("labels")
        optimizer.zero_grad()
        for first in range(0, len(labels), protocol.micro_batch):
            rows = slice(first, first + protocol.micro_batch)
            part = on_device({"labels": labels[rows], **{key: value[rows] for key, value in batch.items()}}, model)
            wanted = part.pop("labels")
            value = loss_of(model(**part).logits, wanted, loss) * (len(wanted) / len(labels))
            if not bool(value.isfinite()):
                return
            value.backward()
        optimizer.step()
        scheduler.step()


def with_trained_head(task: Task, seed: int, protocol: Protocol, epochs: int) -> nn.Module:
    """The model of `seed`, its new head trained alone for `epochs` first; all else is as it was."""
    model = task.new_model(seed)
    if epochs:
        model.requires_grad_(False)
        for head in resolve_always_trained(model).values():
            head.requires_grad_(True)
        optimizer = make_optimizer(trained_parameters(model), "adamw", protocol.learning_rate)
        fit(model, task, seed, replace(protocol, epochs=epochs), optimizer, "cross_entropy")
    return model


def make_optimizer(parameters: Sequence[Tensor], kind: str, learning_rate: float) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)


class Pull:
    """The decoupled proximal term in one optimizer, on any parameters: `θ ← θ0 + (θ−θ0)/(1+ηλ)` after each step.

    What ProximalLoRA does to an adapter's factors, for parameters that are no adapter's. With the selective rule it
    acts only where ⟨∇R(θ_t), θ_t−θ0⟩ ≥ 0 before the step (arXiv 2602.08239, eq. 8).

    Args:
        optimizer: Of one learning rate; hooked, and the parameters are pulled from its next step on.
        parameters: With their values at θ0 as `anchors`.
        strength: λ.
        selective: Whether the rule decides.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        anchors: Sequence[Tensor],
        strength: float,
        selective: bool,
    ) -> None:
        self.parameters, self.anchors = list(parameters), list(anchors)
        self.strength, self.selective = strength, selective
        self.steps = self.fired = 0
        self._acts = True
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @property
    def firing_rate(self) -> float:
        """Share of the steps at which the term acted; NaN before the first."""
        return self.fired / self.steps if self.steps else math.nan

    @torch.no_grad()
    def _before(self, *_: object) -> None:
        if self.selective:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            self._acts = bool(inner_product(gradients, self.parameters, self.anchors) >= 0)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.steps += 1
        if self._acts:
            self.fired += 1
            rate = optimizer.param_groups[0]["lr"]
            factor_proximal_step_(self.parameters, self.anchors, rate * self.strength)


def lora_a(model: nn.Module) -> dict[str, Tensor]:
    """LoRA's A matrices by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}


@torch.no_grad()
def start_from(model: nn.Module, matrices: Mapping[str, Tensor]) -> nn.Module:
    """Plain LoRA with the A matrices given, so that runs on different layers start from the same ones."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.copy_(matrices[name])
    return model


def score(model: nn.Module, task: Task, rows: Features, loss: str) -> Score:
    """Of the model on `rows`, by the loss that is trained."""
    return Score(*evaluate(model, task, rows, lambda logits, labels: loss_of(logits, labels, loss)))
