# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Arms: rules that give every module a rank, at equal adapter parameters.

An arm is a function of an `ArmRequest` that returns {module name: rank}; `@register` makes it known to the queue.
Selectors that read gradients or activations register in the same way and use `request.batches`.

A module of shape (d_out, d_in) at rank r has r·(d_in + d_out) adapter parameters. Every arm spends between 98 and
100 % of `request.parameters`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from peft_linear.errors import PeftLinearError


FULL_RANK = 8  # budgets are fractions of all linear modules at this rank
SPENT = 0.98  # the least part of the budget that an arm spends


@dataclass(frozen=True)
class Candidate:
    """A linear module of the decoder."""

    name: str
    kind: str  # "q_proj", ..., "down_proj"
    layer: int
    cost: int  # adapter parameters a rank: d_in + d_out


@dataclass(frozen=True)
class ArmRequest:
    model: nn.Module
    parameters: int  # the budget
    batches: Callable[[], list] | None = None  # batches of the task's training data, for selectors that need them
    seed: int = 0  # of the run, for selectors that draw


Arm = Callable[[ArmRequest], dict[str, int]]
ARMS: dict[str, Arm] = {}


def register(name: str) -> Callable[[Arm], Arm]:
    def add(arm: Arm) -> Arm:
        ARMS[name] = arm
        return arm

    return add


def choose_ranks(name: str, request: ArmRequest) -> dict[str, int]:
    """The ranks of arm `name`; refuses an arm that does not spend the budget."""
    if name not in ARMS:
        raise PeftLinearError(f"no arm {name!r}; there are {sorted(ARMS)}")
    ranks = ARMS[name](request)
    spent = adapter_parameters(request.model, ranks)
    if not SPENT * request.parameters <= spent <= request.parameters:
        raise PeftLinearError(f"arm {name!r} spends {spent:,} adapter parameters of {request.parameters:,}")
    return ranks


def candidates(model: nn.Module) -> list[Candidate]:
    """The linear modules of the decoder's layers, in the model's order; no embeddings and no output head."""
    found = []
    for name, module in model.named_modules():
        place = re.search(r"\blayers\.(\d+)\.(?:.*\.)?(\w+)$", name)
        if place and isinstance(module, nn.Linear):
            cost = module.in_features + module.out_features
            found.append(Candidate(name, place.group(2), int(place.group(1)), cost))
    return found


def budget_parameters(model: nn.Module, budget: str) -> int:
    """The adapter parameters of a budget such as "1/8" of all linear modules at rank 8."""
    return int(Fraction(budget) * FULL_RANK * sum(candidate.cost for candidate in candidates(model)))


def adapter_parameters(model: nn.Module, ranks: dict[str, int]) -> int:
    costs = {candidate.name: candidate.cost for candidate in candidates(model)}
    return sum(rank * costs[name] for name, rank in ranks.items())


def evenly(items: Sequence, count: int) -> list:
    """`count` of the items, at equal distances, the first half a distance from the start."""
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def fit(chosen: Sequence[Candidate], parameters: int) -> dict[str, int]:
    """The highest rank that all chosen modules can have; what is left over gives evenly spaced ones one rank more.

    Where rank 1 is above the budget, evenly spaced layers have rank 1 and the others none.
    """
    cost = sum(candidate.cost for candidate in chosen)
    rank = parameters // cost
    if rank == 0:
        return spread_layers(chosen, parameters)
    return raise_evenly({candidate.name: rank for candidate in chosen}, chosen, parameters - rank * cost)


def spread_layers(chosen: Sequence[Candidate], parameters: int) -> dict[str, int]:
    """Rank 1 on as many evenly spaced layers as the budget has room for, and on modules of the others for the rest."""
    layers = sorted({candidate.layer for candidate in chosen})
    for count in range(len(layers), 0, -1):
        picked = set(evenly(layers, count))
        inside = [candidate for candidate in chosen if candidate.layer in picked]
        outside = [candidate for candidate in chosen if candidate.layer not in picked]
        spare = parameters - sum(candidate.cost for candidate in inside)
        if spare >= 0:
            return raise_evenly({candidate.name: 1 for candidate in inside}, outside, spare)
    raise PeftLinearError(f"{parameters:,} adapter parameters are below one layer at rank 1; take a larger budget")


def raise_evenly(ranks: dict[str, int], open_to: Sequence[Candidate], spare: int) -> dict[str, int]:
    """One rank more for as many evenly spaced modules of `open_to` as `spare` pays for, then for any that fit."""
    for count in range(len(open_to), 0, -1):
        picked = evenly(open_to, count)
        if sum(candidate.cost for candidate in picked) <= spare:
            break
    else:
        picked = []
    left = spare - sum(candidate.cost for candidate in picked)
    for candidate in open_to:
        if candidate.cost <= left and candidate not in picked:
            picked = [*picked, candidate]
            left -= candidate.cost
    return ranks | {candidate.name: ranks.get(candidate.name, 0) + 1 for candidate in picked}


def of_kinds(*kinds: str) -> Arm:
    def arm(request: ArmRequest) -> dict[str, int]:
        return fit([found for found in candidates(request.model) if found.kind in kinds], request.parameters)

    return arm


def of_third(third: int) -> Arm:
    """All linear modules of the first (0), middle (1) or last (2) third of the layers."""

    def arm(request: ArmRequest) -> dict[str, int]:
        found = candidates(request.model)
        layers = 1 + max(candidate.layer for candidate in found)
        return fit([one for one in found if 3 * one.layer // layers == third], request.parameters)

    return arm


def random_modules(draw: int) -> Arm:
    """Modules drawn at random, each at rank 8; the last ones at the rank that still fits."""

    def arm(request: ArmRequest) -> dict[str, int]:
        found = candidates(request.model)
        random.Random(draw).shuffle(found)
        return take_in_order(found, request.parameters)

    return arm


def take_in_order(ordered: Sequence[Candidate], parameters: int, rank: int = FULL_RANK) -> dict[str, int]:
    """The first modules at `rank`; once one does not fit, those after it at the highest rank that fits."""
    ranks: dict[str, int] = {}
    for candidate in ordered:
        fits = min(rank, parameters // candidate.cost)
        if fits:
            ranks[candidate.name] = fits
            parameters -= fits * candidate.cost
    return ranks


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
register("all_linear")(of_kinds(*ATTENTION, *MLP))
register("mlp")(of_kinds(*MLP))
register("qv")(of_kinds("q_proj", "v_proj"))
register("attention")(of_kinds(*ATTENTION))
register("down_proj")(of_kinds("down_proj"))
register("o_down")(of_kinds("o_proj", "down_proj"))
for _third, _name in enumerate(("first_layers", "middle_layers", "last_layers")):
    register(_name)(of_third(_third))
for _draw in range(3):
    register(f"random_{_draw}")(random_modules(_draw))
