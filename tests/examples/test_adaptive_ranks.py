# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
from examples.benchmarks.adaptive_ranks import run as script
from examples.common.files import read_json
from examples.common.records import lines_of


def test_every_arm_is_trained_at_the_same_parameters_and_compared_by_seed(tmp_path, capsys):
    given = ["--quick", "--tasks", "digits", "--output", str(tmp_path), "--cache", str(tmp_path / "cache")]
    assert script.main(given) == 0
    rows = read_json(tmp_path / "results.json")["results"]["digits"]
    uniform, adaptive, eva = (rows[f"rank 2, {arm}"] for arm in script.ARMS)
    assert uniform["ranks"] == [2, 2] and adaptive["ranks"][0] < adaptive["ranks"][1]
    smallest_step = 64 + 64  # parameters of a further rank
    assert 0 <= uniform["parameters"] - adaptive["parameters"] < 2 * smallest_step
    assert eva["modules"] <= uniform["modules"]
    assert all(len(row["losses"]) == 2 for row in rows.values())
    difference = sum(adaptive["losses"]) / 2 - sum(uniform["losses"]) / 2
    assert f"| rank 2, adaptive | {adaptive['parameters']:,} |" in (text := capsys.readouterr().out)
    assert f"{difference:+.3f} ±" in text
    recorded = tmp_path / "truth_digits.jsonl.gz"
    lines = lines_of(recorded)
    assert {tuple(line["ranks"]) for line in lines[1:]} and len(lines) == 1 + 3 * 2
    before = recorded.read_bytes()
    assert script.main(given) == 0 and recorded.read_bytes() == before
