# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the ranking of the candidates is stable under resampling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from peft_linear.recommendation.values import Reliability
from peft_linear.selection import recommend
from peft_linear.selection.criteria import CRITERIA, View
from peft_linear.selection.problem import Problem
from peft_linear.selection.reliability import split_half_reliability
from tests.helpers.planted import BERT_NAMES, planted_kernels


def reliability(kernels, criterion="gradient_energy", **settings):
    return split_half_reliability(View(kernels, Problem.of(kernels, 1.0, **settings)), CRITERIA[criterion])


def noise(seed, examples=32, names=BERT_NAMES):
    return planted_kernels(names=names, examples=examples, informative=(), seed=seed)


def test_a_planted_signal_is_told_from_chance():
    kernels = planted_kernels(names=BERT_NAMES[:12], examples=48, informative=(1, 3, 4, 7, 9))
    found = reliability(kernels)
    assert found.signal and found.halves > 0.4 and found.full > found.halves
    for number, name in enumerate(kernels.names):
        low, high = found.rank_intervals[name]
        assert 1 <= low <= high <= 12
        assert (high <= 7) if number in (1, 3, 4, 7, 9) else (low >= 4)


def test_noise_is_called_a_signal_at_most_as_often_as_promised():
    calls = [reliability(noise(seed, names=BERT_NAMES[:12])).signal for seed in range(40)]
    assert sum(calls) <= 6  # 5 % of 40 are 2; six or more have a probability below 2 %


def test_halves_are_disjoint_and_the_number_is_the_mean_of_spearmans():
    kernels = noise(0, examples=10, names=BERT_NAMES[:5])
    problem = Problem.of(kernels, 1.0, seed=3)
    generator, slow = torch.Generator().manual_seed(3), []
    for _ in range(10):
        order = problem.order[torch.randperm(10, generator=generator)].tolist()
        scores = []
        for half in (order[:5], order[5:]):
            rows = [i * 3 + a for i in half for a in range(3)]
            error = Problem.of(kernels.select_examples(half), 1.0).error
            scores.append([float(error @ kernels[name][rows][:, rows] @ error) for name in kernels.names])
        slow.append(spearmanr(*scores).statistic)
    found = split_half_reliability(View(kernels, problem), CRITERIA["gradient_energy"], splits=10)
    assert found.halves == pytest.approx(sum(slow) / 10)
    assert split_half_reliability(View(kernels, problem), CRITERIA["gradient_energy"]).splits == 50


def test_where_there_is_no_signal_the_recommendation_says_so_and_names_the_alternative():
    kernels = noise(1, examples=40)
    rec = recommend(kernels, 9)
    assert rec.signal is False
    (note,) = (note for note in rec.notes if note.startswith("No signal"))
    assert "adapt all 36 candidates at rank 2" in note
    clear = recommend(planted_kernels(examples=60, informative=(2, 5, 6)), 2)
    assert clear.signal is True and not any(note.startswith("No signal") for note in clear.notes)


def test_criteria_that_prefer_low_scores_rank_the_lowest_first():
    kernels = planted_kernels(names=BERT_NAMES[:12], examples=48, informative=(1, 4, 7))
    found = reliability(kernels, "leave_one_out")
    assert all(found.rank_intervals[BERT_NAMES[i]][1] <= 8 for i in (1, 4, 7))


@pytest.mark.parametrize("criterion", ["trace", "gradient_energy", "leave_one_out"])
def test_intervals_of_scores_are_as_wide_as_a_bootstrap_of_the_examples_says(criterion):
    """Of a criterion that is a sum over examples, of one quadratic in a mean, of one that looks at the others.

    The bootstrap repeats examples, and each is predicted from its copy, so leave-one-out errors are compared with
    those of fresh samples of the same distribution.
    """
    kernels = planted_kernels(names=BERT_NAMES[:3], examples=120, informative=(1,))
    chosen, problem = CRITERIA[criterion], Problem.of(kernels, 1.0)
    found = split_half_reliability(View(kernels, problem), chosen, splits=60)
    name = kernels.names[1]
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(200 if criterion != "leave_one_out" else 40):
        if criterion == "leave_one_out":
            seed = int(torch.randint(10_000, (1,), generator=generator))
            sample = planted_kernels(names=BERT_NAMES[:3], examples=120, informative=(1,), seed=seed)
        else:
            sample = kernels.select_examples(torch.randint(120, (120,), generator=generator))
        drawn.append(chosen(sample.base + sample[name], Problem.of(sample, 1.0)))
    low, high = torch.tensor(drawn, dtype=torch.float64).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    width = found.score_intervals[name][1] - found.score_intervals[name][0]
    assert 0.5 < width / float(high - low) < 2.0
    score = chosen(kernels.base + kernels[name], problem)
    assert found.score_intervals[name][0] < score < found.score_intervals[name][1]
    rec = recommend(kernels, 1, criterion)
    assert all(row.interval[0] <= row.score <= row.interval[1] for row in rec.scores)
    assert f"[{rec.scores[0].interval[0]:.3g}, {rec.scores[0].interval[1]:.3g}]" in rec.to_markdown()


def test_too_little_to_halve_is_not_known():
    assert reliability(noise(0, examples=6)) is None
    assert reliability(noise(0, names=BERT_NAMES[:2])) is None
    rec = recommend(noise(0, examples=6), 2)
    assert rec.signal is None and rec.settings.reliability is None
    assert all(row.interval is None for row in rec.scores)


def test_equal_scores_are_no_signal():
    kernels = noise(0, examples=10, names=BERT_NAMES[:4])
    same = replace(kernels, blocks=dict.fromkeys(kernels.names, kernels[kernels.names[0]]))
    assert reliability(same).halves == 0 and not reliability(same).signal
    assert Reliability(-1.0, 1, {"a": (1, 1)}).full == -1.0
