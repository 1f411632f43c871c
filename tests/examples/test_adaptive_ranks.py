# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
import json

import pytest


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("benchmarks/adaptive_ranks.py")


def test_every_arm_is_trained_at_the_same_parameters_and_compared_by_seed(script, tmp_path, capsys):
    given = ["--quick", "--tasks", "digits", "--output", str(tmp_path), "--cache", str(tmp_path / "cache")]
    assert script.main(given) == 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]["digits"]
    uniform, adaptive, eva = (rows[f"rank 2, {arm}"] for arm in script.ARMS)
    assert uniform["ranks"] == [2, 2] and adaptive["ranks"][0] < adaptive["ranks"][1]
    smallest_step = 64 + 64  # parameters of a further rank
    assert 0 <= uniform["parameters"] - adaptive["parameters"] < 2 * smallest_step
    assert eva["modules"] <= uniform["modules"]
    assert all(len(row["losses"]) == 2 for row in rows.values())
    difference = sum(adaptive["losses"]) / 2 - sum(uniform["losses"]) / 2
    assert f"| rank 2, adaptive | {adaptive['parameters']:,} |" in (text := capsys.readouterr().out)
    assert f"{difference:+.3f} ±" in text
    lines = (tmp_path / "truth_digits.jsonl").read_text(encoding="utf-8").splitlines()
    assert {tuple(json.loads(line)["ranks"]) for line in lines[1:]} and len(lines) == 1 + 3 * 2
    before = (tmp_path / "truth_digits.jsonl").stat().st_size
    assert script.main(given) == 0 and (tmp_path / "truth_digits.jsonl").stat().st_size == before
