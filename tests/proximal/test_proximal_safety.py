# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the term refuses, and that training which bypasses it is detected."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_linear.errors import PeftLinearError
from peft_linear.proximal import attach_proximal, proximal_distance, proximal_summary
from tests.helpers.proximal_at_rest import SGD, backward, displaced, mlp, proximal
from tests.helpers.reference_proximal import lora_parameters


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


def test_updates_that_bypass_the_hooks_are_refused():
    with pytest.raises(PeftLinearError, match="plain LoRA is being trained"):
        train_by_hand(proximal(), 8)


def test_plain_lora_and_lambda_zero_may_bypass_the_hooks():
    train_by_hand(get_peft_model(mlp(), LoraConfig(target_modules=["0", "2"])), 8)
    train_by_hand(proximal(lam=0.0), 8)


def test_the_guard_is_removed_at_the_first_optimizer_step():
    model = proximal()
    backward(model)
    SGD(lora_parameters(model).values(), lr=0.01).step()
    train_by_hand(model, 8)  # changes of the weights after training has begun are deliberate


def test_the_guard_allows_perturbations_and_loaded_weights():
    model = proximal()
    for change in (0.1, -0.1):  # two backward passes at two points before each step: sharpness-aware methods
        backward(model)
        displaced(model, change)
    backward(model)
    assert lora_parameters(model)


def test_copies_are_guarded_too():
    model = copy.deepcopy(proximal())
    with pytest.raises(PeftLinearError, match="plain LoRA is being trained"):
        train_by_hand(model, 8)


@pytest.mark.parametrize(
    ("make", "space", "message"),
    [
        (mlp, None, "has no active ProximalLoRA adapter; it has none"),
        (proximal, "weights", "space must be one of 'factors', 'delta', got 'weights'"),
        (partial(proximal, use_dora=True), "delta", "use_dora, with which the change of the weight is not"),
    ],
    ids=["no adapter", "unknown space", "not a product"],
)
def test_a_distance_that_is_not_defined_is_refused(make, space, message):
    with pytest.raises(PeftLinearError, match=message):
        proximal_distance(make(), space=space)


def test_a_model_without_adapter_cannot_be_attached():
    with pytest.raises(PeftLinearError, match="has no active ProximalLoRA adapter"):
        attach_proximal(mlp(), SGD(mlp().parameters(), lr=0.1))


def test_the_summary_before_the_first_step_has_no_firing_rate():
    assert set(proximal_summary(proximal())) == {"proximal_distance", "proximal_distance_delta", "proximal_lambda"}


def test_a_wrapper_has_the_distance_of_its_model():
    model = displaced(proximal())
    wrapper = nn.Module()
    wrapper.module = model
    assert proximal_distance(wrapper) == proximal_distance(model) > 0
