# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The adapter type in peft and transformers: everything a LoRA user does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import peft
import pytest
import small_models
import torch
from packaging import version
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

import peft_linear  # noqa: F401
from peft_linear.errors import FileError
from peft_linear.training.proximal import proximal_distance
from peft_linear.tuners.proximal_lora import ProximalLoraConfig, ProximalLoraModel
from peft_linear.tuners.proximal_lora.anchors import ANCHOR_NAME
from peft_linear.tuners.proximal_lora.state import find_adapters


NEW_PEFT = pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse("0.21"), reason="peft did not save these biases of LoRA either"
)
OPTIONS = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
BATCH = {"input_ids": torch.arange(1, 13).reshape(2, 6), "labels": torch.tensor([0, 2])}


def base(seed=0):
    torch.manual_seed(seed)
    return small_models.bert().float().eval()


def proximal(lam=2.0, seed=1, **kwargs):
    model = base()
    torch.manual_seed(seed)
    return get_peft_model(model, ProximalLoraConfig(proximal_lambda=lam, **OPTIONS | kwargs))


def train(model, steps=3):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def trained(**kwargs):
    return train(proximal(**kwargs))


def test_layers_are_loras_own():
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


def test_saved_files_are_loras_and_the_anchor_beside_them(tmp_path):
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


def test_fresh_processes_load_with_the_plugin_and_not_without(tmp_path):
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


def test_auto_model_classes(tmp_path):
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


def test_several_adapters_save_and_load_apart(tmp_path):
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
    with pytest.raises(ValueError, match="peft types"):
        model.add_adapter("plain", LoraConfig(**OPTIONS))


def test_weighted_adapters_are_anchored_at_a_zero_product():
    model = trained(task_type=None)
    model.add_adapter("second", ProximalLoraConfig(proximal_lambda=1.0, **OPTIONS | {"task_type": None}))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    anchors = find_adapters(model, "both")[0].anchors()
    assert all(anchor.b is None for anchor in anchors.values())
    model.set_adapter("both")
    squares = [layer.get_delta_weight("both").square().sum() for layer in model.modules() if isinstance(layer, Linear)]
    assert proximal_distance(model, "both", space="delta") == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)


def test_injected_adapters_round_trip():
    config = ProximalLoraConfig(proximal_lambda=2.0, **OPTIONS | {"task_type": None})
    model = train(inject_adapter_in_model(config, base()))
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(config, base(), state_dict=state)
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other), logits(model))
    assert proximal_distance(model) > 0


def test_transformers_integration(tmp_path):
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
def test_loras_options_train_save_and_load(tmp_path, variant):
    model = trained(**variant)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert proximal_distance(loaded, space="factors") == pytest.approx(proximal_distance(model, space="factors"))


# --- anchors on disk ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    trained().save_pretrained(tmp_path)
    return tmp_path


def test_without_its_anchor_an_adapter_still_trains_with_a_warning(saved):
    (saved / ANCHOR_NAME).unlink()
    with pytest.warns(UserWarning, match=f"has no {ANCHOR_NAME}"):
        loaded = PeftModel.from_pretrained(base(), saved, is_trainable=True)
    assert all(anchor.b is None for anchor in find_adapters(loaded)[0].anchors().values())
    parameters = {n: p for n, p in loaded.named_parameters() if "lora_A" in n}
    kept = [p.detach().clone() for p in parameters.values()]
    for a, anchor in zip(kept, find_adapters(loaded)[0].anchors().values(), strict=True):
        assert torch.equal(a, anchor.a)
    loaded.save_pretrained(saved / "again")
    assert not (saved / "again" / ANCHOR_NAME).exists()  # a guess is not passed on as knowledge
    train(loaded, steps=1)
    loaded.save_pretrained(saved / "again")  # but what was trained with is, so that a resumed run goes on
    assert (saved / "again" / ANCHOR_NAME).exists()


def test_loading_an_earlier_state_of_the_run_keeps_its_anchor(tmp_path):
    """As the Trainer does with its best checkpoint, which may be deleted afterwards."""
    for lam in (2.0, 0.0):
        model = trained(lam=lam)
        early = proximal_distance(model)
        model.save_pretrained(tmp_path)
        train(model)
        assert proximal_distance(model) != early
        model.load_adapter(tmp_path, "default")
        shutil.rmtree(tmp_path)
        assert proximal_distance(model) == early


def test_the_weight_distance_needs_no_anchor_file(tmp_path, recwarn):
    model = trained(proximal_space="delta", proximal_selective=False)
    model.save_pretrained(tmp_path)
    (tmp_path / ANCHOR_NAME).unlink()
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert proximal_distance(loaded) == proximal_distance(model)
    assert not [w for w in recwarn if ANCHOR_NAME in str(w.message)]


def test_a_damaged_or_foreign_anchor_is_refused_for_training_only(saved):
    good = load_file(saved / ANCHOR_NAME)
    (saved / ANCHOR_NAME).write_bytes(b"not safetensors")
    with pytest.raises(FileError, match="cannot be read"):
        PeftModel.from_pretrained(base(), saved, is_trainable=True)
    PeftModel.from_pretrained(base(), saved)
    save_file(good, saved / ANCHOR_NAME)
    with pytest.raises(FileError, match="is not an anchor file of format 1"):
        PeftModel.from_pretrained(base(), saved, is_trainable=True)


@pytest.mark.parametrize("damage", ["module", "shape"])
def test_the_anchor_of_another_adapter_is_refused(saved, tmp_path, damage):
    kwargs = {"target_modules": ["query"]} if damage == "module" else {"r": 3}
    trained(**kwargs).save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / ANCHOR_NAME, saved / ANCHOR_NAME)
    with pytest.raises(FileError, match="does not belong to the adapter beside it"):
        PeftModel.from_pretrained(base(), saved, is_trainable=True)


def test_a_write_that_fails_leaves_the_old_anchor(saved, monkeypatch):
    before = (saved / ANCHOR_NAME).read_bytes()
    model = trained()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("peft_linear.tuners.proximal_lora.anchors.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(saved)
    assert (saved / ANCHOR_NAME).read_bytes() == before
    assert not [name for name in os.listdir(saved) if name.endswith(".tmp")]


# --- where peft asks for LORA by name -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_mutated_base_weights_convert_to_plain_lora(tmp_path, scheme):
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


def test_hotswapping(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    trained(modules_to_save=None, task_type=None).save_pretrained(tmp_path / "one")
    second = trained(seed=5, modules_to_save=None, task_type=None)
    second.save_pretrained(tmp_path / "two")
    model = PeftModel.from_pretrained(base(), tmp_path / "one")
    hotswap_adapter(model, tmp_path / "two", adapter_name="default")
    torch.testing.assert_close(logits(model), logits(second))


def test_mixed_models_accept_the_type_and_pull_it():
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


def test_mambas_projections_stay_guarded():
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


def test_saving_shards_warns_as_for_lora_and_is_not_stopped(tmp_path):
    model = proximal(task_type=None)
    layer = next(m for m in model.modules() if isinstance(m, Linear))
    layer.lora_A["default"].weight = nn.Parameter(torch.zeros(0))
    with pytest.warns(UserWarning, match="invalid shape") if NEW_PEFT.args[0] is False else nullcontext():
        model.save_pretrained(tmp_path)
    assert (tmp_path / ANCHOR_NAME).exists()
