# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The ground truth of the selection benchmark: what fine-tuning a set of modules really reaches.

A configuration is a set of modules. Its learning rate is tuned on the validation split with the first seed: from the
middle of a grid uphill, for each budget of steps; the other seeds are trained at what was found. All budgets of steps
are read off one run, since the learning rate stays constant after its warm-up.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from records import Records
from selection_tasks import SelectionTask, Sizes, counted
from torch import nn
from tqdm.auto import tqdm

from peft_linear.report.names import parse_name
from peft_linear.selection.ranks import rank_patterns


HEAD_ONLY, ALL_LINEAR = "head only", "all linear"
PICKED = "pick "
SIZES = (2, 4, 8)  # modules of a random subset
FRACTIONS = (0.10, 0.25)  # of all-linear's parameters
ONE_RATE = 3e-3  # for all sets alike: what tuning finds for all-linear and the short budget, in the tasks looked at


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


@dataclass(frozen=True)
class Configuration:
    """A set of modules to adapt."""

    key: str
    modules: tuple[str, ...]
    ranks: tuple[int, ...] | None = None  # of the modules; None: the protocol's for all

    @property
    def single(self) -> bool:
        return self.key.startswith("single ")

    @property
    def picked(self) -> bool:
        """Whether a selector's choice made it, so that it belongs to no sample of sets."""
        return self.key.startswith(PICKED)


