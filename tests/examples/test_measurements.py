# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The published measurements stay short and small, and every benchmark is a package."""

import re

import pytest

from examples.common.records import lines_of
from examples.common.reports import ROOT


PAGES = sorted((ROOT / "docs" / "measurements").rglob("*.md"))
PACKAGES = sorted(path for path in (ROOT / "examples" / "benchmarks").iterdir() if (path / "run.py").is_file())
COMPRESSED = sorted(path for path in (ROOT / "examples").rglob("*.gz") if "data" not in path.parts)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_measurement_has_at_most_a_thousand_words_tables_included(path):
    assert len(re.findall(r"[^\s|:-]\S*", path.read_text(encoding="utf-8"))) <= 1000


def test_docs_hold_no_raw_runs_and_stay_small():
    files = [path for path in (ROOT / "docs").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert {path.suffix for path in files if "measurements" in path.parts} == {".md", ".png"}


@pytest.mark.parametrize("path", COMPRESSED, ids=lambda path: str(path.relative_to(ROOT)))
def test_compressed_records_are_small_and_whole(path):
    assert path.stat().st_size <= 300_000
    assert path.name.endswith(".json.gz") or len(lines_of(path)) > 1


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.name)
def test_every_benchmark_is_run_as_a_module_and_named_in_its_help(path):
    module = f"examples.benchmarks.{path.name}"
    assert (path / "__init__.py").is_file() and (path / "__main__.py").is_file()
    assert f"python -m {module}" in (path / "run.py").read_text(encoding="utf-8")


def test_nothing_edits_the_import_path():
    edit = re.compile(r"sys\.path\s*(\[|\.|=|\+)")
    for folder in ("examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not edit.search(path.read_text(encoding="utf-8")), path
