# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The comparison with peft's own suite: what counts as a difference, and that the plugin swaps the configuration."""

from __future__ import annotations

import json

import run_peft_suite as suite


def lines(*records):
    return "\n".join(json.dumps({"test": test, "outcome": outcome, "reason": ""}) for test, outcome in records)


def test_a_test_is_as_good_as_its_worst_phase_and_has_the_name_it_has_for_lora():
    outcomes = suite.read_outcomes(
        lines(
            ("a[LoraConfig]", "passed"),
            ("a[LoraConfig]", "failed"),
            ("a[LoraConfig]", "passed"),
            ("b[ProximalLoraConfig-x]", "passed"),
            ("c_0_ProximalLora_LoHa", "passed"),
            ("c", "passed"),
            ("c", "skipped"),
            ("c", "passed"),
        )
    )
    assert outcomes == {
        "a[LoraConfig]": "failed",
        "b[LoraConfig-x]": "passed",
        "c_0_Lora_LoHa": "passed",
        "c": "skipped",
    }


def test_whatever_lora_passes_must_pass():
    stock = {"same": "passed", "hub": "failed", "broken": "passed", "hidden": "passed", "lost": "passed"}
    ours = {"same": "passed", "hub": "failed", "broken": "failed", "hidden": "skipped", "more": "passed"}
    expected = {"broken": "failed", "hidden": "skipped", "lost": "did not run"}
    assert suite.differences(stock, ours) == expected
    assert suite.verdict({suite.STOCK: stock, "ours": ours}, known={}) == 1
    assert suite.verdict({suite.STOCK: stock, "ours": ours}, known=dict.fromkeys(("broken", "hidden"), "why")) == 1
    assert suite.verdict({suite.STOCK: stock, "ours": ours}, known=dict.fromkeys(expected, "why")) == 0
    assert suite.verdict({suite.STOCK: stock, "ours": stock}, known={}) == 0
    text = suite.summary({suite.STOCK: stock, "ours": ours}, known={"broken": "a name"})
    assert "| LoRA | 4 | 1 | 0 |" in text and "| ours | 2 | 2 | 1 |" in text
    assert "Passed by LoRA and not by ours: 3" in text
    assert "`broken` (failed; known: a name)" in text and "`lost` (did not run; NEW, see the log)" in text


def test_nothing_compared_is_no_success():
    assert suite.verdict({suite.STOCK: {}, "ours": {}}, known={}) == 2
    assert suite.verdict({suite.STOCK: {"hub": "failed"}, "ours": {"hub": "failed"}}, known={}) == 2


def test_the_known_differences_have_reasons():
    known = json.loads((suite.HERE / "known_differences.json").read_text(encoding="utf-8"))
    assert known and all(name.startswith("tests/test_") and "::" in name and reason for name, reason in known.items())


SUITE = """
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from .helper import NAME

@pytest.mark.parametrize("config_class", [LoraConfig, IA3Config])
def test_of_every_method(config_class):
    assert config_class is LoraConfig

def test_trains():
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert model.peft_config["default"].to_dict().get("proximal_lambda", 0.5) == 0.5

def test_literal_name():
    assert LoraConfig.__name__ == NAME
"""


def test_the_plugin_runs_a_suite_with_either_configuration(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "helper.py").write_text("NAME = 'LoraConfig'\n", encoding="utf-8")
    (tmp_path / "tests" / "test_fake.py").write_text(SUITE, encoding="utf-8")
    (tmp_path / "tests" / "test_other.py").write_text("def test(): pass\n", encoding="utf-8")
    (tmp_path / "pytest.ini").write_text(suite.INI, encoding="utf-8")
    files = suite.files_about_lora(tmp_path, hub=False)
    assert files == ["test_fake.py"]
    stock = suite.run(tmp_path, files, None, workers=1)
    ours = suite.run(tmp_path, files, 0.5, workers=1)
    names = ["test_of_every_method[LoraConfig]", "test_trains", "test_literal_name"]
    assert stock == {f"tests/test_fake.py::{name}": "passed" for name in names}
    assert ours == stock | {"tests/test_fake.py::test_literal_name": "failed"}
