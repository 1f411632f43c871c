# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The plain values of a recommendation: a candidate's score, how stable the ranking is, how the decision was made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

from ..schema import Place, read_as


ONE_SIDED = 1.645  # standard deviations of a normal distribution that 5 % lie above


@dataclass(frozen=True)
class ModuleScore:
    """One candidate: its own score, and why it was chosen or not."""

    name: str
    score: float  # of this module alone (with the always-trained parameters), by the recommendation's criterion
    rank: int  # 1 is the best score
    parameters: int  # of its adapter
    chosen: bool
    reason: str
    condition_number: float | None  # (λ1 + ridge)/(λn + ridge) of its kernel; None where no kernel was computed
    interval: tuple[float, float] | None = None  # 90 % of the score over samples of examples

    def __post_init__(self) -> None:
        if self.interval is not None:
            object.__setattr__(self, "interval", (float(self.interval[0]), float(self.interval[1])))


@dataclass(frozen=True)
class OptionScore:
    """A set of modules with ranks that was weighed as a whole.

    Args:
        label: In words.
        ranks: {module: rank}.
        parameters: Of its adapters.
        decrease: Nats a label token that one Adam step of the best size takes off the loss of held-out examples.
        interval: 90 % of it over resamples of these examples.
        difference, difference_interval: To the first option, all linear modules at the rank that fits, on the same
            resamples.
        best_share: In how many of the resamples no other option is better.
        step_size: The best size, a learning rate of one step.
        chosen: Whether it is the recommendation.
    """

    label: str
    ranks: Mapping[str, int]
    parameters: int
    decrease: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    best_share: float
    step_size: float
    chosen: bool = False

    def __post_init__(self) -> None:
        for name in ("interval", "difference_interval"):
            low, high = getattr(self, name)
            object.__setattr__(self, name, (float(low), float(high)))


@dataclass(frozen=True)
class Reliability:
    """Whether the ranking of the candidates is stable when the examples are resampled.

    Args:
        halves: Mean Spearman correlation between the candidates' scores in two disjoint halves of the examples.
        splits: Number of random splits that it is the mean of.
        rank_intervals: {module: (low, high)}, between which 90 % of its ranks in single halves lie; 1 is the best.
        score_intervals: {module: (low, high)}, of its score: the score of all examples, and around it 90 % of how far
            scores of single halves lie from their mean. A mean over half of the examples, sampled without
            replacement, deviates from the full mean about as much as the full mean deviates from the population mean
            (half-sampling, McCarthy 1969). A bootstrap gives the same interval, but repeats examples, which makes
            leave-one-out errors vanish. Files have them with the scores (`ModuleScore.interval`).
    """

    halves: float
    splits: int
    rank_intervals: Mapping[str, tuple[int, int]]
    score_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def full(self) -> float:
        """The correlation to be expected between two samples as large as all examples (Spearman–Brown's formula)."""
        return 2 * self.halves / (1 + self.halves) if self.halves > -1 else -1.0

    @property
    def threshold(self) -> float:
        """What `halves` exceeds with a probability of 5 % at most where orders are random: 1.645/sqrt(M − 1).

        The standard deviation of Spearman's coefficient of M independent values is 1/sqrt(M − 1). The mean over splits
        of one sample varies less than a single split does, so the test errs towards "no signal".
        """
        return ONE_SIDED / math.sqrt(max(1, len(self.rank_intervals) - 1))

    @property
    def signal(self) -> bool:
        """Whether the ranking can be told from a random one."""
        return self.halves > self.threshold

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with what follows from the fields."""
        return {
            "halves": self.halves,
            "full": self.full,
            "threshold": self.threshold,
            "signal": self.signal,
            "splits": self.splits,
            "rank_intervals": {name: list(interval) for name, interval in self.rank_intervals.items()},
        }

    @classmethod
    def from_json(cls, value: Any, place: Place) -> Reliability:
        """The inverse of `to_dict`; what follows from the fields is computed anew.

        Raises:
            FileError: a value is missing or of another type.
        """
        known = _ReliabilityRecord.__annotations__
        stored = {key: entry for key, entry in value.items() if key in known} if isinstance(value, dict) else value
        found = read_as(_ReliabilityRecord, stored, place)
        return cls(found["halves"], found["splits"], found["rank_intervals"])


class _ReliabilityRecord(TypedDict):
    halves: float
    splits: int
    rank_intervals: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Settings:
    """How a decision was made. None and empty where it is not known.

    Args:
        asked_for: The criterion as it was passed, before "default-by-evidence" was resolved.
        criterion_label, formula, higher_is_better: How to read the scores.
        criterion_ridge: λ for the kernels that the criterion was evaluated on.
        start_score: Score of the always-trained parameters alone.
        set_score: Score of the choice.
        strategy: Of the search; evaluations: kernels that it scored.
        candidates: Names of all candidates, in model order.
        excluded: Candidates that were scored, but not chosen because of `exclude`.
        budget_modules, budget_parameters: The budget as a number, where it is one of these.
        time_share, memory_share: Of a training step of the choice, relative to an all-linear LoRA step at `rank`.
        seed: Of the cross-validation folds and the random halves.
        optimizer, train_batch_size, learning_rate, steps: Of the planned training; the batch size with "adamw" only.
        examples, outputs, output_kind: Of the kernels: N, C and the kind of output.
        space, rank, lora_alpha: Of the adapter that the kernels are of.
        always_trained: Whether parameters are trained beside the adapters (a task head).
        heads: Training steps of the task head and draws of A, of all kernels that scores were computed over.
        reliability: None for fewer than 8 examples or 3 candidates.
        kernels: Provenance of the kernels.
        effective_dimension: {chosen module: d_m}, from which adaptive ranks are distributed.
        shapes: {candidate: (d_in, d_out)}.
    """

    asked_for: str | None = None
    criterion_label: str | None = None
    formula: str | None = None
    higher_is_better: bool = True
    criterion_ridge: float | None = None
    start_score: float | None = None
    set_score: float | None = None
    strategy: str | None = None
    evaluations: int | None = None
    candidates: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    budget_modules: int | None = None
    budget_parameters: int | None = None
    time_share: float | None = None
    memory_share: float | None = None
    seed: int | None = None
    optimizer: str | None = None
    train_batch_size: int | None = None
    learning_rate: float | None = None
    steps: int | None = None
    examples: int | None = None
    outputs: int | None = None
    output_kind: str | None = None
    space: str | None = None
    rank: int = 8
    lora_alpha: float = 16.0
    always_trained: bool = False
    heads: tuple[Mapping[str, int | None], ...] = ()
    reliability: Reliability | None = None
    kernels: Mapping[str, Any] = field(default_factory=dict)
    effective_dimension: Mapping[str, float] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("candidates", "excluded", "heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "shapes", {name: (shape[0], shape[1]) for name, shape in self.shapes.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "reliability"}
        values["reliability"] = None if self.reliability is None else self.reliability.to_dict()
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], place: Place) -> Settings:
        """The inverse of `to_dict`; also reads what earlier versions wrote, under the names of today.

        Raises:
            FileError: a value is of another type.
        """
        known = {f.name for f in fields(cls)}
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
        values = {name: value for name, value in values.items() if name in known and value is not None}
        reliability = values.pop("reliability", None)
        settings: Settings = read_as(cls, values, place)
        if reliability is None:
            return settings
        return replace(settings, reliability=Reliability.from_json(reliability, place.at("reliability")))


_RENAMED = {"avoided": "excluded"}
