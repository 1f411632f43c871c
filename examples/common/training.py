# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The plain training loop of the benchmarks, in parts: targets, batches, evaluation, distance."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from examples.common.tasks import Features, Task


def exactly(names: Sequence[str]) -> str:
    """`target_modules` for these modules alone: a string is a full match, while peft matches a list by suffix."""
    return "|".join(map(re.escape, names))


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batches_of_epochs(task: Task, seed: int, steps: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """`steps` batches in an order that depends on the seed only, epoch after epoch; incomplete ones are dropped."""
    taken, epoch = 0, 0
    while taken < steps:
        order = np.random.default_rng(1000 * seed + epoch).permutation(len(task.train))
        for first in range(0, len(order) - batch_size + 1, batch_size):
            if taken == steps:
                return
            yield task.collator([task.train[i] for i in order[first : first + batch_size]])
            taken += 1
        epoch += 1


def on_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    task: Task,
    rows: Features,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    batch_size: int = 64,
) -> tuple[float, float]:
    """Mean loss (infinite where it is not finite) and accuracy on `rows`; sorted by length, so as to pad less."""
    model.eval()
    total, correct = 0.0, 0
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    for first in range(0, len(rows), batch_size):
        batch = on_device(task.collator(rows[first : first + batch_size]), model)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        total += float(loss(logits, labels)) * len(labels)
        correct += int((logits.argmax(-1) == labels).sum())
    return total / len(rows) if math.isfinite(total) else math.inf, correct / len(rows)


@torch.no_grad()
def weight_distance(model: nn.Module) -> float:
    """‖ΔW‖_F over all adapted weights together, with ΔW = s·BA from r×r matrices."""
    total = 0.0
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for name in layer.active_adapters:
            a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
            total += layer.scaling[name] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
    return max(total, 0.0) ** 0.5
