# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The demo of a language model runs from end to end, on a small model in place of SmolLM2."""

from __future__ import annotations

import json

import pytest

from tests.helpers.language import chat_tokenizer, language_model


pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")
from examples.language_demo import report
from examples.language_demo import run as demo


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_demo")
    language_model().save_pretrained(folder / "model")
    chat_tokenizer().save_pretrained(folder / "model")
    assert demo.main(["--quick", "--model", str(folder / "model"), "--output", str(folder / "out")]) == 0
    return folder / "out"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the run ends at a KL")
def test_it_writes_everything(output):
    for name in ("report.md", "plan.html", "results.json", "results.png", "adapter", "exported"):
        assert (output / name).exists(), name
    assert (output / "adapter" / "proximal_reference.safetensors").exists()
    assert json.loads((output / "exported" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    text = (output / "report.md").read_text(encoding="utf-8")
    assert "plan, LoRA" in text and "query and value, LoRA" in text and "Python code" in text


@pytest.mark.slow
def test_all_arms_are_measured_alike(output):
    arms = json.loads((output / "results.json").read_text(encoding="utf-8"))["arms"]
    assert [arm["name"] for arm in arms] == ["plan, at most 0.03 nats", "plan, LoRA", "query and value, LoRA"]
    assert len({arm["loss_before"] for arm in arms}) == 1
    assert arms[0]["parameters"] == arms[1]["parameters"]
    assert len(arms[0]["steered_kl"]) == 3 and not arms[1]["steered_kl"]
    for arm in arms:
        assert set(arm["forgotten"]) == {"English descriptions", "Python code"}
        assert len(arm["generations"]) == 4


def test_the_report_says_what_the_numbers_say():
    def arm(name, loss, kl, steered=()):
        answers = [{"prompt": "a | b", "wanted": "c", "answer": "d\ne"}]
        return report.Arm(name, 10, 3.0, loss, {"code": kl}, list(steered), 1.0, answers)

    class Plan:
        learning_rate = 2e-3
        rule = "all linear modules at rank 1"

    class Options:
        model, language, steps, batch_size, target_kl = "m", "fr", 60, 4, 0.03

    arms = [arm("ours", 2.1, 0.02, [0.5, 0.033]), arm("plain", 2.0, 0.2), arm("qv", 2.5, 0.1)]
    text = report.render(arms, Plan(), {"reloaded": "0"}, Options(), 100.0)
    assert "keeps 90% of what plain LoRA gains and forgets 10.0 times less on code" in text
    assert "ends at 0.0330, the budget is 0.03 (+10%)" in text
    assert "a \\| b" in text
