# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How the selection benchmark trains a set of modules, and what it records of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from examples.benchmarks.selection.tasks import SelectionTask, counted
from examples.common.training import exactly, trained_parameters
from peft_linear.recommendation.ranks import rank_patterns


@dataclass(frozen=True)
class Protocol:
    """How every configuration is trained."""

    rank: int = 8
    lora_alpha: int = 16
    batch_size: int = 8
    steps: tuple[int, ...] = (16, 64)  # the short and the long budget
    warmup: int = 4
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    optimizer: str = "AdamW, weight decay 0, constant learning rate after a linear warm-up, no dropout"
    decays: bool = False  # linearly to 0 at the last step, as in the HF Trainer; then there is one budget of steps

    def setting(self) -> dict[str, Any]:
        """For the record; `optimizer` says in words whether the rate decays."""
        return {name: value for name, value in asdict(self).items() if name != "decays"}

    def factor(self, step: int) -> float:
        """Of the learning rate, at a step from 1 on."""
        if not self.decays:
            return min(1.0, step / self.warmup)
        return min(step / self.warmup, (max(self.steps) + 1 - step) / (max(self.steps) + 1 - self.warmup))


CONSTANT = Protocol()
DECAYED = Protocol(
    batch_size=16,
    steps=(96,),
    warmup=6,
    learning_rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    optimizer="AdamW, weight decay 0, linear warm-up, then linear decay to 0, no dropout",
    decays=True,
)


def quick(protocol: Protocol) -> Protocol:
    """Every step of it, but too short to mean anything."""
    short: dict[str, Any] = {"steps": (2,), "batch_size": 4} if protocol.decays else {"steps": (1, 2)}
    return replace(protocol, learning_rates=(3e-3,), warmup=1, **short)


def with_adapter(
    task: SelectionTask,
    names: Sequence[str],
    seed: int,
    protocol: Protocol,
    ranks: Sequence[int] | None = None,
) -> nn.Module:
    """The model of `seed` with LoRA on `names` and a trainable head; `ranks` of the modules, all scaled alike."""
    model = task.make_model(seed)
    if not names:
        model.requires_grad_(False)
        getattr(model, str(task.head)).requires_grad_(True)
        return model
    of_modules = {} if ranks is None else dict(zip(names, ranks, strict=True))
    rank_pattern, alpha_pattern = rank_patterns(of_modules, protocol.rank, protocol.lora_alpha)
    config = LoraConfig(
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        r=protocol.rank,
        lora_alpha=protocol.lora_alpha,
        target_modules=exactly(names),
        modules_to_save=[task.head] if task.head else None,
        **task.lora,
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def train(
    task: SelectionTask,
    names: Sequence[str],
    rate: float,
    seed: int,
    protocol: Protocol,
    ranks: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
    """{budget of steps: validation and test loss and accuracy} of one run, in evaluation mode: without dropout."""
    model = with_adapter(task, names, seed, protocol, ranks).eval()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=rate, weight_decay=0.0)
    found = {}
    batches = task.batches(seed, protocol.batch_size)
    for step in range(1, max(protocol.steps) + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * protocol.factor(step)
        optimizer.zero_grad()
        model(**next(batches)).loss.backward()
        optimizer.step()
        if step in protocol.steps:
            found[str(step)] = evaluate(task, model)
    return found


@torch.inference_mode()
def evaluate(task: SelectionTask, model: nn.Module) -> dict[str, float]:
    """Mean loss and accuracy on the validation and the test split; a language model has no accuracy here."""
    found = {}
    for split, examples in (("validation", task.validation), ("test", task.test)):
        loss = correct = 0.0
        count = 0
        for batch in task.in_order_of_length(examples):
            output, weight = model(**batch), counted(batch)
            loss += float(output.loss) * weight
            count += weight
            if batch["labels"].ndim == 1:
                correct += int((output.logits.argmax(-1) == batch["labels"]).sum())
        found[f"{split}_loss"] = round(loss / count, 6) if loss == loss else float("inf")
        if task.outputs == "logits":
            found[f"{split}_accuracy"] = round(correct / count, 6)
    return found
