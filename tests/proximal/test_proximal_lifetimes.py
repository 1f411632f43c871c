# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which parameters the term changes, and when: copied, switched, merged, frozen and collected adapters."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model

from peft_linear.errors import PeftLinearError
from peft_linear.proximal import proximal_distance, proximal_firing_rate
from peft_linear.proximal.updates import find_updates
from peft_linear.tuners.proximal_lora.state import find_adapters, live_records
from tests.helpers import small_models
from tests.helpers.proximal_at_rest import SGD, config, displaced, mlp, proximal, step_at_rest
from tests.helpers.reference_proximal import lora_parameters


def test_injected_adapters_are_pulled_without_a_tuner():
    model = inject_adapter_in_model(config(), mlp())
    gc.collect()
    before = proximal_distance(displaced(model))
    step_at_rest(model)
    assert proximal_distance(model) == pytest.approx(before / 2)


def test_adapters_added_by_transformers_are_pulled():
    model = small_models.bert()
    model.add_adapter(config(target_modules=["query"]))
    before = proximal_distance(displaced(model))
    step_at_rest(model)
    assert proximal_distance(model) == pytest.approx(before / 2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_pulled_toward_the_same_anchor(how):
    model = displaced(proximal())
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    before = proximal_distance(model)
    assert proximal_distance(other) == before
    step_at_rest(other)
    assert proximal_distance(other) == pytest.approx(before / 2)
    assert proximal_distance(model) == before


def test_a_collected_model_leaves_no_record_and_no_cycle():
    gc.collect()
    alive = len(live_records)
    model = proximal()
    parameter = weakref.ref(next(iter(lora_parameters(model).values())))
    step_at_rest(model)
    assert len(live_records) == alive + 1
    del model
    assert parameter() is None  # by reference counts alone: no cycle holds the weights
    assert len(live_records) == alive
    step_at_rest(proximal())


def test_only_factors_of_the_active_adapter_change():
    model = proximal(modules_to_save=["0"], target_modules=["2"], bias="all")
    model.add_adapter("other", config(target_modules=["2"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SGD(model.parameters(), lr=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"base_model.model.2.lora_{letter}.default.weight" for letter in "AB"}


def test_adapters_can_be_switched_and_deleted_during_training():
    model = proximal()
    model.add_adapter("other", config(lam=6.0))
    optimizer = SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.5)
    for p in optimizer.param_groups[0]["params"]:
        p.data.add_(0.5)

    def step():
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()

    before = proximal_distance(model, "default")
    step()
    assert proximal_distance(model, "default") == pytest.approx(before / 2)
    assert proximal_distance(model, "other") == pytest.approx(before)
    model.set_adapter("other")
    step()
    assert proximal_distance(model, "default") == pytest.approx(before / 2)
    assert proximal_distance(model, "other") == pytest.approx(before / 4)
    model.delete_adapter("default")
    step()
    assert proximal_distance(model) == pytest.approx(before / 16)
    with pytest.raises(PeftLinearError, match=r"no ProximalLoRA adapter 'default'; it has \['other'\]"):
        proximal_distance(model, "default")
    assert proximal_firing_rate(model, "other") == 1.0


def test_a_disabled_or_merged_adapter_does_not_change():
    model = displaced(proximal())
    before = proximal_distance(model)
    parameters = list(lora_parameters(model).values())
    optimizer = SGD(parameters, lr=0.5)
    with model.disable_adapter():
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert proximal_distance(model) == before
    model.merge_adapter()
    optimizer.zero_grad()
    optimizer.step()
    assert proximal_distance(model) == before
    model.unmerge_adapter()
    step_at_rest(model)
    assert proximal_distance(model) == pytest.approx(before / 2)


def test_a_frozen_adapter_in_an_optimizer_is_ignored(tmp_path):
    proximal().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    (tmp_path / "proximal_anchor.safetensors").write_bytes(b"damaged")
    for p in loaded.parameters():
        p.grad = torch.zeros_like(p)
    SGD(loaded.parameters(), lr=0.1).step()
    assert not find_adapters(loaded)[0].stepped


def test_merge_and_unload_drops_the_record():
    gc.collect()
    alive = len(live_records)
    merged = displaced(proximal()).merge_and_unload()
    assert len(live_records) == alive
    assert not any("proximal" in name for name in vars(merged))


def test_other_models_and_lambda_zero_have_no_updates():
    model = proximal(lam=0.0)
    assert list(find_updates(SGD(lora_parameters(model).values(), lr=0.1))) == []
    assert list(find_updates(SGD(mlp().parameters(), lr=0.1))) == []
    assert live_records


def test_lambda_can_be_changed_between_steps_and_is_validated():
    model = displaced(proximal(lam=0.0))
    before = proximal_distance(model)
    step_at_rest(model)
    assert proximal_distance(model) == before
    model.peft_config["default"].proximal_lambda = 6.0
    step_at_rest(model)
    assert proximal_distance(model) == pytest.approx(before / 4)
    model.peft_config["default"].proximal_lambda = -1.0
    with pytest.raises(PeftLinearError, match="proximal_lambda must be a finite number >= 0"):
        step_at_rest(model)
