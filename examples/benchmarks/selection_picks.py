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
"""The sets that every selector takes within each budget, to be trained like all others and compared."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress

from records import Records
from selection_analysis import Measured, amounts, budgets, within
from selection_scores import BY_ADAM, Scores, count_examples
from selection_tasks import SelectionTask
from selection_truth import PICKED, Configuration, Protocol

from peft_linear import ModuleKernels, compute_ntk, recommend
from peft_linear.errors import TargetError
from peft_linear.selection.baselines import BASELINES, baseline
from peft_linear.selection.budget import fill, parse_budget
from peft_linear.selection.criteria import applicable_criteria
from peft_linear.selection.problem import Problem
from peft_linear.training.workflow import look


SEARCHED = ("gradient_energy", "trace", "leave_one_out", "predicted_loss", "condition_number")
BY_ADAM_TOO = ("gradient_energy", "leave_one_out", "predicted_loss")
RULES = tuple(name for name in BASELINES if name not in ("all_linear", "gradient_norm", "random"))
RANDOM_DRAWS = 3
RANDOM = "random"
RECOMMENDED = "recommend_modules"  # with its defaults

Picks = dict[str, dict[str, tuple[str, ...]]]  # selector -> budget -> modules


def choose(task: SelectionTask, table: Scores, seed: int, protocol: Protocol, records: Records) -> Picks:
    """What each selector takes; kept in `records`. Selectors with a kernel search, the others take their best."""
    key = (task.key, "picks", seed)
    if key not in records:
        records.add({"task": task.key, "look": "picks", "seed": seed, "picks": _choose(task, table, seed, protocol)})
    found = records[key]["picks"]
    return {name: {words: tuple(modules) for words, modules in of.items()} for name, of in found.items()}


def _choose(task: SelectionTask, table: Scores, seed: int, protocol: Protocol) -> Picks:
    model = task.make_model(seed)
    batches = task.calibration(count_examples(task, model), seed)
    shared = {"rank": protocol.rank, "lora_alpha": protocol.lora_alpha, "outputs": task.outputs, "progress": False}
    limits = amounts(task)
    kernels = {
        "lora, 8 draws": compute_ntk(model, batches, space="lora", draws=8, seed=seed, **shared),
        "weight": compute_ntk(model, batches, space="weight", seed=seed, **shared),
    }
    seen, heads = look(model, batches, seed=seed, **shared)
    by_default = {words: recommend(seen, amount, heads=heads, seed=seed).modules for words, amount in limits.items()}
    picks: Picks = {RECOMMENDED: by_default}
    for space, of_space in kernels.items():
        allowed = applicable_criteria(Problem.of(of_space, ridge=1.0))
        for criterion in (name for name in SEARCHED if name in allowed):
            for optimizer in ("sgd", "adamw") if criterion in BY_ADAM_TOO else ("sgd",):
                suffix = BY_ADAM if optimizer == "adamw" else ""
                picks[f"{criterion}{suffix} ({space})"] = {
                    words: recommend(of_space, amount, criterion, optimizer=optimizer).modules
                    for words, amount in limits.items()
                }
    for criterion, values in table.items():
        if criterion not in picks and _of_modules(criterion):
            order = sorted(task.modules, key=lambda name: -values[f"single {name}"])
            picks[criterion] = {words: _first(order, amount, kernels["weight"]) for words, amount in limits.items()}
    draws = [(f"{RANDOM} {draw}", RANDOM, draw) for draw in range(RANDOM_DRAWS)]
    for label, rule, draw in [*((name, name, 0) for name in RULES), *draws]:
        with suppress(TargetError):  # a model without modules of that kind
            picks[label] = {w: baseline(rule, kernels["weight"], amount, seed=draw) for w, amount in limits.items()}
    return picks


def _of_modules(criterion: str) -> bool:
    """Rivals' scores, and what is simulated: their sets are the best modules."""
    return "(" not in criterion or "(features" in criterion


def _first(order: Sequence[str], amount: int | float, kernels: ModuleKernels) -> tuple[str, ...]:
    return fill(order, parse_budget(amount, kernels.num_parameters), kernels.num_parameters)


def as_configurations(task: SelectionTask, picks: Picks, known: Sequence[Configuration]) -> list[Configuration]:
    """The picks that are not among the known sets, each once; modules in model order."""
    seen = {configuration.modules for configuration in known}
    found = []
    for of in picks.values():
        for chosen in of.values():
            modules = tuple(name for name in task.modules if name in chosen)
            if modules and modules not in seen:
                seen.add(modules)
                found.append(Configuration(key_of(modules), modules))
    return found


def key_of(modules: Sequence[str]) -> str:
    return PICKED + hashlib.sha256(" ".join(modules).encode()).hexdigest()[:12]


def pick_regrets(of: Measured, picks: Picks, steps: int) -> dict[str, dict[str, float]]:
    """{selector: {budget: loss of what it takes, less the least loss measured within the budget}}; what is trained."""
    keys: Mapping[tuple[str, ...], str] = {c.modules: c.key for c in of.sets}
    found: dict[str, dict[str, float]] = {}
    for words, limit in budgets(of.task, of.rank).items():
        pool = within(of, limit)
        if not pool:
            continue
        best = min(of.mean_loss(c.key, steps) for c in pool)
        for selector, chosen in picks.items():
            modules = tuple(name for name in of.task.modules if name in chosen[words])
            if modules in keys:
                found.setdefault(selector, {})[words] = of.mean_loss(keys[modules], steps) - best
    draws = [found.pop(name) for name in list(found) if name.startswith(f"{RANDOM} ")]
    if draws:
        shared = set.intersection(*(set(draw) for draw in draws))
        found[RANDOM] = {words: statistics.fmean(draw[words] for draw in draws) for words in sorted(shared)}
    return found
