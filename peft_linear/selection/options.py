# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Options: sets of modules that a rule names, each at the ranks that the budget has room for.

An option spreads over all layers and has one rank, the highest for which the budget has room, so that every tool can
take it. Where even the lowest is above the budget it is on evenly spaced layers or, where time or memory is limited,
on the last ones: a backward pass ends at the lowest adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import BudgetError
from ..recommendation.names import parse_name


ALL_LINEAR = "all linear"
LARGEST = "largest first-order decrease"
Allows = Callable[[Mapping[str, int]], bool]


@dataclass(frozen=True)
class Option:
    """Modules and ranks that are weighed as a whole."""

    label: str
    ranks: Mapping[str, int]


def make_options(
    names: Sequence[str],
    allows: Allows,
    ranks: Sequence[int],
    gains: Mapping[str, float],
    upper: bool = False,
) -> tuple[Option, ...]:
    """All linear modules first, then MLP, attention, the last module of both; no set twice.

    Args:
        names: Of the candidates, in model order.
        allows: Whether a budget has room for {module: rank}.
        ranks: That a module may have.
        gains: {module: first-order decrease}; where the budget has no room for all linear modules of one layer, the
            modules with the largest are the first option.
        upper: Take the last layers where there is no room for all; default: evenly spaced ones.

    Raises:
        BudgetError: the budget has no room for one module at the smallest rank.
    """
    found: dict[frozenset, Option] = {}
    for label, members in _groups(names):
        if members and (chosen := _fit(members, allows, sorted(ranks), upper)):
            found.setdefault(frozenset(chosen.items()), Option(label, chosen))
    options = tuple(found.values())
    if options and options[0].label == ALL_LINEAR:
        return options
    taken: dict[str, int] = {}
    for name in sorted(names, key=lambda name: -gains[name]):
        if allows(more := {**taken, name: min(ranks)}):
            taken = more
    if not taken:
        raise BudgetError(
            f"the budget has no room for one module at rank {min(ranks)}; raise the budget or allow lower ranks"
        )
    best = Option(LARGEST, {name: taken[name] for name in names if name in taken})
    return (best, *(option for option in options if option.ranks != best.ranks))


def _groups(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    parsed = {name: parse_name(name) for name in names}
    attention = [name for name in names if parsed[name].is_attention]
    mlp = [name for name in names if parsed[name].is_mlp]
    last: dict[tuple[str, int | None, bool], str] = {}
    for name in names:
        place = parsed[name]
        if place.layer is not None:
            last[place.stack, place.layer, place.is_attention] = name
    writers = set(last.values())
    return [
        (ALL_LINEAR, list(names)),
        ("MLP", mlp),
        ("attention", attention),
        ("last of attention and MLP", [name for name in names if name in writers]),
    ]


def _fit(members: Sequence[str], allows: Allows, ranks: Sequence[int], upper: bool) -> dict[str, int]:
    """The ranks of an option; empty where the budget has no room for one of its layers."""
    for rank in reversed(ranks):
        if allows(chosen := dict.fromkeys(members, rank)):
            return chosen
    return _some_layers(members, allows, ranks[0], upper)


def _some_layers(members: Sequence[str], allows: Allows, rank: int, upper: bool) -> dict[str, int]:
    """The members of as many layers as there is room for, at equal distances or the last ones."""
    layers: dict[tuple[str, int | None], list[str]] = {}
    for name in members:
        place = parse_name(name)
        layers.setdefault((place.stack, place.layer), []).append(name)
    blocks = list(layers.values())
    for count in range(len(blocks) - 1, 0, -1):
        spread = [blocks[(2 * i + 1) * len(blocks) // (2 * count)] for i in range(count)]
        picked = blocks[-count:] if upper else spread
        chosen = {name: rank for block in picked for name in block}
        if allows(chosen):
            return chosen
    return {}
