# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The ground truth of the criteria: every candidate module trained alone, and the test loss that it reaches.

Each run trains plain LoRA on one module, and the task head, for a fixed number of steps. A run that is recorded is not
repeated, so an interrupted measurement continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm

from examples.common.records import Records
from examples.common.tasks import Task
from examples.common.training import batches_of_epochs, evaluate, exactly, on_device, trained_parameters


HEAD_ONLY = "(head only)"
ALL_LINEAR = "(all modules)"


@dataclass(frozen=True)
class Protocol:
    """How each module is trained; the same for all of them."""

    rank: int = 8
    lora_alpha: int = 16
    steps: int = 80
    batch_size: int = 16
    learning_rate: float = 3e-3
    optimizer: str = "AdamW, weight decay 0, constant learning rate"


@dataclass(frozen=True)
class Run:
    """One trained module: what was measured on the test split."""

    module: str
    seed: int
    test_loss: float
    test_accuracy: float
    parameters: int
    seconds: float


def measure(
    task: Task, modules: Sequence[str], seeds: Iterable[int], protocol: Protocol, records: Records
) -> list[Run]:
    """Trains what `records` lacks of modules x seeds and returns all runs. Cost: steps·batch_size examples a run."""
    wanted = [(module, seed) for seed in seeds for module in (HEAD_ONLY, *modules, ALL_LINEAR)]
    for module, seed in tqdm([key for key in wanted if key not in records], desc="training single modules"):
        names = {HEAD_ONLY: [], ALL_LINEAR: list(modules)}.get(module, [module])
        records.add(asdict(train(task, module, names, seed, protocol)))
    return [Run(**record) for record in records.select(wanted)]


def train(task: Task, label: str, names: Sequence[str], seed: int, protocol: Protocol) -> Run:
    """LoRA on `names`, and the head, from the model of `seed`; batches in the order of `seed`."""
    start = time.perf_counter()
    model, adapted = with_lora(task.new_model(seed), names, protocol)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=protocol.learning_rate, weight_decay=0.0)
    model.train()
    for batch in batches_of_epochs(task, seed, protocol.steps, protocol.batch_size):
        optimizer.zero_grad()
        model(**on_device(batch, model)).loss.backward()
        optimizer.step()
    loss, accuracy = evaluate(model, task, task.test)
    return Run(label, seed, loss, accuracy, adapted, round(time.perf_counter() - start, 2))


def with_lora(model: nn.Module, names: Sequence[str], protocol: Protocol) -> tuple[nn.Module, int]:
    """The model with LoRA on `names` and a trainable head, and the number of LoRA parameters."""
    head = next(name for name in ("classifier", "score") if hasattr(model, name))
    if not names:
        model.requires_grad_(False)
        getattr(model, head).requires_grad_(True)
        return model, 0
    config = LoraConfig(
        r=protocol.rank,
        lora_alpha=protocol.lora_alpha,
        target_modules=exactly(names),
        modules_to_save=[head],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(model, config)
    return model, sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
