# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The script of the paper's experiments: its settings, its records, its two reports; on a tiny model."""

import json

import pytest

from tests.helpers.paper_data import as_on_the_hub


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("paper/run.py")


def test_records_survive_a_kill_and_refuse_another_setting(paper, tmp_path):
    path, setting = tmp_path / "runs.jsonl", {"steps": 3, "shape": (1, 2)}
    records = paper.records.Records(path, setting, ("choice", "seed"))
    for seed in range(3):
        records.add({"choice": (0, seed), "seed": seed, "value": seed})
    path.write_bytes(path.read_bytes()[:-9])  # killed while the last line was written
    again = paper.records.Records(path, setting, ("choice", "seed"))
    assert ((0, 1), 1) in again and ([0, 1], 1) in again and ((0, 2), 2) not in again
    again.add({"choice": (0, 2), "seed": 2, "value": 5})
    assert paper.records.Records(path, setting, ("choice", "seed")).select([((0, 2), 2)])[0]["value"] == 5
    with pytest.raises(SystemExit, match=r"another setting \(steps: 3 there, 4 here\); choose another --output"):
        paper.records.Records(path, {**setting, "steps": 4}, ("choice", "seed"))


def test_defaults_are_the_papers_for_its_data_and_small_for_the_shipped_ones(script):
    papers, small = script.parse(["--model", "roberta-base", "--task", "cola"]), script.parse([])
    assert (papers.max_length, papers.limits, papers.protocol.batch_size) == (512, (None, None, None), 64)
    assert papers.protocol.dropout and papers.protocol.rank == 8 and papers.protocol.epochs == 10
    assert (small.max_length, small.limits, small.protocol.batch_size) == (48, (128, 8, 300), 16)
    assert not small.protocol.dropout and small.task == "topics2" and small.examples == 32
    changed = script.parse(["--limits", "all", "5", "6", "--epochs", "3", "--dropout"])
    assert changed.limits == [None, 5, 6] and changed.protocol.epochs == 3 and changed.protocol.dropout


@pytest.fixture(scope="module")
def output(script, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    as_on_the_hub("cola").save_to_disk(folder / "cola")
    arguments = ["--quick", "--model", tiny, "--task", "cola", "--data", str(folder / "cola"), "--max-length", "8"]
    arguments += ["--output", str(folder / "out"), "--date", "2026-01-01"]
    assert script.main(arguments) == 0
    return folder / "out", arguments


def test_the_script_writes_both_experiments(output):
    folder, _ = output
    for name, verdicts, fields in (("paper_lambda", 15, "by_pull"), ("paper_condition_number", 8, "spearman")):
        results = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
        assert len(results["claims"]) == verdicts and fields in results and results["date"] == "2026-01-01"
        assert {claim["verdict"] for claim in results["claims"]} <= {"held", "not shown", "the contrary was measured"}
        report = (folder / name / "README.md").read_text(encoding="utf-8")
        assert "--quick" in report and "2026-01-01" in report and "seeds | [0] |" in report
        assert (folder / name / "figure.png").stat().st_size > 20_000
    runs = [json.loads(line) for line in (folder / "paper_condition_number" / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 1 + 3 * 4 and {tuple(run["choice"]) for run in runs[1:]} == {(0,), (1,), (0, 1)}
    runs = [json.loads(line) for line in (folder / "paper_lambda" / "runs.jsonl").read_text().splitlines()]
    assert [(run["pulled"], run["pull"]) for run in runs[1:]] == [
        ("nothing", 0.0),
        ("always", 50.0),
        ("everything", 50.0),
        ("factors", 50.0),
    ]


def test_finished_runs_are_not_repeated_and_torn_ones_are(script, paper, output, monkeypatch):
    folder, arguments = output
    path = folder / "paper_condition_number" / "runs.jsonl"
    before = path.read_text(encoding="utf-8")
    path.write_text(before[:-20], encoding="utf-8")
    done = []

    def train(*_):
        done.append(1)

    monkeypatch.setattr(paper.condition, "fit", train)
    monkeypatch.setattr(paper.strength, "fit", None)
    assert script.main(arguments) == 0
    assert done == [1] and path.read_text(encoding="utf-8").splitlines()[:-1] == before.splitlines()[:-1]
    with pytest.raises(SystemExit, match="holds results of another setting"):
        script.main([*arguments, "--epochs", "2"])


def test_unknown_layers_are_refused(script, tiny, output, tmp_path):
    _, arguments = output
    with pytest.raises(SystemExit, match=r"the model has no layers \[7\]; there are \[0, 1\]"):
        script.main([*arguments, "--output", str(tmp_path), "--experiment", "lambda", "--layers", "1", "7"])
