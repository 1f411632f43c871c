# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import pytest

from examples.benchmarks.step_cost import report, run
from examples.common.files import read_json
from examples.common.reports import ROOT


def test_it_measures_every_set_and_writes_a_table(tmp_path, capsys):
    run.main(["--cases", "tiny@8", "tiny@8+checkpointing", "--rounds", "1", "--output", str(tmp_path)])
    cases = read_json(tmp_path / "results.json.gz")["cases"]
    rows = cases["tiny@8"]["sets"]
    assert len(rows) == 15 and all(row["seconds"] > 0 and row["kept_bytes"] > 0 for row in rows.values())
    assert all(row["kept_bytes"] is None for row in cases["tiny@8+checkpointing"]["sets"].values())
    table = (tmp_path / "summary.md").read_text()
    assert "## tiny@8, 4 x 8 tokens" in table and "memory not measured" in table
    assert table == capsys.readouterr().out.rstrip("\n") + "\n"


@pytest.mark.parametrize("case", ["other", "tiny@many", "tiny+fast"])
def test_cases_that_do_not_exist_are_refused(case):
    with pytest.raises(SystemExit, match="cannot read the case"):
        run.parse_case(case)


def test_a_prediction_that_is_off_is_said():
    rows = {
        "all linear": {"seconds": 2.0, "predicted_time": 10.0, "kept_bytes": 100, "predicted_bytes": 100},
        "MLP": {"seconds": 1.0, "predicted_time": 6.0, "kept_bytes": 100, "predicted_bytes": 80},
    }
    missed = report.missed({"cases": {"x": {"sets": rows}}})
    assert missed == [
        "x, MLP: time +20.0%, at most 15 % wanted",
        "x, MLP: memory -20.0%, at most 15 % wanted",
    ]


def test_the_recorded_measurement_is_within_the_goal_and_the_page_says_so():
    results = read_json(ROOT / "examples" / "benchmarks" / "step_cost" / "results.json.gz")
    assert report.missed(results) == []
    page = (ROOT / "docs" / "how-to" / "choose_by_time_or_memory.md").read_text(encoding="utf-8")
    for case in results["cases"]:
        error = report.worst(results, case, "time").split("%")[0].lstrip("+-")
        assert f"| {error} % |" in page
