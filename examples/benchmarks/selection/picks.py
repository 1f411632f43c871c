# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The sets that every selector chooses within each budget, to be trained like all others and compared."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import product
from typing import Any

from torch import nn

from examples.benchmarks.selection.analysis import Measured, amounts, budgets, within
from examples.benchmarks.selection.scores import BY_ADAM, DEFAULT, Scores, count_examples
from examples.benchmarks.selection.sets import PICKED, Configuration
from examples.benchmarks.selection.tasks import Batch, SelectionTask
from examples.benchmarks.selection.training import Protocol
from examples.common.records import Records
from peft_linear import ModuleKernels, Resources, compute_ntk, recommend
from peft_linear.errors import TargetError
from peft_linear.recommendation.budget import fill, parse_budget
from peft_linear.selection.baselines.by_kernels import BASELINES, baseline
from peft_linear.selection.exclusion import DEFAULT_EXCLUDE, excluded_candidates
from peft_linear.selection.request import ModuleRequest
from peft_linear.selection.training import Training


SEARCHED = ("gradient_energy", "trace", "leave_one_out", "predicted_loss", "condition_number")
SPACES: dict[str, dict[str, Any]] = {"lora, 8 draws": {"space": "lora", "draws": 8}, "weight": {"space": "weight"}}
BY_ADAM_TOO = ("gradient_energy", "leave_one_out", "predicted_loss")
RULES = tuple(name for name in BASELINES if name not in ("all_linear", "gradient_norm", "random"))
QUIET = Resources(progress=False)
RANDOM_DRAWS = 3
RANDOM = "random"
RECOMMENDED = "recommend_modules"  # with its defaults
WITHOUT_EXCLUSIONS = f"{RECOMMENDED}, no exclusions"
EXCLUDING = "{}, pooler excluded"  # a baseline with the exclusions of `recommend_modules`
ALSO_EXCLUDING = ("fisher", "page")

Picks = dict[str, dict[str, tuple[str, ...]]]  # selector -> budget -> modules


def choose(
    task: SelectionTask,
    table: Scores,
    seed: int,
    protocol: Protocol,
    records: Records,
    wanted: Sequence[str] | None = None,
) -> Picks:
    """The choices of the `wanted` selectors, or of all; each is recorded by itself."""
    chooser = Chooser(task, table, seed, protocol)
    unknown = sorted(set(wanted or ()) - set(chooser.selectors))
    if unknown:
        raise SystemExit(
            f"{task.key}: no selector is called {unknown[0]!r}; there are: {', '.join(chooser.selectors)}"
        )
    for name in wanted or chooser.selectors:
        if _key(task, name, seed) not in records:
            picks = {words: list(modules) for words, modules in chooser.selectors[name]().items()}
            records.add({"task": task.key, "scorer": f"{PICKED}{name}", "seed": seed, "picks": picks})
    return chosen_before(task, wanted or list(chooser.selectors), seed, records)


def chosen_before(task: SelectionTask, names: Iterable[str], seed: int, records: Records) -> Picks:
    """The recorded choices of these selectors; one without a choice is left out."""
    found = {name: records[_key(task, name, seed)]["picks"] for name in names if _key(task, name, seed) in records}
    return {name: {words: tuple(modules) for words, modules in of.items()} for name, of in found.items() if of}


def _key(task: SelectionTask, selector: str, seed: int) -> tuple[str, str, int]:
    return task.key, f"{PICKED}{selector}", seed


