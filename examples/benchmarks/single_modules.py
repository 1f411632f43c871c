# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The truth the criteria are held against: every candidate module trained alone, and the test loss that came of it.

Each run trains plain LoRA on one module, and the task head, for a fixed number of steps. Runs are appended to a JSONL
file as they finish; a run that is in the file is not repeated, so an interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from common import Task
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm


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


def read_runs(path: Path) -> list[Run]:
    if not path.is_file():
        return []
    return [Run(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(task: Task, modules: Sequence[str], seeds: Iterable[int], protocol: Protocol, path: Path) -> list[Run]:
    """Trains what `path` lacks of modules x seeds and returns all runs. Cost: steps·batch_size examples a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(run.module, run.seed) for run in read_runs(path)}
    wanted = [(module, seed) for seed in seeds for module in (HEAD_ONLY, *modules, ALL_LINEAR)]
    for module, seed in tqdm([pair for pair in wanted if pair not in done], desc="training single modules"):
        names = {HEAD_ONLY: [], ALL_LINEAR: list(modules)}.get(module, [module])
        run = train(task, module, names, seed, protocol)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(run)) + "\n")
    return [run for run in read_runs(path) if (run.module, run.seed) in set(wanted)]


def train(task: Task, label: str, names: Sequence[str], seed: int, protocol: Protocol) -> Run:
    """LoRA on `names`, and the head, from the model of `seed`; batches in the order of `seed`."""
    start = time.perf_counter()
    model, adapted = with_lora(task.new_model(seed), names, protocol)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=protocol.learning_rate, weight_decay=0.0)
    model.train()
    for batch in batches(task, seed, protocol):
        optimizer.zero_grad()
        model(**on_device(batch, model)).loss.backward()
        optimizer.step()
    loss, accuracy = evaluate(model, task)
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
        target_modules="|".join(map(re.escape, names)),  # a string is a full match: a list would match by suffix
        modules_to_save=[head],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(model, config)
    return model, sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def batches(task: Task, seed: int, protocol: Protocol) -> Iterable[dict[str, Tensor]]:
    """`steps` batches in an order that depends on the seed only, epoch after epoch."""
    taken, epoch = 0, 0
    while taken < protocol.steps:
        order = np.random.default_rng(1000 * seed + epoch).permutation(len(task.train))
        for first in range(0, len(order) - protocol.batch_size + 1, protocol.batch_size):
            if taken == protocol.steps:
                return
            yield task.collator([task.train[i] for i in order[first : first + protocol.batch_size]])
            taken += 1
        epoch += 1


def on_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


@torch.inference_mode()
def evaluate(model: nn.Module, task: Task, batch_size: int = 64) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on the test split; examples of a length together, to pad less."""
    model.eval()
    rows = sorted(task.test, key=lambda row: len(row["input_ids"]))
    loss, correct = 0.0, 0
    for first in range(0, len(rows), batch_size):
        batch = on_device(task.collator(rows[first : first + batch_size]), model)
        logits = model(**batch).logits
        loss += nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").item()
        correct += int((logits.argmax(-1) == batch["labels"]).sum())
    return loss / len(rows), correct / len(rows)
