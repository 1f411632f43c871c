# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The example with TRL: the small model it makes, its adapters over λ, and the loading of a model by name."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from examples.trl import sft_without_forgetting as example


pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")


def rows(printed):
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {cell[0]: tuple(map(float, cell[1:])) for cell in cells[1:]}


def test_adapters_of_a_small_model_and_then_of_a_model_by_name(tmp_path, capsys):
    common = ["--steps", "4", "--batch-size", "4", "--limit", "12", "--learning-rate", "0.01", "--rank", "2"]
    first = [*common, "--strengths", "0", "1000", "--pretrain-steps", "2", "--output", str(tmp_path / "a")]
    assert example.main(first) == 0
    printed = rows(capsys.readouterr().out)
    assert list(printed) == ["before", "0 (LoRA)", "1000"]
    assert printed["0 (LoRA)"][2] > 2 * printed["1000"][2] > 0  # distance
    assert abs(printed["1000"][1] - printed["before"][1]) < abs(printed["0 (LoRA)"][1] - printed["before"][1])

    base = tmp_path / "a" / "base"
    ids = torch.arange(5, 15)[None]
    logits = []
    for folder in ("adapter", "lora"):
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = PeftModel.from_pretrained(model, tmp_path / "a" / "lambda_0" / folder).eval()
        with torch.no_grad():
            logits.append(adapted(input_ids=ids).logits)
    torch.testing.assert_close(*logits)

    second = [*common, "--strengths", "0", "--accumulation", "2", "--output", str(tmp_path / "b")]
    assert example.main([*second, "--model", str(base)]) == 0
    again = rows(capsys.readouterr().out)
    assert again["before"] == printed["before"]
    assert not (tmp_path / "b" / "base").exists()


def test_a_section_that_does_not_exist():
    with pytest.raises(SystemExit, match="no section 'poetry'; there are admin, devel"):
        example.main(["--section", "poetry"])