class Chooser:
    """Every selector of one task, by name; kernels are computed when first needed.

    Selectors with a kernel search; the others choose the best modules by their score, or those of their rule.
    """

    def __init__(self, task: SelectionTask, table: Scores, seed: int, protocol: Protocol) -> None:
        self.task, self.table, self.seed = task, table, seed
        self.limits = amounts(task)
        self.kernels: dict[str, ModuleKernels] = {}
        self.sizes = {name: task.parameters([name], protocol.rank) for name in task.modules}
        self.shared = {"rank": protocol.rank, "lora_alpha": protocol.lora_alpha, "seed": seed}

    @cached_property
    def selectors(self) -> dict[str, Callable[[], dict[str, tuple[str, ...]]]]:
        found: dict[str, Callable[[], dict[str, tuple[str, ...]]]] = {
            RECOMMENDED: self.by_default,
            WITHOUT_EXCLUSIONS: partial(self.by_default, exclude=()),
        }
        for space in SPACES:
            for criterion, suffix in product(SEARCHED, ("", BY_ADAM)):
                name = f"{criterion}{suffix} ({space})"
                if name in self.table and (not suffix or criterion in BY_ADAM_TOO):
                    found[name] = partial(self.by_search, space, criterion, "adamw" if suffix else "sgd")
        for name in self.table:
            if name not in found and _of_modules(name):
                found[name] = partial(self.by_score, name)
                if name in ALSO_EXCLUDING:
                    found[EXCLUDING.format(name)] = partial(self.by_score, name, exclude=DEFAULT_EXCLUDE)
        draws = {f"{RANDOM} {draw}": partial(self.by_rule, RANDOM, draw) for draw in range(RANDOM_DRAWS)}
        return found | {name: partial(self.by_rule, name) for name in RULES} | draws

    @cached_property
    def inputs(self) -> tuple[nn.Module, list[Batch]]:
        model = self.task.make_model(self.seed)
        return model, self.task.calibration(count_examples(self.task, model), self.seed)

    @cached_property
    def default_kernels(self) -> tuple[ModuleKernels, tuple[ModuleKernels, ...]]:
        """The kernels that `recommend_modules` computes by default, and those with each head."""
        kernels = {"outputs": self.task.outputs, **self.shared}
        return ModuleRequest(budget=1, kernels=kernels, resources=QUIET).compute_kernels(*self.inputs)

    def kernels_of(self, space: str) -> ModuleKernels:
        if space not in self.kernels:
            arguments = {"outputs": self.task.outputs, **self.shared, **SPACES[space]}
            self.kernels[space] = compute_ntk(*self.inputs, **arguments, resources=QUIET)
        return self.kernels[space]

    def by_default(self, exclude: Sequence[str] = DEFAULT_EXCLUDE) -> dict[str, tuple[str, ...]]:
        kernels, heads = self.default_kernels
        arguments = {"heads": heads, "seed": self.seed, "exclude": exclude}
        return {words: recommend(kernels, amount, **arguments).modules for words, amount in self.limits.items()}

    def by_search(self, space: str, criterion: str, optimizer: str) -> dict[str, tuple[str, ...]]:
        """The choice of the criterion alone, without the exclusions of the default."""
        kernels, how = self.kernels_of(space), {"training": Training(optimizer), "exclude": ()}
        return {words: recommend(kernels, of, criterion, **how).modules for words, of in self.limits.items()}

    def by_score(self, name: str, exclude: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
        order = sorted(self.task.modules, key=lambda module: -self.table[name][f"single {module}"])

        def within_budget(amount: int | float) -> tuple[str, ...]:
            budget = parse_budget(amount, self.sizes)
            excluded = excluded_candidates(self.sizes, budget, exclude)
            return fill([module for module in order if module not in excluded], budget, self.sizes)

        return {words: within_budget(amount) for words, amount in self.limits.items()}

    def by_rule(self, rule: str, draw: int = 0) -> dict[str, tuple[str, ...]]:
        try:
            return {w: baseline(rule, self.default_kernels[0], amount, seed=draw) for w, amount in self.limits.items()}
        except TargetError:  # a model without modules of that kind
            return {}


def _of_modules(criterion: str) -> bool:
    """Scores of baselines and of simulations: their sets are the best modules."""
    return criterion != DEFAULT and ("(" not in criterion or "(features" in criterion)


def as_configurations(task: SelectionTask, picks: Picks, known: Sequence[Configuration]) -> list[Configuration]:
    """The picks that are not among the known sets, each once; modules in model order."""
    listed = {configuration.modules for configuration in known}
    found = []
    for of in picks.values():
        for chosen in of.values():
            modules = tuple(name for name in task.modules if name in chosen)
            if modules and modules not in listed:
                listed.add(modules)
                found.append(Configuration(key_of(modules), modules))
    return found


def key_of(modules: Sequence[str]) -> str:
    return PICKED + hashlib.sha256(" ".join(modules).encode()).hexdigest()[:12]


def pick_regrets(of: Measured, picks: Picks, steps: int) -> dict[str, dict[str, float]]:
    """{selector: {budget: loss of its choice, minus the least loss within the budget}}, where it is trained."""
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
