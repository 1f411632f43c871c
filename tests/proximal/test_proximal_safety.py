# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the term refuses, and steps that raise. Training that bypasses it: test_proximal_guard.py."""

from __future__ import annotations

import contextlib
import sys
from functools import partial

import pytest
import torch
from torch import nn

from peft_linear.errors import PeftLinearError
from peft_linear.proximal import attach_proximal, proximal_distance, proximal_summary
from peft_linear.proximal.hook import _open
from peft_linear.proximal.updates import _check_rate
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.proximal_at_rest import SGD, backward, displaced, mlp, proximal, step_at_rest
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


@pytest.mark.parametrize("rate", [-0.1, float("inf"), float("nan"), 10**400, "0.1", torch.tensor(-1.0), torch.ones(2)])
@pytest.mark.parametrize("mode", ["decoupled", "coupled", "projection"])
def test_a_learning_rate_that_is_no_finite_number_is_refused_with_its_group_and_value(rate, mode):
    model = displaced(proximal(proximal_mode=mode))
    before = [p.detach().clone() for p in lora_parameters(model).values()]
    first, *rest = lora_parameters(model).values()
    optimizer = SGD([{"params": [first]}, {"params": rest}], lr=0.1)
    backward(model)
    optimizer.param_groups[1]["lr"] = rate
    with pytest.raises(PeftLinearError, match=r"parameter group 1 of .*adapter 'default'.* the learning rate .*one"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(model).values(), before, strict=True))


@pytest.mark.parametrize("rate", [0.0, 1, torch.tensor(0.5)])
def test_other_learning_rates_are_accepted(rate):
    model = displaced(proximal())
    before = proximal_distance(model)
    step_at_rest(model, rate)
    assert proximal_distance(model) == pytest.approx(before / (1 + 2 * float(rate)))


def test_the_value_of_a_learning_rate_on_a_device_is_not_read():
    """It would make the host wait for the device; the meta device refuses to be read."""
    _check_rate(torch.ones((), device="meta"), 0, find_adapters(proximal())[0])
    with pytest.raises(PeftLinearError, match="has the learning rate tensor"):
        _check_rate(torch.ones(2, device="meta"), 0, find_adapters(proximal())[0])


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
@pytest.mark.parametrize("space", ["factors", "delta", "function"])
def test_the_largest_lambda_gives_no_nan(mode, space):
    model = displaced(proximal(lam=sys.float_info.max, proximal_mode=mode, proximal_space=space))
    with torch.no_grad():
        next(iter(lora_parameters(model).values()))[0].zero_()
    step_at_rest(model, 1e-3 if mode == "coupled" else 10.0)
    assert not any(p.isnan().any() for p in lora_parameters(model).values())
    if mode == "decoupled":
        assert proximal_distance(model, space="delta") == 0


@pytest.mark.parametrize("space", ["factors", "delta", "function"])
@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_the_largest_lambda_times_a_learning_rate_of_zero_is_zero(rate, space):
    model = displaced(proximal(lam=sys.float_info.max, proximal_space=space))
    before = proximal_distance(model)
    step_at_rest(model, rate)
    assert proximal_distance(model) == before


class Failing(SGD):
    """Raises in its step, after the hooks before it."""

    def step(self, closure=None):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["coupled", "decoupled", "projection"])
def test_a_step_that_raised_leaves_the_next_optimizer_its_term(mode, dtype):
    ends = []
    for fails in (False, True):
        model = displaced(proximal(proximal_mode=mode)).to(dtype)
        failing = Failing(lora_parameters(model).values(), lr=0.1)
        for p in lora_parameters(model).values():
            p.grad = torch.full_like(p, 0.25)
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                failing.step()
        SGD(lora_parameters(model).values(), lr=0.1).step()
        assert all(p.dtype == p.grad.dtype == dtype for p in lora_parameters(model).values())
        assert all(torch.equal(p.grad, torch.full_like(p, 0.25)) for p in lora_parameters(model).values())
        ends.append([p.detach().clone() for p in lora_parameters(model).values()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_gradients_accumulated_after_a_step_that_raised_are_kept():
    model = displaced(proximal(proximal_mode="coupled"))
    failing = Failing(lora_parameters(model).values(), lr=0.1)
    backward(model)
    expected = [2 * p.grad for p in lora_parameters(model).values()]
    with pytest.raises(RuntimeError):
        failing.step()
    backward(model)
    seen = []
    optimizer = SGD(lora_parameters(model).values(), lr=0.0)
    optimizer.step()
    seen = [p.grad for p in lora_parameters(model).values()]
    for gradient, right in zip(seen, expected, strict=True):
        torch.testing.assert_close(gradient, right)


def test_an_attached_optimizer_that_raised_leaves_the_next_optimizer_its_term():
    class Own:
        def __init__(self, params):
            self.param_groups = [{"params": list(params), "lr": 0.1}]

        def step(self):
            raise RuntimeError("out of memory")

    model = displaced(proximal(proximal_mode="coupled"))
    own = Own(lora_parameters(model).values())
    attach_proximal(model, own)
    backward(model)
    gradients = [p.grad for p in lora_parameters(model).values()]
    with pytest.raises(RuntimeError, match="out of memory"):
        own.step()
    assert all(p.grad is g for p, g in zip(lora_parameters(model).values(), gradients, strict=True))
    assert not _open.steps


def test_a_step_that_is_running_is_told_from_one_that_raised():
    """An inner optimizer of one that runs leaves it the coupled term; of one that raised, it takes it."""

    class Outer(SGD):
        def step(self, closure=None):
            with contextlib.suppress(RuntimeError):
                Failing([first], lr=0.1).step()
            SGD([first], lr=0.1).step()

    model = displaced(proximal(proximal_mode="coupled"))
    first = next(iter(lora_parameters(model).values()))
    first.grad = torch.zeros_like(first)
    start, before = model_start(model), first.detach().clone()
    Outer([first], lr=0.1).step()
    torch.testing.assert_close(first, before - 0.1 * 2.0 * (before - start))


def model_start(model):
    return next(iter(find_adapters(model)[0].factors())).anchor.a


@pytest.mark.parametrize(
    ("make", "space", "message"),
    [
        (mlp, None, "has no active ProximalLoRA adapter; it has none"),
        (proximal, "weights", "space must be one of 'factors', 'delta', 'function', got 'weights'"),
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
