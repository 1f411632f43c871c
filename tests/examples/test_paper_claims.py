# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The paper's experiments: what is concluded from runs, on planted numbers."""

import pytest
import torch

from examples.paper import condition as experiment
from examples.paper import predictors, strength_report
from peft_linear import ModuleKernels


def planted(scale=1.0):
    """Kernels of 2 examples with 2 outputs and known eigenvalues; the head's block is the identity."""
    blocks = {"one": torch.tensor([8.0, 4.0, 2.0, 1.0]).diag(), "two": torch.tensor([0.0, 4.0, 0.0, 1.0]).diag()}
    return ModuleKernels(
        blocks={name: scale * block.double() for name, block in blocks.items()},
        base=torch.eye(4, dtype=torch.float64),
        outputs=torch.zeros(2, 2, dtype=torch.float64),
        labels=torch.tensor([0, 1]),
        num_parameters=dict.fromkeys(blocks, 4),
        shapes=dict.fromkeys(blocks, (2, 2)),
        rank=1,
    )


def test_condition_numbers_are_those_of_their_names():
    start = predictors.Start({}, planted(), planted())
    found = predictors.conditions(start, ["one"])
    assert found["κ, σ = 1e-4"] == pytest.approx((8 + 1e-4) / (1 + 1e-4), rel=1e-12)
    assert found["κ, no ridge"] == pytest.approx(8.0)
    assert found["κ with head, no ridge"] == pytest.approx(9 / 2)
    assert predictors.conditions(start, ["two"])["κ, no ridge"] == float("inf")
    small = predictors.conditions(predictors.Start({}, planted(1e-6), planted(1e-6)), ["one"])
    assert small["κ, σ = 1e-4"] < 1.1 and small["κ, no ridge"] == pytest.approx(8.0)  # what a fixed ridge does
    relative = "κ, σ = 1e-4·tr(K)/n"
    assert small[relative] == pytest.approx(found[relative], rel=1e-9)


def planted_runs(better, condition, seeds=(0,)):
    """Runs whose final loss falls with `better(choice)` and whose condition number is `condition(choice)`."""
    runs = []
    for seed in seeds:
        for choice in predictors.layer_choices(range(6), 24):
            for loss, optimizer in experiment.ARMS:
                numbers = {predictors.PAPER: condition(choice), "number of layers": float(len(choice))}
                numbers |= dict.fromkeys(("gradient_energy", "trace", "leave_one_out"), 1.0)
                score = {"loss": 1 / (1 + better(choice)), "accuracy": better(choice) / 1000}
                run = {"choice": choice, "loss": loss, "optimizer": optimizer, "seed": seed, "learning_rate": 0.1}
                runs.append({**run, "train": score, "test": score, "predictors": numbers})
    return runs


def depth(choice):
    return sum(2.0**layer for layer in choice)


@pytest.mark.parametrize(
    ("condition", "word"),
    [
        (lambda choice: 1 / depth(choice), "held"),
        (depth, "the opposite was measured"),
        (lambda choice: 1.0, "not shown"),
    ],
)
def test_claims_about_the_condition_number_follow_from_the_numbers(condition, word):
    tables = experiment.analyse(planted_runs(depth, condition))
    claims = experiment.claims(tables, 24)
    assert len(claims) == 8 and {claim.verdict for claim in claims} == {word}


def test_at_an_equal_number_of_layers_their_number_predicts_nothing():
    runs = planted_runs(lambda choice: 100.0 * len(choice) + depth(choice), lambda choice: -float(len(choice)))
    arm = experiment.ARMS[0]
    plain = experiment.analyse(runs)["final training loss"][arm][predictors.PAPER]
    within = experiment.analyse(runs, within=True)["final training loss"][arm][predictors.PAPER]
    assert plain.mean > 0.9 and within.mean == 0.0
    runs = planted_runs(lambda choice: 100.0 * len(choice) + depth(choice), lambda choice: -depth(choice))
    within = experiment.analyse(runs, within=True)["final training loss"][arm][predictors.PAPER]
    assert within.mean > 0.9


def strengths(field, columns, pulled="everything"):
    """Runs over λ = 0, 1, 2, 3; a column is one seed's values of a field."""
    kinds = ["nothing", *[pulled] * 3]
    return [
        {"pulled": kinds[pull], "pull": float(pull), "seed": seed, field: value}
        for seed, column in enumerate(columns)
        for pull, value in enumerate(column)
    ]


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ([[4, 3, 2, 1], [5, 3, 2, 1]], "held"),
        ([[1, 2, 3, 4], [1, 2, 3, 5]], "the opposite was measured"),
        ([[4, 3, 2, 1], [1, 2, 3, 4]], "not shown"),
        ([[4, 3, 2, 1], [4, 5, 6, 3]], "not shown"),
        ([[4, 1, 5, 3], [4, 1, 5, 3]], "not shown"),
    ],
)
def test_a_trend_with_the_strength_must_show_in_every_seed(columns, word):
    claim = strength_report.falls(strengths("x", columns), "x", "x is", "x falls")
    assert claim.verdict == word
    of_others = strength_report.pulled_by(strengths("x", columns, "factors"), "everything")
    assert {run["pull"] for run in of_others} == {0.0}


@pytest.mark.parametrize(
    ("accuracies", "word"),
    [([0.9, 0.9, 0.9, 0.6], "held"), ([0.6, 0.7, 0.8, 0.9], "the opposite was measured"), ([0.9] * 4, "not shown")],
)
def test_accuracy_must_change_beyond_its_error(accuracies, word):
    runs = strengths("gap_at_own", [[{"accuracy": value} for value in accuracies]])
    assert strength_report.accuracy_falls(runs, 100, "").verdict == word
    assert strength_report.accuracy_falls(runs, 4, "").verdict == "not shown"
