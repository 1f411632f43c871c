# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The notebook as a script runs from its first cell to its last, and leaves the report with what was measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_linear import Recommendation
from tests.helpers.pages import check_page


EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = "EXAMPLES, BUDGET, STEPS = 64, 8, 60"


@pytest.mark.slow
def test_every_cell_runs_and_the_report_has_what_was_measured(tmp_path):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    source = (EXAMPLES / "choose_target_modules.py").read_text(encoding="utf-8")
    assert source.count(SIZES) == 1
    script = tmp_path / "small.py"
    script.write_text(source.replace(SIZES, "EXAMPLES, BUDGET, STEPS = 24, 5, 6"), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "5 of 37 modules" in done.stdout and "all candidates    37 modules" in done.stdout
    assert "agree on the order" in done.stdout or "No signal" in done.stdout

    page = (tmp_path / "choose_target_modules" / "report.html").read_text(encoding="utf-8")
    table = next(t for t in check_page(page).tables if t[0][0] == "prediction")
    assert table[0][2] == "measured"
    measured = {row[0]: row[2] for row in table[1:] if row[2]}
    assert set(measured) == {
        "held-out cross-entropy of simulated training",
        "held-out accuracy of simulated training",
        "distance, adapters only",
    }
    assert len(Recommendation.load(tmp_path / "choose_target_modules").modules) == 5


def test_it_is_a_notebook_that_jupytext_would_take():
    lines = (EXAMPLES / "choose_target_modules.py").read_text(encoding="utf-8").splitlines()
    marks = [line for line in lines if line.startswith("# %%")]
    assert set(marks) == {"# %%", "# %% [markdown]"} and marks[0] == "# %% [markdown]"
    for number, line in enumerate(lines):
        if line == "# %% [markdown]":
            cell = lines[number + 1 : next(i for i in range(number + 1, len(lines)) if lines[i].startswith("# %%"))]
            assert all(text.startswith("#") or not text for text in cell), "a text cell is comments alone"
