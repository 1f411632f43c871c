# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The order in which examples come changes nothing: choice, scores, intervals, correlation of halves, predictions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear import recommend, recommend_modules
from peft_linear.selection.cross_validation import fold_indices
from peft_linear.selection.problem import Problem, example_key
from tests.helpers.architectures import build
from tests.helpers.planted import BERT_NAMES, planted_kernels


KERNELS = planted_kernels(names=BERT_NAMES[:5], informative=(1, 3), examples=18)


def assert_equal_up_to_rounding(one, other):
    close = {"rel": 1e-5, "abs": 1e-7}
    assert one.modules == other.modules
    assert one.settings.reliability.halves == pytest.approx(other.settings.reliability.halves)
    assert one.settings.reliability.rank_intervals == other.settings.reliability.rank_intervals
    rows = {row.name: row for row in other.scores}
    for row in one.scores:
        assert row.score == pytest.approx(rows[row.name].score, **close)
        assert row.interval == pytest.approx(rows[row.name].interval, **close)
    for key, value in one.predicted.items():
        assert value == pytest.approx(other.predicted[key], **close), key


@pytest.mark.parametrize("criterion", ["predicted_loss", "leave_one_out", "gradient_energy"])
@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(18)))
def test_permuting_the_examples_changes_nothing_beyond_rounding(criterion, order):
    expected = recommend(KERNELS, 2, criterion)
    assert_equal_up_to_rounding(recommend(KERNELS.select_examples(order), 2, criterion), expected)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(18)), seed=st.integers(0, 5))
def test_folds_hold_the_same_examples_in_every_order(order, seed):
    order = torch.tensor(order)
    plain, other = (Problem.of(kernels, 1.0, seed=seed) for kernels in (KERNELS, KERNELS.select_examples(order)))
    folds = [set(fold.tolist()) for fold in fold_indices(plain.labels, 4, seed, plain.order)]
    permuted = [set(order[fold].tolist()) for fold in fold_indices(other.labels, 4, seed, other.order)]
    assert folds == permuted


def test_examples_whose_outputs_and_labels_agree_are_told_apart_by_their_kernels():
    same = replace(KERNELS, outputs=torch.zeros_like(KERNELS.outputs), labels=torch.zeros_like(KERNELS.labels))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    assert len(example_key(same).unique()) == 18
    assert torch.equal(order[Problem.of(same.select_examples(order), 1.0).order], Problem.of(same, 1.0).order)


def test_rounding_of_outputs_does_not_change_the_order():
    noisy = replace(KERNELS, outputs=KERNELS.outputs * (1 + 1e-9))
    assert torch.equal(Problem.of(noisy, 1.0).order, Problem.of(KERNELS, 1.0).order)


def test_a_model_gets_the_same_recommendation_from_batches_in_another_order():
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(3, 47, (12, 6), generator=generator), torch.arange(12) % 3

    def batches(order):
        return [{"input_ids": ids[part], "labels": labels[part]} for part in order.split(4)]

    one, other = (
        recommend_modules(build("bert").double(), batches(order), 2, criterion="predicted_loss", progress=False)
        for order in (torch.arange(12), torch.randperm(12, generator=generator))
    )
    assert_equal_up_to_rounding(one, other)
