# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Is the ranking of the candidates stable? Two halves of the examples are scored independently."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ..recommendation.values import Reliability
from .criteria import Criterion, View, score_modules


LEAST_EXAMPLES = 8
# Splits of the examples: for additive criteria of few rows (kernels of losses), of more, and for other criteria.
MANY_SPLITS, SPLITS, FEW_SPLITS = 50, 10, 3
FEW_ROWS = 256


def split_half_reliability(
    view: View,
    criterion: Criterion,
    splits: int | None = None,
    scores: Mapping[str, float] | None = None,
) -> Reliability | None:
    """Scores every candidate on both halves of `splits` random splits (by `problem.seed`) of the examples.

    By default 10 splits for additive criteria (50 for at most 256 rows) and 3 for others. Cost: 2·splits evaluations
    of the criterion a candidate, on n/2 rows each. None for kernels of fewer than 8 examples or 3 candidates,
    and for lazy kernels, which every split would read from disk.

    Args:
        scores: Of all examples, which the intervals of scores lie around; default: computed.
    """
    kernels, problem = view.kernels, view.problem
    count = kernels.num_examples
    if count < LEAST_EXAMPLES or len(kernels) < 3 or kernels.lazy:
        return None
    if splits is None:
        many = MANY_SPLITS if len(kernels.base) <= FEW_ROWS else SPLITS
        splits = many if criterion.additive else FEW_SPLITS
    generator = torch.Generator().manual_seed(problem.seed)
    correlations, ranks, utilities = [], [], []
    for _ in range(splits):
        order = problem.order[torch.randperm(count, generator=generator)]
        one, other = (
            _utilities(view, criterion, half) for half in (order[: count // 2], order[count // 2 : 2 * (count // 2)])
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
    scores = score_modules(view, criterion) if scores is None else scores
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
    factor = criterion.utility(2.0 if criterion.extensive else 1.0)  # a sum over half of the rows is half as large
    apart = factor * (utilities - utilities.mean(dim=0))
    low, high = torch.quantile(apart, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
    return {
        name: (scores[name] + a, scores[name] + b)
        for name, a, b in zip(names, low.tolist(), high.tolist(), strict=True)
    }


def _utilities(view: View, criterion: Criterion, examples: Tensor) -> Tensor:
    kernels, problem = view.kernels, view.problem
    labels = None if problem.labels is None else problem.labels[examples]
    key = None if problem.key is None else problem.key[examples]
    half = replace(problem, outputs=problem.outputs[examples], labels=labels, key=key)
    scores = score_modules(View(kernels.select_examples(examples), half), criterion)
    return torch.tensor([criterion.utility(scores[name]) for name in kernels.names], dtype=torch.float64)


def _ranks(utilities: Tensor) -> Tensor:
    return utilities.argsort(descending=True, stable=True).argsort() + 1
