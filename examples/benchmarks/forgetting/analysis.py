# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the runs of the forgetting benchmark say: forgetting at matched target loss, paired by seed, and a verdict.

*Gain* is the fall of the target loss as a part of what plain LoRA reaches in the same seed: 0 is the base model, 1 is
LoRA. An arm's runs of a seed are points (gain, forgotten) of a path; between them the path is interpolated, linearly
in the root of what is forgotten, since near the base model forgetting grows with the square of what is learnt. Where
a path crosses a level of gain more than once, the crossing that forgets least counts, for every arm alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, stdev

from scipy.stats import t as student

from examples.benchmarks.forgetting.training import BASE, LORA, Arm, Measure, Run


LEVELS = (0.5, 0.75, 0.9)
PRIMARY = 0.75
CONFIDENCE = 0.95
LESS, MORE, UNDECIDED = "less", "more", "undecided"

Point = tuple[float, float]  # gain, forgotten


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with Student's interval; nothing is decided by a single seed."""

    mean: float
    low: float
    high: float
    per_seed: Mapping[int, float]

    @classmethod
    def of(cls, per_seed: Mapping[int, float]) -> Interval:
        values = list(per_seed.values())
        mean = fmean(values)
        if len(values) < 2:
            return cls(mean, -math.inf, math.inf, dict(per_seed))
        half = float(student.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half, dict(per_seed))

    @property
    def sign(self) -> str:
        return LESS if self.high < 0 else MORE if self.low > 0 else UNDECIDED


def root(value: float) -> float:
    """The square root with the sign kept."""
    return math.copysign(math.sqrt(abs(value)), value)


def forgotten_at(path: Sequence[Point], level: float) -> float | None:
    """What a path forgets where it crosses a gain; None where it does not."""
    found = []
    for (gain_0, forgotten_0), (gain_1, forgotten_1) in pairwise(path):
        if min(gain_0, gain_1) <= level <= max(gain_0, gain_1):
            part = 0.0 if gain_0 == gain_1 else (level - gain_0) / (gain_1 - gain_0)
            between = root(forgotten_0) + part * (root(forgotten_1) - root(forgotten_0))
            found.append(math.copysign(between**2, between))
    return min(found, default=None)


