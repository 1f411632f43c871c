# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The adapter type in peft and transformers: what users do with LoRA."""

from __future__ import annotations

import subprocess
import sys

import peft
import pytest
import torch
from packaging import version
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear
from safetensors.torch import load_file

from peft_linear.proximal import proximal_distance
from peft_linear.tuners.proximal_lora import ProximalLoraConfig, ProximalLoraModel
from peft_linear.tuners.proximal_lora.anchors import ANCHOR_NAME
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.proximal_bert import OPTIONS, base, logits, proximal, train, trained


NEW_PEFT = pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse("0.21"), reason="peft did not save these biases of LoRA either"
)


def test_layers_and_tensor_names_are_loras():
    model = proximal()
    assert type(model.base_model) is ProximalLoraModel
    layers = [m for m in model.modules() if type(m) is Linear]
    assert len(layers) == 4
    plain = get_peft_model(base(), LoraConfig(**OPTIONS))
    assert set(model.state_dict()) == set(plain.state_dict())


def test_lambda_zero_trains_bert_as_lora_bit_for_bit():
    model = base()
    torch.manual_seed(1)
    plain = train(get_peft_model(model, LoraConfig(**OPTIONS)))
    other = trained(lam=0.0)
    for (name, a), b in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_saved_files_are_those_of_lora_and_the_anchor(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert all(".lora_A.weight" in n or ".lora_B.weight" in n or "classifier" in n for n in names)
    anchor = load_file(tmp_path / ANCHOR_NAME)
    assert len(anchor) == 4 and all(name.endswith(".lora_A") for name in anchor)  # B0 = 0 is not stored
    assert "lora" in (tmp_path / "README.md").read_text()
    train(proximal(lam=0.0)).save_pretrained(tmp_path)
    assert not (tmp_path / ANCHOR_NAME).exists()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_gives_the_same_logits_and_the_same_anchor(tmp_path, low_cpu_mem_usage):
    model = trained()
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(
            base(), tmp_path, is_trainable=trainable, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(logits(loaded), logits(model))
        assert isinstance(loaded.peft_config["default"], ProximalLoraConfig)
        assert proximal_distance(loaded) == proximal_distance(model) > 0
    train(loaded, steps=1)
    assert proximal_distance(loaded) != proximal_distance(model)


def test_a_new_process_can_load_the_adapter_only_with_the_plugin(tmp_path):
    model = trained(modules_to_save=None)
    base().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
import torch, peft_linear
from peft import AutoPeftModelForSequenceClassification
model = AutoPeftModelForSequenceClassification.from_pretrained({str(tmp_path / "adapter")!r}, num_labels=3).eval()
batch = {{"input_ids": torch.arange(1, 13).reshape(2, 6)}}
assert torch.equal(model(**batch).logits, torch.load({str(tmp_path / "logits.pt")!r}))
print(type(model.peft_config["default"]).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "ProximalLoraConfig", result.stderr
    without = code.replace(", peft_linear", "")
    result = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, timeout=300)
    assert "PROXIMAL_LORA" in result.stderr


def test_auto_model_classes_load_the_adapter(tmp_path):
    model = trained()
    base().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(logits(loaded), logits(model))


def test_merging_changes_nothing_and_unloading_gives_the_base_back():
    model = trained(modules_to_save=None, task_type=None)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    unloaded = trained(task_type=None).unload()
    assert torch.equal(logits(unloaded), logits(base()))


def test_several_adapters_are_saved_and_loaded_separately(tmp_path):
    model = trained()
    model.add_adapter("second", ProximalLoraConfig(proximal_lambda=1.0, proximal_space="delta", **OPTIONS))
    model.set_adapter("second")
    train(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / ANCHOR_NAME).exists() and (tmp_path / "second" / ANCHOR_NAME).exists()
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    loaded.load_adapter(tmp_path / "second", "second", is_trainable=True)
    for name in ("default", "second"):
        assert proximal_distance(loaded, name) == proximal_distance(model, name) > 0
    assert proximal_distance(model, "default") != proximal_distance(model, "second")


def test_a_plain_lora_adapter_beside_ours_is_refused_by_peft():
    with pytest.raises(ValueError, match="peft types"):
        proximal().add_adapter("plain", LoraConfig(**OPTIONS))


def test_weighted_adapters_are_anchored_at_a_zero_product():
    model = trained(task_type=None)
    model.add_adapter("second", ProximalLoraConfig(proximal_lambda=1.0, **OPTIONS | {"task_type": None}))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    anchors = find_adapters(model, "both")[0].anchors()
    assert all(anchor.b is None for anchor in anchors.values())
    model.set_adapter("both")
    squares = [layer.get_delta_weight("both").square().sum() for layer in model.modules() if isinstance(layer, Linear)]
    assert proximal_distance(model, "both", space="delta") == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)


def test_injected_adapters_can_be_saved_and_loaded():
    config = ProximalLoraConfig(proximal_lambda=2.0, **OPTIONS | {"task_type": None})
    model = train(inject_adapter_in_model(config, base()))
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(config, base(), state_dict=state)
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other), logits(model))
    assert proximal_distance(model) > 0


def test_transformers_adds_saves_and_loads_the_adapter(tmp_path):
    model = base()
    model.add_adapter(ProximalLoraConfig(proximal_lambda=2.0, **OPTIONS | {"task_type": None}))
    train(model)
    model.save_pretrained(tmp_path / "theirs")
    other = base()
    with pytest.warns(UserWarning, match=f"has no {ANCHOR_NAME}"):
        other.load_adapter(str(tmp_path / "theirs"), is_trainable=True)
    assert torch.equal(logits(other), logits(model))
    b = [p for n, p in other.named_parameters() if "lora_B" in n]
    expected = float(sum(p.detach().double().square().sum() for p in b)) ** 0.5
    assert proximal_distance(other) == pytest.approx(expected)  # A where it is, B toward zero

    ours = trained(task_type=None)
    ours.save_pretrained(tmp_path / "ours")
    third = base()
    third.load_adapter(str(tmp_path / "ours"), is_trainable=True)
    assert proximal_distance(third) == proximal_distance(ours)
    fourth = base()
    fourth.load_adapter(str(tmp_path / "ours"))
    assert torch.equal(logits(fourth), logits(ours))
    assert proximal_distance(fourth) == proximal_distance(ours)


@pytest.mark.parametrize(
    "variant",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"layer.0.attention.self.query": 3}, "alpha_pattern": {"value": 7}},
        {"target_modules": "all-linear"},
        {"target_modules": ["word_embeddings", "query"]},
        {"trainable_token_indices": {"word_embeddings": [1, 2]}},
        {"bias": "all"},
        pytest.param({"bias": "lora_only"}, marks=NEW_PEFT),
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.1},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_options_of_lora_train_save_and_load(tmp_path, variant):
    model = trained(**variant)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert proximal_distance(loaded, space="factors") == pytest.approx(proximal_distance(model, space="factors"))
