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
"""What the term may touch, what it must refuse, and that plain LoRA is never trained unawares."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import small_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from reference_proximal import lora_parameters
from torch import nn

from peft_linear.errors import PeftLinearError
from peft_linear.training.proximal import (
    attach_proximal,
    proximal_distance,
    proximal_firing_rate,
    proximal_summary,
)
from peft_linear.training.proximal_find import find_steps
from peft_linear.tuners.proximal_lora import ProximalLoraConfig, reset_proximal_anchor
from peft_linear.tuners.proximal_lora.state import find_adapters, live_records


SGD = torch.optim.SGD


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def config(lam=2.0, **kwargs):
    options = {"target_modules": ["0", "2"], "r": 2, "lora_alpha": 4, "proximal_selective": False}
    return ProximalLoraConfig(proximal_lambda=lam, **options | kwargs)


def proximal(**kwargs):
    return get_peft_model(mlp(), config(**kwargs))


def backward(model):
    model(torch.ones(3, 5)).square().sum().backward()


def displaced(model, amount=0.5):
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.add_(amount)
    return model


def step_at_rest(model, rate=0.5):
    """A step with gradients of zero: whatever moves, the term has moved."""
    optimizer = SGD(lora_parameters(model).values(), lr=rate)
    for p in lora_parameters(model).values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return model


# --- reach --------------------------------------------------------------------------------------------------------


def test_injected_adapters_are_pulled_although_their_tuner_is_gone():
    model = inject_adapter_in_model(config(), mlp())
    gc.collect()
    before = proximal_distance(displaced(model))
    step_at_rest(model)
    assert proximal_distance(model) == pytest.approx(before / 2)


def test_transformers_own_adapters_are_pulled():
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


def test_a_collected_model_leaves_nothing_behind():
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


def test_only_factors_of_the_adapter_that_trains_are_touched():
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


def test_adapters_are_switched_and_deleted_in_the_middle_of_training():
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


def test_a_disabled_or_merged_adapter_is_left_alone():
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


def test_a_frozen_adapter_in_an_optimizer_is_none_of_our_business(tmp_path):
    proximal().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    (tmp_path / "proximal_anchor.safetensors").write_bytes(b"damaged")
    for p in loaded.parameters():
        p.grad = torch.zeros_like(p)
    SGD(loaded.parameters(), lr=0.1).step()
    assert not find_adapters(loaded)[0].seen


def test_merge_and_unload_ends_the_record():
    gc.collect()
    alive = len(live_records)
    merged = displaced(proximal()).merge_and_unload()
    assert len(live_records) == alive
    assert not any("proximal" in name for name in vars(merged))


def test_other_models_and_lambda_zero_cost_no_search(monkeypatch):
    model = proximal(lam=0.0)
    assert list(find_steps(SGD(lora_parameters(model).values(), lr=0.1))) == []
    assert list(find_steps(SGD(mlp().parameters(), lr=0.1))) == []
    assert live_records


def test_lambda_can_be_scheduled_and_stays_validated():
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


# --- anchors ------------------------------------------------------------------------------------------------------


def test_the_anchor_can_be_set_to_the_present_factors():
    model = displaced(proximal())
    reset_proximal_anchor(model)
    assert proximal_distance(model) == 0
    step_at_rest(displaced(model))
    assert proximal_distance(model) > 0
    with pytest.raises(PeftLinearError, match="no ProximalLoRA adapter 'nobody'"):
        reset_proximal_anchor(model, "nobody")


def test_a_changed_rank_is_found_and_resetting_heals_it():
    model = proximal()
    layer = model.base_model.model[0]
    layer.lora_A["default"], layer.lora_B["default"] = nn.Linear(5, 3, bias=False), nn.Linear(3, 7, bias=False)
    with pytest.raises(
        PeftLinearError, match=r"lora_A of '0' \(adapter 'default'\) has shape \(3, 5\), its anchor \(2, 5\)"
    ):
        step_at_rest(model)
    reset_proximal_anchor(model)
    step_at_rest(model)


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize("scheme", ["pissa", "olora", "orthogonal", "gaussian", "mica"])
def test_schemes_that_start_elsewhere_are_pulled_to_where_they_start(scheme, space):
    if not hasattr(LoraLayer, f"{scheme}_init") and scheme != "gaussian":
        pytest.skip(f"this version of peft has no {scheme}")
    model = proximal(init_lora_weights=scheme, proximal_space=space, lam=1e9)
    assert proximal_distance(model, space="factors") == 0 == proximal_distance(model, space="delta")
    anchors = find_adapters(model)[0].anchors()
    assert all((anchor.b is None) == (scheme == "gaussian") for anchor in anchors.values())
    assert all((anchor.a is None) == (scheme == "mica") for anchor in anchors.values())
    trained = lora_parameters(model)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.ones_like(p))
    before = proximal_distance(model, space=space)
    step_at_rest(model)
    # one sweep over A and B solves each block; with both near the anchor it leaves next to nothing
    assert proximal_distance(model, space=space) < 0.2 * before
    for _ in range(30):
        step_at_rest(model)
    assert proximal_distance(model, space=space) < 0.02 * before


def test_eva_fills_in_a_later_and_the_anchor_waits_for_it():
    from peft import EvaConfig

    model = proximal(init_lora_weights="eva", eva_config=EvaConfig(), lam=1e9)
    with torch.no_grad():
        for name, p in lora_parameters(model).items():
            if "lora_A" in name:
                p.normal_()
    assert proximal_distance(model) == 0
    kept = [p.detach().clone() for p in lora_parameters(model).values()]
    step_at_rest(model)
    for p, value in zip(lora_parameters(model).values(), kept, strict=True):
        assert torch.equal(p, value)
    displaced(model)
    assert proximal_distance(model) > 0  # from the first step on the anchor stays
    step_at_rest(model)
    assert proximal_distance(model) < 1e-6


def test_an_embeddings_anchor_is_its_a_of_zero():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3))
    model = get_peft_model(base, config(target_modules=["0", "1"]))
    anchors = find_adapters(model)[0].anchors()
    assert anchors["0"].a is None and anchors["0"].b is not None
    assert anchors["1"].b is None and anchors["1"].a is not None
    assert proximal_distance(model) == 0
    displaced(model)
    embedding, linear = model.base_model.model
    weights = [
        embedding.get_delta_weight("default"),
        linear.get_delta_weight("default"),
    ]
    expected = torch.cat([w.ravel() for w in weights]).norm()
    assert proximal_distance(model, space="delta") == pytest.approx(float(expected), rel=1e-5)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, self.weight)


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_convolutions_and_expert_parameters(space, mode):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3)
            self.grouped = nn.Conv2d(6, 4, 3, groups=2)
            self.experts = Experts()

        def forward(self, x):
            return self.experts(self.grouped(self.conv(x)).mean((-2, -1)))

    torch.manual_seed(0)
    options = {"target_modules": ["conv", "grouped"], "target_parameters": ["experts.weight"]}
    made = config(proximal_space=space, proximal_mode=mode, lam=0.5, **options)
    model = displaced(get_peft_model(Net().double(), made, autocast_adapter_dtype=False), 0.3)
    network = model.base_model.model
    experts = network.experts.get_delta_weight("default")
    conv = network.conv.get_delta_weight("default")
    grouped = network.grouped
    with torch.no_grad():
        # what the adapter does to an input, as a dense matrix: the kernel of B after A
        probe = torch.eye(6 * 9).reshape(54, 6, 3, 3).double()
        dense = grouped.scaling["default"] * grouped.lora_B["default"](grouped.lora_A["default"](probe)).flatten(1)
    expected = torch.cat([experts.ravel(), conv.ravel(), dense.ravel()]).norm()
    assert proximal_distance(model, space="delta") == pytest.approx(float(expected), rel=1e-9)
    before = proximal_distance(model, space=space)
    step_at_rest(model, rate=0.01)
    assert 0 < proximal_distance(model, space=space) < before


def test_tied_adapters_share_one_memory_and_are_pulled_once():
    model = proximal(target_modules=["0"])
    layer = model.base_model.model[0]
    tied = nn.Parameter(layer.lora_B["default"].weight.data)
    layer.lora_A["default"].weight, kept = tied, layer.lora_A["default"].weight
    assert kept is not tied
    adapter = find_adapters(model)[0]
    adapter.capture()
    displaced_by = 0.5
    tied.data.add_(displaced_by)
    for p in (tied, layer.lora_B["default"].weight):
        p.grad = torch.zeros_like(p)
    SGD([tied, layer.lora_B["default"].weight], lr=0.5).step()
    anchor = adapter.anchors()["0"].a
    start = torch.zeros_like(tied) if anchor is None else anchor
    torch.testing.assert_close(tied.data, start + displaced_by / 2)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_group_without_a_learning_rate_is_refused():
    model = displaced(proximal())
    optimizer = SGD(lora_parameters(model).values(), lr=0.1)
    backward(model)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(PeftLinearError, match="has no learning rate"):
        optimizer.step()


def flat_copies(model):
    flat = nn.Parameter(torch.cat([p.detach().ravel() for p in lora_parameters(model).values()]))
    flat.grad = torch.zeros_like(flat)
    return SGD([flat], lr=0.1)


@pytest.mark.parametrize("how", ["views", "partitioned", "linked"])
def test_flattened_parameters_are_refused(how):
    model = proximal()
    layer = model.base_model.model[0]
    parameter = layer.lora_A["default"].weight
    if how == "views":  # FSDP1 puts views of the flat parameter where the parameters were
        del layer.lora_A["default"].weight
        layer.lora_A["default"].weight = parameter.detach().clone().requires_grad_(True)
    elif how == "partitioned":
        parameter.ds_id = 3  # DeepSpeed ZeRO-3
    else:
        parameter._hp_mapping = object()  # DeepSpeed ZeRO-1 and -2 with bf16
    with pytest.raises(PeftLinearError, match="flattened or sharded"):
        flat_copies(model).step()


def test_shards_in_the_optimizer_are_refused():
    model = proximal()
    parameter = model.base_model.model[0].lora_A["default"].weight
    parameter.grad = torch.zeros_like(parameter)
    parameter.device_mesh = object()  # as on a DTensor
    with pytest.raises(PeftLinearError, match="flattened or sharded"):
        SGD([parameter], lr=0.1).step()


def train_by_hand(model, steps):
    for _ in range(steps):
        backward(model)
        with torch.no_grad():
            for p in lora_parameters(model).values():
                p.data.sub_(0.01 * p.grad)
                p.grad = None


def test_updates_that_no_hook_sees_are_refused():
    train_by_hand(get_peft_model(mlp(), LoraConfig(target_modules=["0", "2"])), 8)
    train_by_hand(proximal(lam=0.0), 8)
    with pytest.raises(PeftLinearError, match="plain LoRA is being trained"):
        train_by_hand(proximal(), 8)


def test_the_watch_ends_with_the_first_step_that_acts():
    model = proximal()
    backward(model)
    SGD(lora_parameters(model).values(), lr=0.01).step()
    train_by_hand(model, 8)  # a user who writes on the weights after training has begun knows what they do


def test_the_watch_bears_perturbations_and_loaded_weights():
    model = proximal()
    for change in (0.1, -0.1):  # two backward passes at two points before each step: sharpness-aware methods
        backward(model)
        displaced(model, change)
    backward(model)
    assert lora_parameters(model)


def test_the_watch_follows_copies():
    model = copy.deepcopy(proximal())
    with pytest.raises(PeftLinearError, match="plain LoRA is being trained"):
        train_by_hand(model, 8)


def test_distance_of_what_has_none():
    with pytest.raises(PeftLinearError, match="has no active ProximalLoRA adapter; it has none"):
        proximal_distance(mlp())
    with pytest.raises(PeftLinearError, match="space must be one of 'factors', 'delta', got 'weights'"):
        proximal_distance(proximal(), space="weights")
    with pytest.raises(PeftLinearError, match="use_dora, with which the change of the weight is not"):
        proximal_distance(proximal(use_dora=True), space="delta")
    with pytest.raises(PeftLinearError, match="has no active ProximalLoRA adapter"):
        attach_proximal(mlp(), SGD(mlp().parameters(), lr=0.1))
    assert set(proximal_summary(proximal())) == {"proximal_distance", "proximal_distance_delta", "proximal_lambda"}


def test_distances_through_wrappers():
    model = displaced(proximal())
    wrapper = nn.Module()
    wrapper.module = model
    assert proximal_distance(wrapper) == proximal_distance(model) > 0