class Table:
    """The runs of one setting by arm, value and seed."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = {(run.arm, run.value, run.seed): run for run in runs}
        self.seeds = sorted({run.seed for run in runs})

    def forgotten(self, run: Run, measure: Measure) -> float:
        base = self.runs[BASE, 0.0, run.seed]
        return measure.sign * (run.metrics[measure.key] - base.metrics[measure.key])

    def gain(self, run: Run) -> float:
        """NaN in a seed in which LoRA itself learns nothing."""
        base = self.runs[BASE, 0.0, run.seed].metrics["target_loss"]
        whole = base - self.runs[LORA, 1.0, run.seed].metrics["target_loss"]
        return (base - run.metrics["target_loss"]) / whole if whole > 0 else math.nan

    def points(self, arm: Arm, seed: int, setting: str) -> list[Run]:
        """The runs of a path in order, with its start."""
        start = arm.start or (LORA, 1.0)
        return [self.runs[(*start, seed)], *(self.runs[arm.key, value, seed] for value in arm.grid[setting])]

    def path(self, arm: Arm, seed: int, setting: str, measure: Measure) -> list[Point]:
        runs = self.points(arm, seed, setting)
        path = [(self.gain(run), self.forgotten(run, measure)) for run in runs]
        return [*path, (0.0, 0.0)] if arm.ends_at_base else path


def analyse(runs: Sequence[Run], arms: Sequence[Arm], measures: Sequence[Measure]) -> dict:
    """Everything the report shows, as JSON takes it. The first measure decides."""
    table, setting = Table(runs), runs[0].setting
    matched = {
        measure.key: {arm.key: matched_levels(table, arm, setting, measure) for arm in arms} for measure in measures
    }
    differences = {
        measure.key: {
            arm.key: {
                other.key: compare(
                    matched[measure.key][arm.key], matched[measure.key][other.key], enough(len(table.seeds))
                )
                for other in arms
                if other is not arm
            }
            for arm in arms
            if arm.ours
        }
        for measure in measures
    }
    return {
        "levels": list(LEVELS),
        "primary_level": PRIMARY,
        "primary_measure": measures[0].key,
        "arms": {arm.key: {"words": arm.words, "ours": arm.ours} for arm in arms},
        "reference": {key: mean_metrics(table, key, value) for key, value in ((BASE, 0.0), (LORA, 1.0))},
        "curves": {arm.key: curve(table, arm, setting, measures) for arm in arms},
        "matched": {
            measure: {arm: {str(level): as_record(found) for level, found in of.items()} for arm, of in by_arm.items()}
            for measure, by_arm in matched.items()
        },
        "differences": {
            measure: {
                arm: {
                    other: {str(level): as_record(found) for level, found in of.items()}
                    for other, of in by_other.items()
                }
                for arm, by_other in by_arm.items()
            }
            for measure, by_arm in differences.items()
        },
        "training_seconds": round(sum(run.seconds for run in runs), 1),
        "seeds": len(table.seeds),
        "runs": sum(run.seconds > 0 for run in runs),
    }


def enough(seeds: int) -> int:
    """Of how many seeds a level needs to be reached: of all but one, since selective rules differ much by seed."""
    return max(1, seeds - 1) if seeds > 2 else seeds


def matched_levels(table: Table, arm: Arm, setting: str, measure: Measure) -> dict[float, Interval | None]:
    """What the arm forgets at each level; None where its path does not reach it in enough seeds."""
    result: dict[float, Interval | None] = {}
    for level in LEVELS:
        found = {seed: forgotten_at(table.path(arm, seed, setting, measure), level) for seed in table.seeds}
        known = {seed: value for seed, value in found.items() if value is not None}
        result[level] = Interval.of(known) if len(known) >= enough(len(table.seeds)) else None
    return result


def compare(
    mine: Mapping[float, Interval | None], theirs: Mapping[float, Interval | None], needed: int
) -> dict[float, Interval | None]:
    """Mine less theirs, seed by seed: negative where mine forgets less."""
    result: dict[float, Interval | None] = {}
    for level, found in mine.items():
        other = theirs[level]
        common = [seed for seed in found.per_seed if seed in other.per_seed] if found and other else []
        enough_common = found is not None and other is not None and len(common) >= needed
        result[level] = (
            Interval.of({seed: found.per_seed[seed] - other.per_seed[seed] for seed in common})
            if enough_common
            else None
        )
    return result


def as_record(interval: Interval | None) -> dict | None:
    """JSON has no infinities: the bounds of a single seed are null."""
    if interval is None:
        return None
    record = {
        key: value if not isinstance(value, float) else round(value, 7) for key, value in asdict(interval).items()
    }
    record["per_seed"] = {str(seed): round(value, 7) for seed, value in interval.per_seed.items()}
    record |= {key: None for key in ("low", "high") if math.isinf(record[key])}
    return {**record, "sign": interval.sign}


def mean_metrics(table: Table, arm: str, value: float) -> dict[str, float]:
    runs = [table.runs[arm, value, seed] for seed in table.seeds]
    return {key: round(fmean(run.metrics[key] for run in runs), 6) for key in runs[0].metrics}


def curve(table: Table, arm: Arm, setting: str, measures: Sequence[Measure]) -> list[dict]:
    """The path in means over seeds, from its start."""
    rows = []
    for runs in zip(*(table.points(arm, seed, setting) for seed in table.seeds), strict=True):
        rates = [run.firing_rate for run in runs if run.firing_rate is not None]
        gains = [table.gain(run) for run in runs]
        rows.append(
            {
                "arm": runs[0].arm,
                "value": runs[0].value,
                "target_loss": round(fmean(run.metrics["target_loss"] for run in runs), 6),
                "gain": None if any(map(math.isnan, gains)) else round(fmean(gains), 5),
                "forgotten": {
                    measure.key: round(fmean(table.forgotten(run, measure) for run in runs), 6) for measure in measures
                },
                "distance": round(fmean(run.distance for run in runs), 4),
                "firing_rate": round(fmean(rates), 4) if rates else None,
            }
        )
    return rows
