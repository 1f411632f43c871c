# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Where peft tests for the type LORA, our type is treated as LoRA is."""

from __future__ import annotations

import json
from contextlib import nullcontext

import peft
import pytest
import torch
from packaging import version
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

from peft_linear.proximal import proximal_distance
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from peft_linear.tuners.proximal_lora.anchors import ANCHOR_NAME
from tests.helpers.proximal_bert import OPTIONS, base, logits, proximal, train, trained


SHARDS_WARN = version.parse(peft.__version__) >= version.parse("0.21")


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_schemes_that_change_base_weights_convert_to_plain_lora(tmp_path, scheme):
    model = base()
    expected_base = logits(model)
    torch.manual_seed(1)
    config = ProximalLoraConfig(proximal_lambda=1.0, init_lora_weights=scheme, **OPTIONS | {"task_type": None})
    model = get_peft_model(model, config)
    torch.testing.assert_close(logits(model), expected_base, rtol=1e-4, atol=1e-5)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "init")
    model.peft_config["default"].init_lora_weights = scheme
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    assert not (tmp_path / "out" / ANCHOR_NAME).exists()  # twice the rank: it would not fit
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    converted = PeftModel.from_pretrained(base(), tmp_path / "out")
    torch.testing.assert_close(logits(converted), expected, rtol=1e-4, atol=1e-5)


def test_adapters_can_be_hotswapped(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    trained(modules_to_save=None, task_type=None).save_pretrained(tmp_path / "one")
    second = trained(seed=5, modules_to_save=None, task_type=None)
    second.save_pretrained(tmp_path / "two")
    model = PeftModel.from_pretrained(base(), tmp_path / "one")
    hotswap_adapter(model, tmp_path / "two", adapter_name="default")
    torch.testing.assert_close(logits(model), logits(second))


def test_mixed_models_accept_the_type_and_the_term_acts():
    from peft import LoHaConfig

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    options = {"target_modules": ["0"], "proximal_lambda": 2.0, "proximal_selective": False}
    mixed = get_peft_model(model, ProximalLoraConfig(**options), "ours", mixed=True)
    assert isinstance(mixed, PeftMixedModel)
    mixed.add_adapter("theirs", LoHaConfig(target_modules=["1"]))
    mixed.set_adapter(["ours", "theirs"])
    factors = [p for n, p in mixed.named_parameters() if "lora_" in n]
    for p in factors:
        p.data.add_(0.5)
        p.grad = torch.zeros_like(p)
    before = proximal_distance(mixed, "ours")
    torch.optim.SGD(factors, lr=0.5).step()
    assert proximal_distance(mixed, "ours") == pytest.approx(before / 2)


def test_projections_of_mamba_are_refused_as_for_lora():
    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=2))
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        get_peft_model(model, ProximalLoraConfig(target_modules=["out_proj"]))
    get_peft_model(model, ProximalLoraConfig(target_modules=["in_proj"]))


def test_expert_targets_are_converted_as_loras_are():
    config = MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    targets = {"r": 2, "target_modules": ["q_proj", "w1", "w2", "w3"]}
    shapes = []
    for cls in (LoraConfig, ProximalLoraConfig):
        model = get_peft_model(MixtralForCausalLM(config), cls(**targets))
        shapes.append({name: p.shape for name, p in model.named_parameters() if p.requires_grad})
        assert model.peft_config["default"].peft_type == cls().peft_type
    assert shapes[0] == shapes[1]
    assert any("experts" in name for name in shapes[1])


def test_model_cards_carry_the_lora_tag(tmp_path):
    from huggingface_hub import ModelCard

    trained().save_pretrained(tmp_path)
    assert "lora" in ModelCard.load(tmp_path / "README.md").data.tags


def test_saving_shards_warns_as_for_lora_and_saves(tmp_path):
    model = proximal(task_type=None)
    layer = next(m for m in model.modules() if isinstance(m, Linear))
    layer.lora_A["default"].weight = nn.Parameter(torch.zeros(0))
    with pytest.warns(UserWarning, match="invalid shape") if SHARDS_WARN else nullcontext():
        model.save_pretrained(tmp_path)
    assert (tmp_path / ANCHOR_NAME).exists()