def configurations(task: SelectionTask, rank: int, random_sets: int = 6) -> list[Configuration]:
    """Every module alone; sets by layer, by type, by rules of thumb and at random; nothing and everything."""
    names = list(task.modules)
    parsed = {name: parse_name(name) for name in names}
    found = [Configuration(f"single {name}", (name,)) for name in names]
    sets: dict[str, list[str]] = {}
    for name, parts in parsed.items():
        if parts.layer is not None:
            sets.setdefault(f"layer {parts.layer}", []).append(name)
            sets.setdefault(f"type {parts.kind}", []).append(name)
    layers = sorted({parts.layer for parts in parsed.values() if parts.layer is not None})
    half = layers[len(layers) // 2]
    in_layers = [name for name in names if parsed[name].layer is not None]
    sets["first half"] = [name for name in in_layers if parsed[name].layer < half]
    sets["last half"] = [name for name in in_layers if parsed[name].layer >= half]
    sets["query and value"] = [name for name in names if parsed[name].is_query_or_value]
    sets["attention"] = [name for name in names if parsed[name].is_attention]
    sets["MLP"] = [name for name in in_layers if parsed[name].is_mlp]
    for number in range(random_sets):
        for size in SIZES:
            if size < len(names):
                sets[f"{size} random, {number}"] = random.Random(100 * size + number).sample(names, size)
        for fraction in FRACTIONS:
            sets[f"{fraction:.0%} random, {number}"] = random_within(task, rank, fraction, number)
    sets[HEAD_ONLY], sets[ALL_LINEAR] = [], names
    seen = {configuration.modules for configuration in found}
    for key, chosen in sets.items():
        modules = tuple(name for name in names if name in chosen)
        if modules not in seen and (modules or (key == HEAD_ONLY and task.head)):
            seen.add(modules)
            found.append(Configuration(key, modules))
    return found


def random_within(task: SelectionTask, rank: int, fraction: float, seed: int) -> list[str]:
    """Modules in random order, each taken if it fits into that part of all-linear's parameters."""
    names = list(task.modules)
    limit = fraction * task.parameters(names, rank)
    chosen: list[str] = []
    for name in random.Random(f"{fraction} {seed}").sample(names, len(names)):
        if task.parameters([*chosen, name], rank) <= limit:
            chosen.append(name)
    return chosen


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
        target_modules="|".join(map(re.escape, names)),  # a string is a full match: a list would match by suffix
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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
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


class Truth:
    """Finished runs of one task, and what is read off them."""

    def __init__(self, task: SelectionTask, protocol: Protocol, records: Records) -> None:
        self.task, self.protocol, self.records = task, protocol, records

    @classmethod
    def at(cls, path: Path, task: SelectionTask, protocol: Protocol, sizes: Sizes) -> Truth:
        """The runs that are kept in a file."""
        setting = {"protocol": protocol.setting(), "sizes": asdict(sizes)}
        return cls(task, protocol, Records(path, setting, ("task", "configuration", "learning_rate", "seed")))

    def run(self, configuration: Configuration, rate: float, seed: int) -> dict[str, Any]:
        key = (self.task.key, configuration.key, rate, seed)
        if key not in self.records:
            start = time.perf_counter()
            budgets = train(self.task, configuration.modules, rate, seed, self.protocol, configuration.ranks)
            self.records.add(
                {
                    "task": self.task.key,
                    "configuration": configuration.key,
                    "learning_rate": rate,
                    "seed": seed,
                    "modules": configuration.modules,
                    "ranks": configuration.ranks,
                    "budgets": budgets,
                    "seconds": round(time.perf_counter() - start, 2),
                }
            )
        return self.records[key]

    def tune(self, configuration: Configuration, seed: int) -> dict[int, float]:
        """{budget: the learning rate with the least validation loss}, from the middle of the grid uphill."""
        grid = self.protocol.learning_rates

        def loss(index: int, budget: int) -> float:
            if not 0 <= index < len(grid):
                return float("inf")
            return self.run(configuration, grid[index], seed)["budgets"][str(budget)]["validation_loss"]

        found = {}
        for budget in self.protocol.steps:
            best = len(grid) // 2
            for direction in (1, -1):
                while loss(best + direction, budget) < loss(best, budget):
                    best += direction
            found[budget] = grid[best]
        return found

    def measure(self, configuration: Configuration, seeds: Sequence[int]) -> None:
        """Trains what is missing; the first seed tunes the learning rates."""
        rates = set(self.tune(configuration, seeds[0]).values())
        for seed in seeds[1:]:
            for rate in sorted(rates):
                self.run(configuration, rate, seed)

    def finished(self, configuration: Configuration, seeds: Sequence[int], rate: float | None = None) -> bool:
        """Whether nothing is missing, found out without training."""
        return self.losses(configuration, seeds, rate=rate) is not None

    def losses(
        self,
        configuration: Configuration,
        seeds: Sequence[int],
        measure: str = "test_loss",
        rate: float | None = None,
    ) -> dict[int, list[float]] | None:
        """{budget: the number of each seed}, at this learning rate, or the tuned ones; None where runs are missing."""
        reader = _Reading(self.task, self.protocol, self.records)
        try:
            rates = dict.fromkeys(self.protocol.steps, rate) if rate else reader.tune(configuration, seeds[0])
            return {
                budget: [reader.run(configuration, rates[budget], s)["budgets"][str(budget)][measure] for s in seeds]
                for budget in self.protocol.steps
            }
        except KeyError:
            return None


class _Reading(Truth):
    """Reads and never trains."""

    def run(self, configuration: Configuration, rate: float, seed: int) -> dict[str, Any]:
        return self.records[(self.task.key, configuration.key, rate, seed)]


def measure(truth: Truth, configurations: Iterable[Configuration], seeds: Sequence[int]) -> None:
    """All configurations, seed by seed, so that an interrupted measurement has whole seeds."""
    configurations = list(configurations)
    for last in range(1, len(seeds) + 1):
        missing = [c for c in configurations if not truth.finished(c, seeds[:last])]
        for configuration in tqdm(missing, desc=f"{truth.task.key}, seed {seeds[last - 1]}"):
            truth.measure(configuration, seeds[:last])


def measure_at_one_rate(truth: Truth, configurations: Iterable[Configuration], seeds: Sequence[int]) -> None:
    """What `measure` has not trained with `ONE_RATE` already."""
    configurations = list(configurations)
    for seed in seeds:
        missing = [c for c in configurations if not truth.finished(c, [seed], ONE_RATE)]
        for configuration in tqdm(missing, desc=f"{truth.task.key}, seed {seed}, one rate"):
            truth.run(configuration, ONE_RATE, seed)
