# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Predicted curves and the cost of the linear model: tables on made-up numbers, the scripts at their smallest."""

from __future__ import annotations

import pytest

from examples.benchmarks.linearised_cost import run as cost
from examples.benchmarks.predicted_curves import report
from examples.benchmarks.predicted_curves import run as script
from examples.common.files import read_json
from tests.helpers.figures import assert_drawn


def made_up_run(gap, predicted, real, agreement=1.0):
    def point(step, loss, accuracy):
        measures = {"pooled_movement_gap": gap, "relative_difference": gap / 2, "kl": gap**2, "agreement": agreement}
        return {"step": step, "held_out_loss": loss, "held_out_accuracy": accuracy, "gap": measures}

    return {
        "points": [point(0, 2.0, 0.1), point(4, real, 0.5)],
        "predicted": {
            "recorded": [0, 2, 4],
            "held_out_loss": [2.0, 1.9, predicted],
            "held_out_accuracy": [0.1, 0.3, 0.4],
        },
    }


def test_a_comparison_takes_the_prediction_of_the_same_step():
    (found,) = report.comparisons(made_up_run(0.2, predicted=1.5, real=1.6))
    assert found.step == 4 and found.predicted == 1.5 and found.real == 1.6 and found.start == 2.0
    assert found.error == pytest.approx(0.1) and found.relative_error == pytest.approx(0.1 / 1.6)
    assert found.error_of_change == pytest.approx(0.1 / 0.4)
    assert found.accuracy_error == pytest.approx(0.1) and found.verdict == "nearly linear"


def test_tables_put_errors_where_the_gap_is():
    runs = [made_up_run(0.02, 1.51, 1.5), made_up_run(0.25, 1.6, 1.5),
            made_up_run(0.9, 1.9, 1.0, agreement=0.3)]  # fmt: skip
    points = [found for run in runs for found in report.comparisons(run)]
    verdicts = report.verdicts_table(points).splitlines()[2:]
    assert verdicts[0] == "| linear | 1 | 0.67% | 0.67% | 2% | 2% | 10.0 points | 100% |"
    assert verdicts[2] == "| not linear | 1 | 90.00% | 90.00% | 90% | 90% | 10.0 points | 30% |"
    bands = report.bands_table(points).splitlines()[2:]
    assert [line.split(" | ")[0] for line in bands] == ["| 0% to 3%", "| 20% to 30%", "| above 80%"]
    assert all("+1.00" in line for line in report.measures_table(points).splitlines()[2:5])


@pytest.mark.slow
def test_the_quick_mode_predicts_trains_and_writes_everything(tmp_path):
    assert script.main(["--quick", "--output", str(tmp_path), "--date", "2026-01-01"]) == 0
    record = read_json(tmp_path / "results.json.gz")
    assert [run["method"] for run in record["runs"]] == ["adamw", "adamw", "sgd", "sgd"]
    for run in record["runs"]:
        assert run["rows_against_forward_mode"] < 1e-4
        assert run["predicted"]["recorded"][-1] == run["points"][-1]["step"] == 4
        start, end = run["points"][0], run["points"][-1]
        assert run["predicted"]["held_out_loss"][0] == pytest.approx(start["held_out_loss"], rel=1e-5)
        # four small steps: what is predicted comes true, much nearer than what was there before
        for quantity in ("train_loss", "held_out_loss"):
            moved = abs(end[quantity] - start[quantity])
            assert moved > 0 and abs(run["predicted"][quantity][-1] - end[quantity]) < 0.1 * moved
        assert run["report"]["pooled_movement_gap"] == pytest.approx(
            end["gap"]["pooled_movement_gap"], rel=1e-2, abs=1e-4
        )
    free, held = (run["distance"] for run in record["runs"][:2])
    assert held < free
    assert (
        record["runs"][0]["gap_at_first_a"]["pooled_movement_gap"] < record["runs"][0]["report"]["pooled_movement_gap"]
    )
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "2026-01-01" in text and "λ = 0" in text and "| AdamW | 0 |" in text
    for name in ("figure.png", "gap.png"):
        assert_drawn(tmp_path / name)
    before = (tmp_path / "README.md").read_bytes()
    (tmp_path / "README.md").unlink()
    assert script.main(["--report-only", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_bytes() == before


@pytest.mark.slow
def test_the_cost_of_a_linearised_step_is_a_ratio_within_one_run(tmp_path):
    arguments = ["--cases", "tiny", "--rounds", "2", "--repeats", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert cost.main(arguments) == 0
    row = read_json(tmp_path / "results.json.gz")["cases"]["tiny"]
    assert row["time_ratio_low"] <= row["time_ratio"] <= row["time_ratio_high"] and row["time_ratio"] > 1
    assert row["peak_mib"]["LoRA"] > 0 and row["memory_ratio"] > 0
    assert "| tiny |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_goals_of_the_cost_are_said_to_be_reached_or_not():
    row = {"time_ratio": 2.4, "time_ratio_low": 2.3, "time_ratio_high": 2.6, "memory_ratio": 2.1}
    row |= {"seconds": {cost.LORA: 1.0, cost.LINEARISED: 2.4}, "peak_mib": {cost.LORA: 100.0, cost.LINEARISED: 210.0}}
    row |= {"time_ratio_with_dropout": 2.0, "memory_ratio_with_dropout": 1.5}
    record = {
        "cases": {"x": row},
        "rounds": 5,
        "repeats": 3,
        "command": "…",
        "date": "…",
        "machine": "…",
        "versions": {},
    }
    text = cost.report(record)
    line = next(line for line in text.splitlines() if line.startswith("| x |"))
    assert line == "| x | 1.00 s | 2.40 s | 2.40 | 2.30 to 2.60 | yes | 100 MiB | 210 MiB | 2.10 | no |"
    assert "x 2.00 × the time and 1.50 × the memory" in text
