# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""From runs to numbers: the least KL at which an arm keeps a share of LoRA's gain, paired ratios, predictors.

Gain is the reduction of the test loss; its share is that of plain LoRA's in the same cell (model, task, seed). An arm
is a ladder of strengths, LoRA its strength 0. Between two neighbours log KL is linear in the share.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from .plan import LORA


KINDS = ("descriptions", "code", "far")
SHARES = (0.75, 0.9, 0.97)
NO_LADDER = (LORA, "kl_budget")  # a strength of these is no weaker form of LoRA


class Cell(NamedTuple):
    """What runs are compared in."""

    model: str
    task: str
    seed: int


class Point(NamedTuple):
    """A trained model, perhaps with its adapter scaled down."""

    share: float  # of LoRA's gain
    kl: float


Ladder = Sequence[Sequence[Point]]  # by strength, LoRA first; of each, by scale, 1 first


def cells_of(records: Iterable[Mapping]) -> dict[Cell, list[Mapping]]:
    """The runs of every cell in which plain LoRA was trained."""
    found: dict[Cell, list[Mapping]] = defaultdict(list)
    for record in records:
        found[Cell(record["model"], record["task"], record["seed"])].append(record)
    return {cell: runs for cell, runs in found.items() if any(run["arm"] == LORA for run in runs)}


def ladders(runs: Sequence[Mapping], kind: str) -> dict[str, Ladder]:
    """{arm: its points} of one cell."""
    lora = next(run for run in runs if run["arm"] == LORA)
    start = lora["start_test_loss"]
    gain = start - lora["scales"]["1"]["test_loss"]

    def points(run: Mapping) -> list[Point]:
        scales = sorted(run["scales"].items(), key=lambda item: -float(item[0]))
        values = [(each["test_loss"], each[f"kl_{kind}"]) for _, each in scales]
        return [Point((start - loss) / gain, kl) for loss, kl in values if loss is not None and kl is not None]

    arms: dict[str, list[Mapping]] = defaultdict(list)
    for run in runs:
        arms[run["arm"]].append(run)
    first = points(lora)
    found: dict[str, Ladder] = {}
    for arm, members in arms.items():
        ordered = [points(run) for run in sorted(members, key=lambda run: run["strength"])]
        if arm in FALLING:
            ordered.reverse()
        found[arm] = ordered if arm in NO_LADDER else [first, *ordered]
    return found


FALLING = ("lower_rate", "early_stopping", "corda", "lora_null", "stm")  # a larger strength is nearer to LoRA


def least_kl(ladder: Ladder, share: float, scaled: bool) -> float | None:
    """The least KL with at least this share of the gain; None where no point keeps it.

    `scaled`: also with the adapter scaled down after training.
    """
    points = [run[0] for run in ladder if run]
    segments = list(pairwise(points))
    if scaled:
        points = [point for run in ladder for point in run]
        segments += [segment for run in ladder for segment in pairwise(run)]
    reached = [point.kl for point in points if point.share >= share]
    for one, other in segments:
        if min(one.share, other.share) < share <= max(one.share, other.share) and min(one.kl, other.kl) > 0:
            place = (share - one.share) / (other.share - one.share)
            reached.append(math.exp((1 - place) * math.log(one.kl) + place * math.log(other.kl)))
    return min(reached, default=None)


def reaches_below(ladder: Ladder, share: float, scaled: bool) -> bool:
    """Whether some point keeps less than this share: else the least KL is only an upper bound."""
    runs = [run if scaled else run[:1] for run in ladder]
    return any(point.share < share for run in runs for point in run)


def log_ratios(
    cells: Mapping[Cell, Sequence[Mapping]], ours: str, theirs: str, kind: str, share: float, scaled: bool = False
) -> dict[Cell, float]:
    """log(KL of ours / KL of theirs) at a share of the gain, in every cell in which both reach it.

    A cell in which no strength of theirs keeps less does not count: a stronger one would forget less. Where this is so
    of ours, the ratio is an upper bound.
    """
    found = {}
    for cell, runs in cells.items():
        arms = ladders(runs, kind)
        if ours not in arms or theirs not in arms:
            continue
        scaling = scaled or theirs == LORA
        values = least_kl(arms[ours], share, scaled), least_kl(arms[theirs], share, scaling)
        if not reaches_below(arms[theirs], share, scaling):
            continue
        if values[0] and values[1]:
            found[cell] = math.log(values[0] / values[1])
    return found


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean; None of fewer than three values."""
    if len(values) < 3:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def explained(records: Iterable[Mapping], predictor: str, kind: str) -> float | None:
    """R² of log KL on retained text by the logarithm of a quantity, within cells (one slope, an intercept a cell)."""
    groups: dict[Cell, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        full = record["scales"]["1"]
        value = full.get(predictor, record.get(predictor))
        if value and full[f"kl_{kind}"]:
            cell = Cell(record["model"], record["task"], record["seed"])
            groups[cell].append((math.log(value), math.log(full[f"kl_{kind}"])))
    rows = []
    for pairs in groups.values():
        if len(pairs) > 2:
            means = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
            rows += [(x - means[0], y - means[1]) for x, y in pairs]
    if len(rows) < 5:
        return None
    xx, yy, xy = sum(x * x for x, _ in rows), sum(y * y for _, y in rows), sum(x * y for x, y in rows)
    return xy * xy / (xx * yy) if xx and yy else None
