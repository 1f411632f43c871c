# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Experiment A: the strength λ of the proximal term against distance, linearity and accuracy.

For each λ and seed two models are trained from one start with the same batches, rates and proximal term: the real one
and its linearised model. The gap between them is taken twice: the linear model at the real model's parameters (the
Taylor remainder), and where its own training took it (the paper's comparison).

The term pulls everything that is trained at every step, which is the paper's objective; or everything by the selective
rule, which is the paper's algorithm; or by that rule the LoRA factors and not the new head, which is ProximalLoRA.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from examples.common.records import Records
from examples.common.tasks import Task
from examples.common.training import trained_parameters
from examples.paper.training import Protocol, Pull, adapted, fit, make_optimizer, score, with_trained_head
from peft_linear import LinearizedModel, linearization_gap, linearize
from peft_linear.cli.data import batches_of
from peft_linear.proximal import proximal_firing_rate


LOSS = "cross_entropy"
EVERYTHING, FACTORS, NOTHING = "everything", "factors", "nothing"


@dataclass(frozen=True)
class Kind:
    """What is pulled, and when."""

    words: str
    scope: str  # EVERYTHING or FACTORS
    selective: bool


KINDS = {
    "always": Kind("everything is pulled at every step (the paper's objective)", EVERYTHING, False),
    "everything": Kind("everything is pulled by the selective rule (the paper's eq. 8)", EVERYTHING, True),
    "factors": Kind(
        "the LoRA factors are pulled by that rule, the head is free (ProximalLoRA, selective)", FACTORS, True
    ),
}


def measure(
    task: Task,
    names: Sequence[str],
    lambdas: Sequence[float],
    seeds: Sequence[int],
    protocol: Protocol,
    records: Records,
    head_epochs: int = 0,
) -> list[dict[str, Any]]:
    """Runs what `records` lacks of lambdas x seeds x what is pulled, and returns all of it."""
    wanted = [(pulled if pull else NOTHING, pull, seed) for seed in seeds for pull in lambdas for pulled in KINDS]
    wanted = list(dict.fromkeys(wanted))
    for pulled, pull, seed in tqdm([key for key in wanted if key not in records], desc="A: strengths"):
        records.add(run(task, names, pulled, pull, seed, protocol, head_epochs))
    return records.select(wanted)


def run(
    task: Task,
    names: Sequence[str],
    pulled: str,
    pull: float,
    seed: int,
    protocol: Protocol,
    head_epochs: int = 0,
) -> dict[str, Any]:
    """One λ and one seed: the real model and the linear one, trained and compared on the test split."""
    start = time.perf_counter()
    model = with_trained_head(task, seed, protocol, head_epochs)
    model = adapted(model, names, protocol, pull if pulled == FACTORS else None)
    linearized = linearize(model)
    anchors = linearized.anchor_state_dict()
    before = score(model, task, task.train, LOSS)
    optimizer = make_optimizer(trained_parameters(model), "adamw", protocol.learning_rate)
    own = {name: parameter for name, parameter in model.named_parameters() if name in anchors}
    term = None if pulled == FACTORS else attach(optimizer, own, anchors, pulled, pull)
    fit(model, task, seed, protocol, optimizer, LOSS)
    linear_rate = fit_linear(linearized, task, seed, protocol, pulled, pull)
    rows = sorted(task.test, key=lambda row: len(row["input_ids"]))
    batches = batches_of(rows, task.collator, batch_size=64)
    gaps = {at: linearization_gap(model, linearized, batches, at=at).to_dict() for at in ("model", "own")}
    moved = {name: own[name].detach() - anchor for name, anchor in anchors.items()}
    rate = term.firing_rate if term else proximal_firing_rate(model) if pulled == FACTORS else math.nan
    return {
        "pulled": pulled,
        "pull": pull,
        "seed": seed,
        "distance": {EVERYTHING: length(moved), FACTORS: length(moved, "lora_")},
        "linear_distance": {
            EVERYTHING: length(linearized.displacement()),
            FACTORS: length(linearized.displacement(), "lora_"),
        },
        "firing_rate": None if math.isnan(rate) else rate,
        "linear_firing_rate": None if math.isnan(linear_rate) else linear_rate,
        "loss_before": before.loss,
        "train": asdict(score(model, task, task.train, LOSS)),
        "linear_train": asdict(score(linearized, task, task.train, LOSS)),
        "gap_at_model": gaps["model"],
        "gap_at_own": gaps["own"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def fit_linear(
    linearized: LinearizedModel, task: Task, seed: int, protocol: Protocol, pulled: str, pull: float
) -> float:
    """Trains the linearised model as the real one is trained; returns how often the term acted."""
    own = dict(zip(linearized.names, linearized.parameters(), strict=True))
    optimizer = make_optimizer(list(own.values()), "adamw", protocol.learning_rate)
    term = attach(optimizer, own, linearized.anchor_state_dict(), pulled, pull)
    fit(linearized, task, seed, protocol, optimizer, LOSS)
    return term.firing_rate if term else math.nan


def attach(
    optimizer: Any,
    own: Mapping[str, Tensor],
    anchors: Mapping[str, Tensor],
    pulled: str,
    pull: float,
) -> Pull | None:
    """The proximal term of a kind on `own`, or on the LoRA factors among them; None where nothing is pulled."""
    if pulled == NOTHING:
        return None
    kind = KINDS[pulled]
    names = [name for name in own if kind.scope == EVERYTHING or "lora_" in name]
    return Pull(optimizer, [own[n] for n in names], [anchors[n] for n in names], pull, kind.selective)


def length(moved: Mapping[str, Tensor], part: str = "") -> float:
    """`‖θ−θ0‖` over the parameters whose name has `part`."""
    return math.sqrt(sum(float(delta.double().square().sum()) for name, delta in moved.items() if part in name))
