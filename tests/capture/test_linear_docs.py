# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path

import pytest

from peft_linear.capture.gap import VERDICTS
from peft_linear.functional import bounds
from tests.helpers.linear_models import with_adapter
from tests.helpers.small_models import bert, text_batches


DOCS = Path(__file__).parents[2] / "docs" / "explanation"


@pytest.mark.parametrize("page", ["linearised_model.md", "bounds.md"])
def test_the_code_on_the_page_runs(page):
    names = {"model": with_adapter(bert), "batches": text_batches()}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        exec(block, names)


def test_the_verdicts_on_the_page_are_those_of_the_code():
    page = (DOCS / "linearised_model.md").read_text(encoding="utf-8")
    for word, gap, agreement, error in VERDICTS:
        row = f"| {word} | at most {gap:.0%} | at least {agreement:.0%} | within {error:.0%} |"
        assert row.replace("%", " %") in page


def test_the_numbers_on_the_page_are_those_of_the_code():
    assert bounds.distance_bound(0.69, 0.0, 0.01) == pytest.approx(11.7, abs=0.05)
    assert bounds.taylor_remainder_bound(0.05, 2.0) == pytest.approx(0.1)
