# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the bench does with decisions: they are trained once, and set beside the arms; scores are set beside losses."""

from dataclasses import asdict

import pytest

from examples.benchmarks.language import planned, scores
from examples.benchmarks.language.analysis import ArmResult
from examples.benchmarks.language.plan import FIRST_ARMS, MORE_ARMS, Group
from examples.benchmarks.language.queue import fill
from examples.benchmarks.language.run_log import RunLog


CELL = Group("tiny", "spam", "1/2", planned.NAME, 0)


def test_a_decision_is_trained_at_its_rate_within_the_budget(bench):
    record = planned.run_plan(bench, CELL)
    assert record["steps"] == bench.steps == 2
    assert 0 < record["adapter_parameters"] <= record["budget_parameters"]
    low, high = record["rate_interval"]
    assert low < record["rate"] < high
    assert "all linear" in record["options"]
    assert not any(hasattr(module, "lora_A") for module in bench.model.modules())


def test_every_arm_has_a_score(bench):
    found = scores.score_cell(bench, Group("tiny", "spam", "1/2", scores.NAME, 0))["scores"]
    assert list(found) == [*FIRST_ARMS, *MORE_ARMS]
    assert all(score["size"] > 0 and score["first_order"] > 0 for score in found.values())


def test_a_cell_is_done_once_and_the_limit_holds(tmp_path):
    asked = []

    def record_of(group):
        asked.append(group)
        return {**asdict(group), "rate": 0.1, "validation_loss": None}

    cells = [CELL, Group("tiny", "code", "1/2", planned.NAME, 0), CELL]
    assert fill(RunLog(tmp_path, None, "planned"), cells, record_of, limit=1) == 1
    assert fill(RunLog(tmp_path, None, "planned"), cells, record_of) == 1
    assert fill(RunLog(tmp_path, None, "planned"), cells, record_of) == 0
    assert asked == cells[:2]


def arm(loss):
    return ArmResult(loss, loss + 1, (0.004,), 1000, (0,))


ARMS = {"all_linear": arm(2.0), "mlp": arm(1.9), "qv": arm(2.4), "attention": arm(2.2)}


@pytest.mark.parametrize(("sign", "shown"), [(-1, "1.00"), (1, "-1.00")])
def test_the_correlation_is_that_of_the_score_with_the_gain(sign, shown):
    record = {
        "model": "tiny",
        "task": "spam",
        "budget": "1/8",
        "scores": {
            name: {"decrease": sign * arm.tuned, "first_order": -sign * arm.tuned} for name, arm in ARMS.items()
        },
    }
    table = scores.correlations([record], {("tiny", "spam"): ARMS}, "1/8")
    assert f"| tiny, spam | 4 | {shown} | {shown} |" in table
    assert scores.correlations([record], {("tiny", "spam"): ARMS}, "1/2") == ""


def test_a_plan_is_set_beside_all_linear_and_the_best_arm():
    record = {**asdict(CELL), "budget": "1/8", "rule": "MLP", "rate": 0.003, "rate_interval": [0.002, 0.004]}
    table = scores.plans_table([record | {"test_loss": 1.95}], {("tiny", "spam"): ARMS}, "1/8")
    assert "| 1.950 | 2.000 | mlp 1.900 | -0.050 | +0.050 |" in table
    assert scores.plans_table([record], {}, "1/8") == ""
