# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The README's program runs as it stands, its links and pictures exist, and the API page has public names only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import Dataset

from peft_linear import __all__ as public
from peft_linear import __version__
from tests.helpers.language import chat_tokenizer, language_model, rows_in, words


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def program() -> str:
    return re.search(r"<!-- run by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL).group(1)


def test_the_program_of_the_readme_has_at_most_twenty_lines():
    assert len([line for line in program().splitlines() if line.strip()]) <= 20


@pytest.mark.filterwarnings("ignore:the run ends at a KL")
def test_the_program_of_the_readme_runs_as_it_stands(monkeypatch, tmp_path):
    """With a small model and its data in place of the reader's, and three steps."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")
    original = trl.SFTConfig.__init__
    quick = {"max_steps": 3, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    monkeypatch.setattr(trl.SFTConfig, "__init__", lambda self, *args, **more: original(self, *args, **more | quick))
    monkeypatch.chdir(tmp_path)
    names = {
        "model": language_model(),
        "tokenizer": chat_tokenizer(),
        "dataset": Dataset.from_list(rows_in("messages", 32)),
        "texts": [words(i, 8) for i in range(6)],
    }
    exec(compile(program(), "README.md", "exec"), names)
    assert names["plan"].learning_rate > 0
    logged = [entry for entry in names["trainer"].state.log_history if "kl_to_base" in entry]
    assert len(logged) == 3
    assert names["trainer"].model.peft_config["default"].proximal_space == "function"


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
