# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A ProximalLoRA adapter exported as plain LoRA, read by a process that does not import this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_linear.errors import FileError
from peft_linear.tuners.proximal_lora import ProximalLoraConfig, export_lora
from tests.helpers import small_models


IDS = torch.arange(1, 13).reshape(2, 6)
VARIANTS = {
    "plain": {},
    "patterns": {"rank_pattern": {"query": 5, "layer.1.output.dense": 1}, "alpha_pattern": {"value": 32}},
    "rslora": {"use_rslora": True, "rank_pattern": {"query": 5}, "alpha_pattern": {"value": 3}},
    "rslora-plain": {"use_rslora": True},
    "dora": {"use_dora": True, "rank_pattern": {"query": 5}},
    "embedding": {"target_modules": ["word_embeddings", "query"], "rank_pattern": {"query": 4}},
    "head": {"task_type": "SEQ_CLS", "bias": "all", "alpha_pattern": {"value": 1}},
    "alpha-zero": {"lora_alpha": 0, "alpha_pattern": {"value": 2}},
}


def base():
    torch.manual_seed(0)
    return small_models.bert().float().eval()


def save(folder, cls=ProximalLoraConfig, **kwargs):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value", "dense"]} | kwargs
    model = base()
    torch.manual_seed(1)
    model = get_peft_model(model, cls(**options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
                assert "lora" in name or "classifier" in name or "bias" in name
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_stock_peft_reads_every_variant_with_warnings_as_errors(tmp_path):
    base().save_pretrained(tmp_path / "base")
    for name, variant in VARIANTS.items():
        torch.save(save(tmp_path / name, **variant), tmp_path / f"{name}.pt")
        export_lora(tmp_path / name, tmp_path / f"{name}-out")
    # one deprecation inside transformers is ignored: peft calls the deprecated function for LoRA as well
    code = f"""
import sys, warnings
from pathlib import Path
import torch, peft
from transformers import BertForSequenceClassification
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
root = Path({str(tmp_path)!r})
for name in {list(VARIANTS)!r}:
    base = BertForSequenceClassification.from_pretrained(root / "base")
    model = peft.PeftModel.from_pretrained(base, root / f"{{name}}-out").eval()
    assert type(model.peft_config["default"]) is peft.LoraConfig
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits
    expected = torch.load(root / f"{{name}}.pt", weights_only=True)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6, msg=name)
assert not [name for name in sys.modules if name.startswith("peft_linear")]
print("fine")
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert result.stdout.strip().endswith("fine"), result.stderr


def test_without_patterns_the_tensors_are_the_same_bits(tmp_path):
    save(tmp_path / "in")
    assert export_lora(tmp_path / "in", tmp_path / "out") == tmp_path / "out"
    before = load_file(tmp_path / "in" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not [key for key in config if key.startswith("proximal")]
    assert set(config) <= set(LoraConfig().to_dict())


@pytest.mark.parametrize("name", ["patterns", "rslora", "alpha-zero"])
def test_one_alpha_over_r_holds_for_every_module(tmp_path, name):
    """What a consumer computes from `lora_alpha / r` and the tensors, without patterns."""
    save(tmp_path / "in", **VARIANTS[name])
    export_lora(tmp_path / "in", tmp_path / "out")
    model = PeftModel.from_pretrained(base(), tmp_path / "in")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    for key, a in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        assert a.shape[0] == config["r"]
        layer = model.get_submodule(key.removesuffix(".lora_A.weight"))
        product = scale * tensors[key.replace("lora_A", "lora_B")] @ a
        torch.testing.assert_close(product, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-7)


def test_parameters_and_grouped_convolutions_keep_their_patterns(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 6, 3, groups=2))
    config = ProximalLoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"0": 4})
    model = get_peft_model(net, config)
    model.save_pretrained(tmp_path / "in")
    export_lora(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"] == {"0": 4}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 6, 3, groups=2))
    loaded = PeftModel.from_pretrained(net, tmp_path / "out")
    x = torch.randn(2, 4, 8)
    assert torch.equal(loaded(x), model.eval()(x))


def damage(folder, what):
    config = folder / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    if what == "no config":
        config.unlink()
    elif what == "nested":
        (folder / "sub").mkdir()
        config.rename(folder / "sub" / "adapter_config.json")
    elif what == "bad json":
        config.write_text("{")
    elif what == "list":
        config.write_text("[]")
    elif what == "no weights":
        weights.unlink()
    elif what == "pickle":
        weights.rename(folder / "adapter_model.bin")
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "is not an adapter: it has no adapter_config.json$"),
        ("nested", r"there are adapters in its subfolders \['sub'\]"),
        ("bad json", "is not valid JSON"),
        ("list", "contains an adapter of type None"),
        ("no weights", "has no adapter_model.safetensors$"),
        ("pickle", "is a pickle, which is not read"),
        ("truncated", "cannot be read"),
    ],
)
def test_an_incomplete_adapter_is_refused_and_nothing_written(tmp_path, what, message):
    save(tmp_path / "in")
    damage(tmp_path / "in", what)
    with pytest.raises(FileError, match=message):
        export_lora(tmp_path / "in", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in"]


def save_vera(folder):
    get_peft_model(base(), VeraConfig(r=2, target_modules=["query"])).save_pretrained(folder)


def save_vera_weights_as_ours(folder):
    save(folder)
    save_vera(folder / "vera")
    (folder / "vera" / "adapter_model.safetensors").replace(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (partial(save, cls=LoraConfig), "contains an adapter of type 'LORA', not 'PROXIMAL_LORA': it needs no export"),
        (save_vera, "of type 'VERA'.*only ProximalLoRA adapters can be exported"),
        (save_vera_weights_as_ours, "contains no LoRA factors"),
        (lambda folder: None, "is not a folder; pass the local folder"),
    ],
    ids=["lora", "vera", "other weights", "nothing"],
)
def test_what_is_not_a_proximal_lora_adapter_is_refused(tmp_path, write, message):
    write(tmp_path / "in")
    with pytest.raises(FileError, match=message):
        export_lora(tmp_path / "in", tmp_path / "out")


def test_the_adapters_own_folder_is_refused_as_output(tmp_path):
    save(tmp_path / "in")
    with pytest.raises(FileError, match="is the adapter's own"):
        export_lora(tmp_path / "in", tmp_path / "in", overwrite=True)


@pytest.fixture
def occupied(tmp_path):
    """An adapter in `in` and a folder `out` that is not empty."""
    save(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    return tmp_path


def test_a_folder_that_is_not_empty_is_replaced_only_with_overwrite(occupied):
    with pytest.raises(FileError, match="not empty"):
        export_lora(occupied / "in", occupied / "out")
    assert os.listdir(occupied / "out") == ["mine"]
    export_lora(occupied / "in", occupied / "out", overwrite=True)
    assert "mine" not in os.listdir(occupied / "out")


def test_an_export_that_fails_leaves_the_output_folder_as_it_was(occupied, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("peft_linear.tuners.proximal_lora.export.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            export_lora(occupied / "in", occupied / "out", overwrite=True)
    assert os.listdir(occupied / "out") == ["mine"] and sorted(os.listdir(occupied)) == ["in", "out"]
    export_lora(occupied / "in", occupied / "out", overwrite=True)
    assert "mine" not in os.listdir(occupied / "out")
