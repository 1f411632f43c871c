# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The report on planted runs: the planted winner is found, the reversed order is not."""

import gzip
import json

import pytest

from examples.benchmarks.language.analysis import complete_cells, differences, interval, mean, regrets, results
from examples.benchmarks.language.plan import FIRST_ARMS, LADDER, MIDDLE, SECOND, Run, beyond
from examples.benchmarks.language.report import render, write_report
from examples.benchmarks.language.tasks import TUNING


BELOW, LOW = LADDER[1:3]


def planted(order, seeds=(0,), models=("smollm2-135m", "gemma3-270m"), budget="1/8"):
    """Runs whose arms lose 0.1 more from place to place; the first one's best rate is the low one, by 0.01."""
    records = {}
    for model in models:
        for number, task in enumerate(TUNING):
            for place, arm in enumerate(order):
                for seed in seeds:
                    middle, second = MIDDLE[model], SECOND[model]
                    for rate in (middle, second, beyond(second, middle)):
                        best = middle if place else second
                        loss = 2.0 + number + 0.1 * place + (0.0 if rate == best else 0.01 if place == 0 else 0.3)
                        run = Run(model, task, budget, arm, seed, rate)
                        records[run] = {
                            **vars(run),
                            "validation_loss": loss,
                            "test_loss": loss + 0.05,
                            "adapter_parameters": 1000,
                            "seconds": 60.0,
                            "cpu_seconds_per_step": 1.0,
                            "date": "2026-11-30",
                        }
    return records


def ranked(records):
    tuned = regrets(complete_cells(results(records, "1/8")))
    return sorted(tuned, key=lambda arm: mean(tuned[arm].values()))


def test_the_planted_order_is_found_and_the_reversed_one_is_not():
    assert ranked(planted(FIRST_ARMS)) == list(FIRST_ARMS)
    assert ranked(planted(FIRST_ARMS[::-1])) == list(FIRST_ARMS[::-1])
    assert ranked(planted(FIRST_ARMS[::-1])) != list(FIRST_ARMS)


def test_regrets_at_tuned_rates_and_at_one_rate():
    cells = complete_cells(results(planted(FIRST_ARMS), "1/8"))
    assert len(cells) == 12
    tuned, single = regrets(cells), regrets(cells, "one_rate")
    assert mean(tuned["mlp"].values()) == pytest.approx(0.1)
    assert mean(single["mlp"].values()) == pytest.approx(0.09)  # the winner is 0.01 off its best rate
    assert differences(cells, "mlp", "all_linear") == pytest.approx([0.1] * 12)
    assert cells["smollm2-135m", "spam"]["all_linear"].rates == (LOW,)


def test_the_test_loss_is_read_at_the_rate_that_validation_chose():
    records = planted(FIRST_ARMS)
    run = Run("smollm2-135m", "spam", "1/8", "all_linear", 0, LADDER[4])
    records[run] = {**records[run], "test_loss": -5.0}
    assert results(records, "1/8")["smollm2-135m", "spam"]["all_linear"].tuned > 0


def test_a_cell_with_an_arm_missing_is_not_compared():
    records = {
        run: record
        for run, record in planted(FIRST_ARMS).items()
        if not (run.task == "spam" and run.arm == "attention" and run.rate == LOW)
    }
    cells = results(records, "1/8")
    assert len(cells) == 12
    assert len(complete_cells(cells)) == 10
    assert "attention" not in cells["gemma3-270m", "spam"]


def test_seeds_are_averaged_over_those_that_all_first_arms_have():
    records = planted(FIRST_ARMS, seeds=(0, 1))
    records = {run: record for run, record in records.items() if run.seed == 0 or run.arm != "attention"}
    assert results(records, "1/8")["smollm2-135m", "code"]["mlp"].seeds == (0,)
    assert results(planted(FIRST_ARMS, seeds=(0, 1)), "1/8")["smollm2-135m", "code"]["mlp"].seeds == (0, 1)


def test_a_diverged_rate_is_no_best_rate():
    records = planted(FIRST_ARMS)
    run = Run("smollm2-135m", "spam", "1/8", "mlp", 0, MIDDLE["smollm2-135m"])
    records[run] = {**records[run], "validation_loss": None, "test_loss": None}
    low = records[Run("smollm2-135m", "spam", "1/8", "mlp", 0, LOW)]
    records[Run("smollm2-135m", "spam", "1/8", "mlp", 0, BELOW)] = {**low, "rate": BELOW}  # the edge is tried beyond
    result = results(records, "1/8")["smollm2-135m", "spam"]["mlp"]
    assert result.rates != (MIDDLE["smollm2-135m"],)
    assert result.one_rate == float("inf")
    assert "1 diverged" in render(records)


def test_the_interval_covers_the_mean_and_shrinks_with_the_cells():
    few, many = [0.0, 0.1, 0.2], [0.0, 0.1, 0.2] * 10
    low, high = interval(few)
    assert low < 0.1 < high
    assert interval(many)[1] - interval(many)[0] < high - low
    assert interval([0.1, 0.2]) is None


def test_the_report_writes_the_table_and_the_runs(tmp_path):
    records = planted(FIRST_ARMS)
    output = tmp_path / "build"
    output.mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records.values())
    (output / "runs.jsonl").write_text(lines, encoding="utf-8")
    assert write_report(output, shipped=tmp_path / "runs.jsonl.gz") == 0
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith(("| all_linear | 12", "| attention | 12"))]
    assert table[0].startswith("| all_linear | 12 | 0.000")
    assert "0.300" in table[1]
    assert "**2.050** @0.0013" in text
    assert len(text.splitlines()) < 60
    shipped = gzip.decompress((tmp_path / "runs.jsonl.gz").read_bytes()).decode("utf-8").splitlines()
    assert len(shipped) == len(records)
