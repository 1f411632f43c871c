# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The README's program runs as it stands, its links and pictures exist, and the API page has public names only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peft_linear import __all__ as public
from peft_linear import __version__


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def program() -> str:
    return re.search(r"<!-- run by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL).group(1)


def test_the_program_of_the_readme_has_at_most_fifteen_lines():
    assert len([line for line in program().splitlines() if line.strip()]) <= 15


def test_the_program_of_the_readme_runs_as_it_stands(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(program(), "README.md", "exec"), names)
    assert len(names["recommendation"].modules) == 8
    adapted = {name for name, module in names["model"].named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"base_model.model.{name}" for name in names["recommendation"].modules}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_api_page_has_the_public_names_only():
    api = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    objects = set(re.findall(r"^::: (\S+)$", api, re.MULTILINE))
    in_prose = set(re.findall(r"^### `(peft_linear\.\w+)`$", api, re.MULTILINE))
    assert objects <= {f"peft_linear.{name}" for name in public}
    assert objects | in_prose >= {f"peft_linear.{name}" for name in public}


def test_there_is_one_version():
    assert f'version="{__version__}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
