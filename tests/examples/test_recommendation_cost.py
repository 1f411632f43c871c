# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

import pytest

from examples.benchmarks.recommendation_cost import run as script
from examples.common import machine
from examples.common.files import read_json
from examples.common.reports import Folders


def test_it_measures_both_in_turns_and_writes_a_table(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(script, "peak_mebibytes", lambda *what: asked.append(what) or 7.0 + len(asked))
    options = ["--cases", "tiny", "--rounds", "2", "--rank", "2", "--note", "A busy machine."]
    assert script.main([*options, "--output", str(tmp_path)]) == 0
    row = read_json(tmp_path / "results.json.gz")["cases"]["tiny"]
    assert (row["candidates"], row["examples"], row["outputs"], row["goal_steps"]) == (31, 10, 2, 10_000)
    for name in script.CRITERIA:
        assert 0 < row["in_steps"][name]["low"] <= row["in_steps"][name]["median"] <= row["in_steps"][name]["high"]
        assert row["in_steps_by_the_clock"][name]["median"] > 0
        assert row["seconds"][name] > 0
    assert asked == [("tiny", "step", 2, "cpu"), ("tiny", "default-by-evidence", 2, "cpu")]
    table = (tmp_path / "README.md").read_text()
    assert table == capsys.readouterr().out.rstrip("\n") + "\n"
    assert "tiny: 31 candidates, 10 examples of 2 outputs" in table and "| 10000 | yes | 9 / 8 |" in table
    assert "A busy machine." in table and "--rank 2" in table


@pytest.mark.parametrize("what", ["step", "default-by-evidence"])
def test_peak_memory_is_of_a_process_that_does_one_thing(what, monkeypatch, capsys):
    ran = []

    def run(command, **_):
        ran.append(command)
        assert script.main(command[3:]) == 0
        return SimpleNamespace(returncode=0, stdout=capsys.readouterr().out)

    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setattr(machine, "peak_bytes", iter([2**20, 5 * 2**20]).__next__)
    assert script.peak_mebibytes("tiny", what, 2, "cpu") == 4.0
    assert ran[0][1:3] == ["-m", "examples.benchmarks.recommendation_cost"]


def fake(case, steps, goal):
    spread = {"median": steps, "low": steps, "high": steps}
    return {
        **{"candidates": 3, "examples": 4, "outputs": 1, "goal_steps": goal, "rounds": 1, "command": f"run {case}"},
        "seconds": {
            **{"step": 1.0, "default-by-evidence": 0.5, "leave_one_out": 0.7},
            **{"kernels, default-by-evidence": 2.0, "kernels, leave_one_out": 2.0},
        },
        "in_steps": dict.fromkeys(("default-by-evidence", "leave_one_out"), spread),
        "in_steps_by_the_clock": dict.fromkeys(("default-by-evidence", "leave_one_out"), spread),
    }


def test_a_missed_goal_is_said_and_an_earlier_case_is_kept(tmp_path, monkeypatch, capsys):
    results = {"note": "", "date": "today", "machine": "here", "versions": {"torch": "2"}}
    folders = Folders.of("benchmarks/recommendation_cost", "recommendation_cost", tmp_path)
    script.write({**results, "cases": {"slow": fake("slow", 31.0, 30), "good": fake("good", 2.0, 30)}}, folders)
    script.write({**results, "cases": {"good": fake("again", 3.0, 30)}}, folders)
    kept = read_json(tmp_path / "results.json.gz")["cases"]
    assert kept["slow"]["in_steps"]["leave_one_out"]["median"] == 31.0
    assert kept["good"]["command"] == "run again"
    table = (tmp_path / "README.md").read_text()
    assert "| 30 | no |" in table and "| 30 | yes |" in table and "`run slow`, `run again`" in table
    monkeypatch.setattr(script, "measure", lambda *_: fake("slow", 31.0, 30))
    assert script.main(["--cases", "tiny", "--measure", "time", "--output", str(tmp_path / "missed")]) == 1
    assert "missed: tiny: 31.0 training steps, at most 30 wanted" in capsys.readouterr().err


def test_a_round_is_compared_with_its_own_steps():
    measured = {
        "step": [(1.0, 2.0), (2.0, 8.0)],
        "kernels, leave_one_out": [(4.0, 8.0), (8.0, 8.0)],
        "leave_one_out": [(2.0, 4.0), (4.0, 8.0)],
    }
    assert script.ratios(measured, "leave_one_out", clock=0) == {"median": 6.0, "low": 6.0, "high": 6.0}
    assert script.ratios(measured, "leave_one_out", clock=1) == {"median": 4.0, "low": 2.0, "high": 6.0}


def test_training_shares_the_weights_of_the_model_under_test():
    setting = script.build("tiny", "cpu")
    training = script.Training(setting, 2, "cpu")
    ours = {id(p) for p in setting.model.parameters()}
    assert sum(id(p) in ours for p in training.model.parameters()) > 30
    (before, heads), criterion = script.kernels_of(setting, 2, script.CRITERIA[0]), script.CRITERIA[1]
    assert len(heads) == 2 and not script.kernels_of(setting, 2, criterion)[1]
    training.run(2)
    after, _ = script.kernels_of(setting, 2, criterion)
    assert (after.subset() == before.subset()).all()  # the base is frozen, only the adapters move
