# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of speed, on its smallest case."""

from __future__ import annotations

import pytest

from examples.benchmarks.ntk_speed import run as ntk_speed
from examples.benchmarks.ntk_speed.report import goals
from examples.common.files import read_json


@pytest.mark.parametrize("space", ["lora", "weight"])
def test_times_are_ratios_and_peers_agree(tmp_path, space):
    arguments = ["--cases", "tiny", "--spaces", space, "--methods", "peft_linear", "torch.func", "authors"]
    ntk_speed.main([*arguments, "--measure", "time", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)])
    rows = read_json(tmp_path / "results.json.gz")["cases"][f"tiny/{space}"]
    assert rows["floor"]["ratio"] == 1 and rows["peft_linear"]["ratio"] > 0
    for peer in ("torch.func", "authors"):
        assert rows[peer]["difference"] < 1e-4
    text = (tmp_path / "README.md").read_text()
    assert f"| tiny | {space} | torch.func |" in text and "time of torch.func / ours at least" in text


def test_goals_say_what_was_not_reached():
    rows = {"peft_linear": {"ratio": 2.0, "peak": 10.0}, "training step": {"peak": 10.0}, "TRAK": {"ratio": 6.0}}
    lines = goals({"bert-32x128/weight": rows}).splitlines()[2:]
    assert lines == [
        "| bert-32x128 | weight | time / floor at most 1.5 | 2.00 | no |",
        "| bert-32x128 | weight | peak / training step at most 1.3 | 1.00 | yes |",
        "| bert-32x128 | weight | time of TRAK / ours at least 1.5 | 3.00 | yes |",
    ]
