# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of callbacks share."""

import pytest


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Drawing takes longer than everything else; the test of the report keeps it."""
    monkeypatch.setattr("peft_linear.report.writer.matplotlib_available", lambda: False)
