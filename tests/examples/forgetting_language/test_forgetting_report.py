# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The numbers of the page, from runs whose right answers are known."""

from __future__ import annotations

import json
import math
import re

import pytest

from examples.benchmarks.forgetting_language import report
from examples.benchmarks.forgetting_language.analysis import (
    Point,
    cells_of,
    explained,
    interval,
    ladders,
    least_kl,
    log_ratios,
)


def record(arm, strength, loss, kl, seed=0, scaled=None, **more):
    """A run with one KL for all kinds of text; `scaled` is (loss, KL) at scale 0.7."""

    def measures(loss, kl):
        kinds = {f"kl_{kind}": kl for kind in ("descriptions", "code", "far")}
        return {"test_loss": loss, "kl_task_answers": kl * 3, "kl_task_prompts": kl * 2, **kinds}

    scales = {"1": measures(loss, kl)} | ({"0.7": measures(*scaled)} if scaled else {})
    return {
        "model": "smollm2-135m", "task": "translation_fr", "arm": arm, "strength": strength, "seed": seed,
        "scales": scales, "start_test_loss": 3.0, "date": "2026-12-01", "steps": 60, "cpu_seconds_per_step": 1.2,
        "peak_mib": 2000, "delta_distance": math.sqrt(kl), "function_distance": kl, **more,
    }  # fmt: skip


RUNS = [
    record("lora", 0.0, 2.0, 0.4, scaled=(2.2, 0.1)),
    record("pull_function", 10.0, 2.1, 0.02),
    record("pull_function", 3.0, 2.05, 0.05),
    record("pull_delta", 3.0, 2.2, 0.1),
    record("kl_budget", 0.03, 2.1, 0.03, held_out_kl=0.033, last_lambda=5.0),
]


def test_shares_are_of_loras_gain_and_a_ladder_begins_with_lora():
    found = ladders(RUNS, "code")
    assert [run[0].share for run in found["pull_function"]] == pytest.approx([1.0, 0.95, 0.9])
    assert [point.kl for point in found["lora"][0]] == [0.4, 0.1]
    assert len(found["lora"]) == 1 and len(found["kl_budget"]) == 1


def test_between_strengths_the_logarithm_is_linear_in_the_share():
    ladder = ladders(RUNS, "code")["pull_delta"]
    assert least_kl(ladder, 0.9, scaled=False) == pytest.approx(math.sqrt(0.4 * 0.1))
    assert least_kl(ladder, 0.8, scaled=False) == pytest.approx(0.1)
    assert least_kl(ladder, 0.5, scaled=False) == pytest.approx(0.1)
    assert least_kl(ladder, 1.1, scaled=False) is None


def test_scaling_down_is_another_path():
    lora = ladders(RUNS, "code")["lora"]
    assert least_kl(lora, 0.9, scaled=False) == 0.4
    assert least_kl(lora, 0.9, scaled=True) == pytest.approx(0.2)
    assert least_kl([[Point(1.0, 0.4)], []], 0.9, scaled=True) == 0.4


def test_ratios_are_paired_within_cells():
    cells = cells_of([*RUNS, record("pull_delta", 3.0, 2.2, 0.1, seed=1)])  # no LoRA there
    assert [cell.seed for cell in cells] == [0]
    (ratio,) = log_ratios(cells, "pull_function", "pull_delta", "code", 0.9).values()
    assert math.exp(ratio) == pytest.approx(0.02 / 0.2)
    (ratio,) = log_ratios(cells, "pull_function", "lora", "code", 0.9).values()
    assert math.exp(ratio) == pytest.approx(0.02 / 0.2)
    assert log_ratios(cells, "pull_function", "replay", "code", 0.9) == {}
    assert log_ratios(cells, "pull_function", "pull_delta", "code", 0.75) == {}  # a stronger one was not trained


def test_an_interval_is_students():
    assert interval([1.0, 2.0]) is None
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_a_quantity_that_is_a_power_of_kl_explains_all():
    runs = [
        record("pull_delta", s, 2.0, 0.4 / s, delta_distance=(0.4 / s) ** 0.3 * 7) for s in (1.0, 2.0, 4.0, 8.0, 9.0)
    ]
    assert explained(runs, "delta_distance", "code") == pytest.approx(1.0)
    assert explained(runs[:2], "delta_distance", "code") is None


def test_the_page_has_what_was_measured_and_names_what_was_not(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in RUNS))
    assert report.write_report(folder, tmp_path / "runs.jsonl.gz", tmp_path / "page") == 0
    text = (tmp_path / "page" / "README.md").read_text()
    assert re.search(r"\| pull in delta space \|( [^|]+\|){3} 0\.10 \(1\) \|", text)
    assert "0.0330 (+10%)" in text
    assert "Not run yet: KL to the base in the loss" in text
    assert (tmp_path / "page" / "figure.png").stat().st_size > 1000
    # the runs that were kept are the input of the next report
    (folder / "runs.jsonl").write_text(json.dumps(record("replay", 1.0, 2.2, 0.1)) + "\n")
    report.write_report(folder, tmp_path / "runs.jsonl.gz", tmp_path / "page")
    text = (tmp_path / "page" / "README.md").read_text()
    assert re.search(r"\| replay \|( [^|]+\|){3} 0\.10 \(1\) \|", text)


def test_a_page_of_no_run_is_no_error(tmp_path):
    report.write_report(tmp_path, tmp_path / "runs.jsonl.gz", tmp_path / "page")
    assert "No cell is complete." in (tmp_path / "page" / "README.md").read_text()
