# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The sets of modules that the selection benchmark trains: alone, by layer, by type, by rules of thumb, at random."""

from __future__ import annotations

import random
from dataclasses import dataclass

from examples.benchmarks.selection.tasks import SelectionTask
from peft_linear.recommendation.names import parse_name


HEAD_ONLY, ALL_LINEAR = "head only", "all linear"
PICKED = "pick "
SIZES = (2, 4, 8)  # modules of a random subset
FRACTIONS = (0.10, 0.25)  # of all-linear's parameters


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
        """Whether it is the choice of a selector, which belongs to no random sample of sets."""
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
    listed = {configuration.modules for configuration in found}
    for key, chosen in sets.items():
        modules = tuple(name for name in names if name in chosen)
        if modules not in listed and (modules or (key == HEAD_ONLY and task.head)):
            listed.add(modules)
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
