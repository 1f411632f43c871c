# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Spearman's rank correlation over modules, averaged over seeds, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata


RESAMPLES = 2000


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its 95 % bootstrap interval (percentiles, modules drawn with replacement)."""

    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlation of the ranks along the last axis, ties at their mean rank; 0 where one side is constant."""
    a, b = (rankdata(values, axis=-1) for values in (first, second))
    a, b = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), norm, out=np.zeros_like(norm), where=norm > 0)


def correlate(scores: Sequence[Sequence[float]], truth: Sequence[Sequence[float]], seed: int = 0) -> Correlation:
    """Correlation of two tables (seeds x modules), row by row. Modules are resampled together in all seeds."""
    scores_table, truth_table = np.asarray(scores, dtype=float), np.asarray(truth, dtype=float)
    per_seed = spearman(scores_table, truth_table)
    columns = np.random.default_rng(seed).integers(0, scores_table.shape[1], (RESAMPLES, scores_table.shape[1]))
    means = np.mean([spearman(a[columns], b[columns]) for a, b in zip(scores_table, truth_table, strict=True)], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return Correlation(float(per_seed.mean()), float(low), float(high), tuple(float(value) for value in per_seed))
