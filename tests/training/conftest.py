# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the tests of callbacks share."""

import pytest


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Drawing takes longer than everything else; the test of the report keeps it."""
    monkeypatch.setattr("peft_linear.report.writer.matplotlib_available", lambda: False)
