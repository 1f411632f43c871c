# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Where measurements are written to, and how their records are kept."""

import gzip

import pytest

from examples.common.files import read_json, save_json
from examples.common.records import JsonLines, Records, archive_of, stored_lines
from examples.common.reports import ROOT, Folders, command_line


def test_one_output_folder_is_for_everything_and_the_default_keeps_raw_runs_out_of_docs(tmp_path):
    here = Folders.of("benchmarks/selection", "selection", tmp_path)
    assert here.summary == here.runs == here.full == tmp_path
    default = Folders.of("benchmarks/selection", "selection", None)
    assert default.summary == ROOT / "docs" / "measurements" / "selection"
    assert default.runs == ROOT / "examples" / "benchmarks" / "selection" and (default.runs / "run.py").is_file()
    assert (ROOT / "docs") not in default.runs.parents and (ROOT / "docs") not in default.full.parents


def test_a_quick_run_does_not_replace_the_recorded_measurement(tmp_path):
    with pytest.raises(SystemExit, match="--quick needs --output"):
        Folders.of("benchmarks/selection", "selection", None, quick=True)
    assert Folders.of("benchmarks/selection", "selection", tmp_path, quick=True).runs == tmp_path


def test_equal_content_gives_equal_compressed_bytes(tmp_path):
    for name in ("one.json.gz", "two.json.gz"):
        save_json(tmp_path / name, {"loss": 0.5, "names": ["é", "λ"]})
    assert (tmp_path / "one.json.gz").read_bytes() == (tmp_path / "two.json.gz").read_bytes()
    assert read_json(tmp_path / "one.json.gz") == {"loss": 0.5, "names": ["é", "λ"]}


def test_records_are_compressed_when_packed_and_more_can_follow(tmp_path):
    path = tmp_path / "runs.jsonl"
    first = Records(path, {"steps": 3}, ("seed",))
    first.add({"seed": 0, "value": 1.0})
    first.pack()
    packed = archive_of(path).read_bytes()
    assert not path.exists() and gzip.decompress(packed).count(b"\n") == 2
    again = Records(path, {"steps": 3}, ("seed",))
    assert (0,) in again
    again.pack()
    assert archive_of(path).read_bytes() == packed  # nothing was added
    again.add({"seed": 1, "value": 2.0})
    assert path.is_file() and (1,) in Records(path, {"steps": 3}, ("seed",))
    again.pack()
    assert stored_lines(path) == [{"setting": {"steps": 3}}, {"seed": 0, "value": 1.0}, {"seed": 1, "value": 2.0}]
    with pytest.raises(SystemExit, match="steps: 3 there, 4 here"):
        Records(path, {"steps": 4}, ("seed",))


def test_a_torn_line_is_dropped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"seed": 0}\n{"seed": 1', encoding="utf-8")
    lines = JsonLines(path)
    lines.append([{"seed": 2}])
    assert lines.lines == stored_lines(path) == [{"seed": 0}, {"seed": 2}]


def test_the_command_can_be_typed_again():
    assert command_line("examples.paper", ["--task", "my task"]) == "python -m examples.paper --task 'my task'"
