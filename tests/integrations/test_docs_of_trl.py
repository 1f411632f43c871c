# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The programs on the pages about TRL run as they stand, on a tiny model and for two steps."""

import re
from pathlib import Path

import pytest
from datasets import Dataset

from peft_linear import PeftLinearError, Recommendation
from tests.helpers.language import chat_tokenizer, language_model, rows_in, words


trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")

ROOT = Path(__file__).parents[2]
MARK = "<!-- run by tests/integrations/test_docs_of_trl.py -->\n"
PAGES = ("use_your_sft_data", "use_trl", "use_the_trainer_callback", "fine_tune_without_forgetting")
QUICK = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def programs():
    for name in PAGES:
        text = (ROOT / "docs" / "how-to" / f"{name}.md").read_text(encoding="utf-8")
        for number, code in enumerate(re.findall(rf"{re.escape(MARK)}```python\n(.*?)```", text, re.DOTALL)):
            yield pytest.param(code, id=f"{name}-{number}")


def preferences(count=8):
    return Dataset.from_list(
        [{"prompt": words(i), "chosen": " " + words(i + 3), "rejected": " " + words(2 * i + 1)} for i in range(count)]
    )


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Two steps in a temporary folder, whatever a page plans."""
    monkeypatch.chdir(tmp_path)
    for config in (trl.SFTConfig, trl.DPOConfig):
        original = config.__init__

        def init(self, *args, _original=original, **kwargs):
            _original(self, *args, **{**kwargs, **QUICK})

        monkeypatch.setattr(config, "__init__", init)


@pytest.mark.parametrize("code", list(programs()))
@pytest.mark.parametrize("kind", ["messages", "turns"])
@pytest.mark.filterwarnings("ignore:the run ends at a KL")
def test_the_program_runs(code, kind, quick):
    names = {
        "model": language_model(),
        "tokenizer": chat_tokenizer(),
        "dataset": Dataset.from_list(rows_in(kind)),
        "preferences": preferences(),
        "texts": [words(i, 8) for i in range(6)],
    }
    exec(compile(code, "page", "exec"), names)
    if "rec" in names:
        assert isinstance(names["rec"], Recommendation) and names["rec"].modules


def test_there_are_programs_on_every_page():
    found = [param.id.rpartition("-")[0] for param in programs()]
    assert set(found) == set(PAGES) and len(found) >= 8
    blocks = sum((ROOT / "docs" / "how-to" / f"{name}.md").read_text().count("```python") for name in PAGES[:2])
    assert blocks == sum(name in PAGES[:2] for name in found), "a program of the pages about TRL is not run"


def test_the_errors_that_the_page_lists_are_raised():
    page = (ROOT / "docs" / "how-to" / "use_your_sft_data.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([^|`]+?) \| ", page[page.index("## Errors") :], re.MULTILINE)
    source = "".join(path.read_text() for path in (ROOT / "peft_linear" / "integrations").glob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    messages = [each for each in listed if each not in ("message", "---")]
    assert len(messages) == 7
    for message in messages:
        parts = re.split(r" … |\d+", message)
        assert all(part.strip() in source for part in parts), message
    assert issubclass(PeftLinearError, ValueError)
