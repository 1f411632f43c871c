# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Does the data say anything about the order of the candidates? Two halves of the examples answer independently."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ..kernels.module_kernels import ModuleKernels
from .criteria import Criterion, score_modules
from .problem import Problem


LEAST_EXAMPLES = 8
# Splits of the examples: for additive criteria of few rows (kernels of losses), of more, and for other criteria.
MANY_SPLITS, SPLITS, FEW_SPLITS = 50, 10, 3
FEW_ROWS = 256
ONE_SIDED = 1.645  # standard deviations of a normal distribution that 5 % lie above


@dataclass(frozen=True)
class Reliability:
    """How far the order of the candidates is that of the data's, and not of the sample's.

    Args:
        halves: Mean Spearman correlation between the candidates' scores in two disjoint halves of the examples.
        splits: Number of random splits that it is the mean of.
        rank_intervals: {module: (low, high)}, between which 90 % of its ranks in single halves lie; 1 is the best.
        score_intervals: {module: (low, high)}, of its score: the score of all examples, and around it 90 % of how far
            scores of single halves lie from their mean. The mean over half of the examples, drawn without replacement,
            varies around that over all as the latter does around the mean of their distribution (half-sampling,
            McCarthy 1969): it is the interval that a bootstrap gives, without repeated examples, which would make
            leave-one-out errors vanish.
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
        """Whether the order can be told from a random one."""
        return self.halves > self.threshold

    def to_dict(self) -> dict[str, object]:
        """For settings; intervals of scores stand with the scores (`ModuleScore.interval`)."""
        return {
            "halves": self.halves,
            "full": self.full,
            "threshold": self.threshold,
            "signal": self.signal,
            "splits": self.splits,
            "rank_intervals": {name: list(interval) for name, interval in self.rank_intervals.items()},
        }


def split_half_reliability(
    kernels: ModuleKernels,
    criterion: Criterion,
    problem: Problem,
    splits: int | None = None,
    scores: Mapping[str, float] | None = None,
) -> Reliability | None:
    """Scores every candidate on both halves of `splits` random splits (by `problem.seed`) of the examples.

    By default 10 splits for additive criteria (50 for at most 256 rows) and 3 for others. Cost: 2·splits evaluations
    of the criterion a candidate, on n/2 rows each. None for kernels of fewer than 8 examples or 3 candidates, where
    halves say nothing, and for lazy kernels, which would be read from their files as often.

    Args:
        scores: Of all examples, which the intervals of scores lie around; default: computed.
    """
    count = kernels.num_examples
    if count < LEAST_EXAMPLES or len(kernels) < 3 or kernels.lazy:
        return None
    if splits is None:
        many = MANY_SPLITS if len(kernels.base) <= FEW_ROWS else SPLITS
        splits = many if criterion.additive else FEW_SPLITS
    generator = torch.Generator().manual_seed(problem.seed)
    correlations, ranks, utilities = [], [], []
    for _ in range(splits):
        order = torch.randperm(count, generator=generator)
        one, other = (
            _utilities(kernels, criterion, problem, half)
            for half in (order[: count // 2], order[count // 2 : 2 * (count // 2)])
        )
        constant = one.min() == one.max() or other.min() == other.max()
        correlations.append(0.0 if constant else float(spearmanr(one, other).statistic))
        ranks += [_ranks(one), _ranks(other)]
        utilities += [one, other]
    spread = torch.stack(ranks).double()
    low, high = torch.quantile(spread, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
    intervals = {
        name: (math.floor(a), math.ceil(b))
        for name, a, b in zip(kernels.names, low.tolist(), high.tolist(), strict=True)
    }
    scores = score_modules(kernels, criterion, problem) if scores is None else scores
    return Reliability(
        sum(correlations) / splits,
        splits,
        intervals,
        _around(scores, torch.stack(utilities), kernels.names, criterion),
    )


def _around(
    scores: Mapping[str, float], utilities: Tensor, names: Sequence[str], criterion: Criterion
) -> dict[str, tuple[float, float]]:
    """{module: 90 % interval of its score}, from its utilities in the halves (halves, M)."""
    factor = criterion.utility(2.0 if criterion.extensive else 1.0)  # half the rows have half of a sum over rows
    apart = factor * (utilities - utilities.mean(dim=0))
    low, high = torch.quantile(apart, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
    return {
        name: (scores[name] + a, scores[name] + b)
        for name, a, b in zip(names, low.tolist(), high.tolist(), strict=True)
    }


def _utilities(kernels: ModuleKernels, criterion: Criterion, problem: Problem, examples: Tensor) -> Tensor:
    labels = None if problem.labels is None else problem.labels[examples]
    half = replace(problem, outputs=problem.outputs[examples], labels=labels)
    scores = score_modules(kernels.select_examples(examples), criterion, half)
    return torch.tensor([criterion.utility(scores[name]) for name in kernels.names], dtype=torch.float64)


def _ranks(utilities: Tensor) -> Tensor:
    return utilities.argsort(descending=True, stable=True).argsort() + 1
