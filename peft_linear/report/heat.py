# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The scores of all candidates by layer and type, with sums, small enough for a screen; for texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..recommendation.data import RecommendationData
from ..recommendation.names import parse_name, type_labels
from .formatting import alike, improvements


MOST_LISTED = 40  # candidates; fewer are a list
_MOST_TYPES, _MOST_ROWS = 12, 32
_SHADES = "·░▒▓█"  # of the score's place among all: the worst fifth, …, the best


@dataclass(frozen=True)
class HeatMap:
    """A stack of layers as a table of texts.

    Args:
        stack: What the names of its modules begin with.
        header: "layer", the types, "sum".
        rows: A row a layer, or a block of layers where there are many: shade, score, and the rank of what is chosen.
        sums: The last row: scores summed by type.
    """

    stack: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sums: tuple[str, ...]


def heat_maps(recommendation: RecommendationData) -> tuple[HeatMap, ...]:
    """A table for each stack; none where there are few candidates, no layers, or too many types for a screen."""
    rec = recommendation
    stacks: dict[str, list[str]] = defaultdict(list)
    for name in rec.candidates:
        parsed = parse_name(name)
        if parsed.layer is not None:
            stacks[parsed.stack].append(name)
    types = [len({parse_name(name).kind for name in names}) for names in stacks.values()]
    if len(rec.scores) <= MOST_LISTED or not stacks or max(types) > _MOST_TYPES:
        return ()
    return tuple(_heat_map(rec, stack, names) for stack, names in stacks.items())


def outside_of_layers(recommendation: RecommendationData) -> tuple[str, ...]:
    """The candidates that are in no numbered layer."""
    return tuple(name for name in recommendation.candidates if parse_name(name).layer is None)


def legend(recommendation: RecommendationData) -> str:
    """What a cell says."""
    _, what = improvements(recommendation)
    return (
        f"{_SHADES[0]}{_SHADES[-1]}: worst to best fifth of the scores. Number: {what}, of each module alone. "
        "r: the rank of a chosen module."
    )


def _heat_map(rec: RecommendationData, stack: str, names: Sequence[str]) -> HeatMap:
    gains, _ = improvements(rec)
    ranks = rec.ranks
    place = {row.name: (len(rec.scores) - row.rank) / max(len(rec.scores) - 1, 1) for row in rec.scores}
    parsed = {name: parse_name(name) for name in names}
    labels = type_labels(names)
    kinds = list(dict.fromkeys(each.kind for each in parsed.values()))
    layers = sorted({each.layer for each in parsed.values() if each.layer is not None})
    size = -(-len(layers) // _MOST_ROWS)
    blocks = [layers[start : start + size] for start in range(0, len(layers), size)]
    cells: dict[tuple[int, str], list[str]] = defaultdict(list)
    for name, each in parsed.items():
        row = next(index for index, block in enumerate(blocks) if each.layer in block)
        cells[row, each.kind].append(name)
    means = {key: sum(gains[name] for name in members) / len(members) for key, members in cells.items()}
    by_layer = [sum(gains[name] for name in names if parsed[name].layer in block) for block in blocks]
    by_type = [sum(gains[name] for name in names if parsed[name].kind == kind) for kind in kinds]
    numbers, of_layers, of_types = alike(means.values()), alike(by_layer), alike([*by_type, sum(by_type)])

    def text(key: tuple[int, str]) -> str:
        if key not in cells:
            return ""
        members = cells[key]
        part = sum(place[name] for name in members) / len(members)
        shade = _SHADES[min(int(part * len(_SHADES)), len(_SHADES) - 1)]
        return f"{shade} {numbers[means[key]]}{_ranks(ranks, members)}"

    rows = tuple(
        (_span(block), *(text((index, kind)) for kind in kinds), of_layers[by_layer[index]])
        for index, block in enumerate(blocks)
    )
    header = ("layer", *(labels[stack, kind] for kind in kinds), "sum")
    return HeatMap(stack, header, rows, ("sum", *(of_types[value] for value in by_type), of_types[sum(by_type)]))


def _ranks(ranks: Mapping[str, int], members: Sequence[str]) -> str:
    """` r8`; of a block of layers also how many of them are chosen."""
    found = [ranks[name] for name in members if name in ranks]
    if not found:
        return ""
    part = "" if len(found) == len(members) else f" {len(found)}/{len(members)}"
    low, high = min(found), max(found)
    return f" r{low}{part}" if low == high else f" r{low}–{high}{part}"


def _span(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
