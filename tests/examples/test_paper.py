# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The script of the paper's experiments: its settings, its records, its two reports; on a tiny model."""

import pytest

from examples.common.files import read_json
from examples.common.records import Records, archive_of, as_text, lines_of
from examples.paper import condition, strength
from examples.paper import run as script
from tests.helpers.figures import assert_drawn
from tests.helpers.paper_data import as_on_the_hub


def test_records_survive_a_kill_and_refuse_another_setting(tmp_path):
    path, setting = tmp_path / "runs.jsonl", {"steps": 3, "shape": (1, 2)}
    records = Records(path, setting, ("choice", "seed"))
    for seed in range(3):
        records.add({"choice": (0, seed), "seed": seed, "value": seed})
    path.write_bytes(path.read_bytes()[:-9])  # killed while the last line was written
    again = Records(path, setting, ("choice", "seed"))
    assert ((0, 1), 1) in again and ([0, 1], 1) in again and ((0, 2), 2) not in again
    again.add({"choice": (0, 2), "seed": 2, "value": 5})
    assert Records(path, setting, ("choice", "seed")).select([((0, 2), 2)])[0]["value"] == 5
    with pytest.raises(SystemExit, match=r"another setting \(steps: 3 there, 4 here\); choose another --output"):
        Records(path, {**setting, "steps": 4}, ("choice", "seed"))


def test_defaults_are_the_papers_for_its_data_and_small_for_the_shipped_ones():
    papers, small = script.parse(["--model", "roberta-base", "--task", "cola"]), script.parse([])
    assert (papers.max_length, papers.limits, papers.protocol.batch_size) == (512, (None, None, None), 64)
    assert papers.protocol.dropout and papers.protocol.rank == 8 and papers.protocol.epochs == 10
    assert (small.max_length, small.limits, small.protocol.batch_size) == (48, (128, 8, 300), 16)
    assert not small.protocol.dropout and small.task == "topics2" and small.examples == 32
    changed = script.parse(["--limits", "all", "5", "6", "--epochs", "3", "--dropout"])
    assert changed.limits == [None, 5, 6] and changed.protocol.epochs == 3 and changed.protocol.dropout


@pytest.fixture(scope="module")
def output(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    as_on_the_hub("cola").save_to_disk(folder / "cola")
    arguments = ["--quick", "--model", tiny, "--task", "cola", "--data", str(folder / "cola"), "--max-length", "8"]
    arguments += ["--output", str(folder / "out"), "--date", "2026-01-01"]
    assert script.main(arguments) == 0
    return folder / "out", arguments


def test_the_script_writes_both_experiments(output):
    folder, _ = output
    for name, verdicts, fields in (("paper_lambda", 15, "by_pull"), ("paper_condition_number", 8, "spearman")):
        results = read_json(folder / name / "results.json")
        assert len(results["claims"]) == verdicts and fields in results and results["date"] == "2026-01-01"
        assert {claim["verdict"] for claim in results["claims"]} <= {"held", "not shown", "the opposite was measured"}
        page, report = ((folder / name / file).read_text(encoding="utf-8") for file in ("README.md", "report.md"))
        assert "--quick" in report and "2026-01-01" in report and "seeds | [0] |" in report
        assert "--quick" in page and "2026-01-01" in page and "Seeds 0" in page
        assert_drawn(folder / name / "figure.png")
    runs = lines_of(folder / "paper_condition_number" / "runs.jsonl.gz")
    assert len(runs) == 1 + 3 * 4 and {tuple(run["choice"]) for run in runs[1:]} == {(0,), (1,), (0, 1)}
    runs = lines_of(folder / "paper_lambda" / "runs.jsonl.gz")
    assert [(run["pulled"], run["pull"]) for run in runs[1:]] == [
        ("nothing", 0.0),
        ("always", 50.0),
        ("everything", 50.0),
        ("factors", 50.0),
    ]


def test_finished_runs_are_not_repeated_and_torn_ones_are(output, monkeypatch):
    folder, arguments = output
    path = folder / "paper_condition_number" / "runs.jsonl"
    before = lines_of(archive_of(path))
    path.write_text(as_text(before)[:-20], encoding="utf-8")
    archive_of(path).unlink()
    done = []

    def train(*_):
        done.append(1)

    monkeypatch.setattr(condition, "fit", train)
    monkeypatch.setattr(strength, "fit", None)
    assert script.main(arguments) == 0
    assert done == [1] and lines_of(archive_of(path))[:-1] == before[:-1]
    with pytest.raises(SystemExit, match="holds results of another setting"):
        script.main([*arguments, "--epochs", "2"])


def test_unknown_layers_are_refused(tiny, output, tmp_path):
    _, arguments = output
    with pytest.raises(SystemExit, match=r"the model has no layers \[7\]; there are \[0, 1\]"):
        script.main([*arguments, "--output", str(tmp_path), "--experiment", "lambda", "--layers", "1", "7"])
