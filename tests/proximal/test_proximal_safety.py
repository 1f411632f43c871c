# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the term must refuse, and that plain LoRA is never trained unawares."""

from __future__ import annotations

import copy

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
