# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The README's example runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import default_data_collator

from peft_linear import __all__ as public
from peft_linear import __version__
from tests.helpers import small_models as small


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"<!-- run by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (batch,) = small.text_batches(sizes=(32,))
    rows = [{key: value[i] for key, value in batch.items()} for i in range(32)]
    names = {
        "model": small.seeded(small.bert, dtype=torch.float32),
        "batches": [batch],
        "train": rows,
        "collate": default_data_collator,
    }
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["recommendation"].modules) == 8
    assert any("proximal_distance" in entry for entry in names["trainer"].state.log_history)
    assert {path.name for path in (tmp_path / "out" / "lora").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_public_name_is_documented():
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: peft_linear\.(\w+)$", api, re.MULTILINE)) >= set(public)


def test_there_is_one_version():
    assert f'version="{__version__}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
