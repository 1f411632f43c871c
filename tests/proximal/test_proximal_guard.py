# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Training that moves the factors without a pull is detected, and nothing else is taken for it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_linear.errors import PeftLinearError
from peft_linear.proximal import attach_proximal
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.optimizers import SAM
from tests.helpers.proximal_at_rest import SGD, config, displaced, mlp, proximal
from tests.helpers.reference_proximal import lora_parameters


BYPASSED = "plain LoRA is being trained"


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def loss(model):
    return model(torch.ones(3, 5)).square().mean()


def factors(model):
    return list(lora_parameters(model).values())


def descend(p, gradient, rate=0.01):
    p.data.sub_(rate * gradient)


def train_by_hand(model, steps=6, update=descend):
    for _ in range(steps):
        model.zero_grad()
        loss(model).backward()
        with torch.no_grad():
            for p in factors(model):
                if p.grad is not None:
                    update(p, p.grad)


def train(model, optimizer, steps=6):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def replace(p, gradient):
    p.data = p.data - 0.01 * gradient


@pytest.mark.parametrize(
    "update",
    [descend, replace, lambda p, g: p.sub_(0.01 * g), lambda p, g: p.sub_(1e-3 * g.sign())],
    ids=["in its data", "new data", "in place", "by signs"],
)
def test_updates_by_hand_are_refused(update):
    with pytest.raises(PeftLinearError, match=BYPASSED + ".*attach_proximal"):
        train_by_hand(proximal(), update=update)


def test_the_error_names_the_adapter_its_lambda_and_a_factor():
    with pytest.raises(PeftLinearError, match=r"'default' has proximal_lambda=2.0, but .*\(lora_. of [02], ...\)"):
        train_by_hand(proximal())


def test_updates_by_hand_with_momentum_and_noisy_gradients_are_refused():
    torch.manual_seed(0)
    moments = {}

    def update(p, gradient):
        noisy = gradient + gradient.norm() * torch.randn_like(p) / p.numel() ** 0.5
        moments[p] = 0.9 * moments.get(p, 0) + noisy
        p.data.sub_(0.01 * moments[p])

    with pytest.raises(PeftLinearError, match=BYPASSED):
        train_by_hand(proximal(), 20, update)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_autograd_grad_are_seen(dtype):
    model = displaced(proximal()).to(dtype)
    with pytest.raises(PeftLinearError, match=BYPASSED):
        for _ in range(6):
            gradients = torch.autograd.grad(model(torch.ones(3, 5, dtype=dtype)).square().mean(), factors(model))
            for p, gradient in zip(factors(model), gradients, strict=True):
                descend(p, gradient, 0.05)


def test_a_frozen_first_module_does_not_blind_the_guard():
    model = proximal()
    for p in factors(model)[:2]:
        p.requires_grad_(False)
    with pytest.raises(PeftLinearError, match=BYPASSED):
        train_by_hand(model)


@pytest.mark.parametrize("gradients", [True, False])
def test_an_optimizer_step_does_not_switch_the_guard_off(gradients):
    model = displaced(proximal())
    if gradients:
        loss(model).backward()
    SGD(factors(model), lr=0.01).step()
    assert find_adapters(model)[0].stepped == gradients
    with pytest.raises(PeftLinearError, match=BYPASSED):
        train_by_hand(model)


def test_factors_trained_by_hand_beside_an_optimizer_are_seen():
    model = displaced(proximal())
    held, rest = factors(model)[:2], factors(model)[2:]
    optimizer = SGD(held, lr=1e-3)
    with pytest.raises(PeftLinearError, match=r"2 of its factors \(lora_. of 2"):
        for _ in range(6):
            model.zero_grad()
            loss(model).backward()
            optimizer.step()
            for p in rest:
                descend(p, p.grad)


def test_copies_are_guarded_too():
    with pytest.raises(PeftLinearError, match=BYPASSED):
        train_by_hand(copy.deepcopy(proximal()))


def test_factors_that_were_replaced_are_guarded_from_the_next_step_on():
    model = displaced(proximal())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    train(model, SGD(factors(model), lr=1e-3), 1)
    with pytest.raises(PeftLinearError, match=BYPASSED):
        train_by_hand(model)


def test_plain_lora_and_lambda_zero_may_be_trained_by_hand():
    train_by_hand(get_peft_model(mlp(), LoraConfig(target_modules=["0", "2"])), 8)
    train_by_hand(proximal(lam=0.0), 8)


class Own:
    def __init__(self, params, lr):
        self.param_groups = [{"params": list(params), "lr": lr}]

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def step(self):
        for p in self.param_groups[0]["params"]:
            descend(p, p.grad, self.param_groups[0]["lr"])


def test_attached_optimizers_raise_no_alarm():
    model = displaced(proximal())
    optimizer = Own(factors(model), 1e-3)
    attach_proximal(model, optimizer)
    train(model, optimizer, 10)


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    return closure


@pytest.mark.parametrize("ascents", [1, 5])
def test_sharpness_aware_steps_raise_no_alarm(ascents):
    model = displaced(proximal())
    optimizer = SAM(factors(model), SGD, lr=1e-3, ascents=ascents)
    for _ in range(8):
        optimizer.step(closure_of(model, optimizer))


@pytest.mark.parametrize("steps", [0, 2])
def test_gradients_at_perturbed_points_raise_no_alarm(steps):
    """Finite differences along many directions, the gradient's too, with and without training between."""
    torch.manual_seed(0)
    model = displaced(proximal())
    optimizer = SGD(factors(model), lr=1e-3)
    for _ in range(10):
        train(model, optimizer, steps)
        before = [p.detach().clone() for p in factors(model)]
        along = [p.grad.clone() for p in factors(model)] if steps else [torch.randn_like(p) for p in factors(model)]
        for amount in (1e-2, -1e-2, 2e-2, -2e-2):
            with torch.no_grad():
                for p, start, direction in zip(factors(model), before, along, strict=True):
                    p.copy_(start + amount * direction)
            model.zero_grad()
            loss(model).backward()
        with torch.no_grad():
            for p, start in zip(factors(model), before, strict=True):
                p.copy_(start)


def test_gradient_checking_raises_no_alarm():
    model = displaced(proximal()).double()
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value, *_: model(value), (x, *factors(model)[:2]), fast_mode=False)


def test_gradient_accumulation_and_several_backward_passes_raise_no_alarm():
    model = displaced(proximal())
    optimizer = SGD(factors(model), lr=1e-3)
    for _ in range(8):
        optimizer.zero_grad()
        for _ in range(4):
            loss(model).backward()
        optimizer.step()


def test_lbfgs_raises_no_alarm():
    model = displaced(proximal())
    optimizer = torch.optim.LBFGS(factors(model), lr=0.1, max_iter=12, line_search_fn="strong_wolfe")
    for _ in range(3):
        optimizer.step(closure_of(model, optimizer))


def loaded(model):
    model.load_state_dict({name: value * 0.99 for name, value in model.state_dict().items()})


def merged(model):
    model.merge_adapter()
    model.unmerge_adapter()


def switched(model):
    if "other" not in model.peft_config:
        model.add_adapter("other", config())
    model.set_adapter("other")
    loss(model).backward()
    model.set_adapter("default")


def cast(model):
    model.double().float().to(torch.bfloat16).float()


def averaged(model):
    with torch.no_grad():
        for p in factors(model):
            p.copy_((p + 0.9 * p + 0.01) / 2)


def decayed(model):
    with torch.no_grad():
        for p in factors(model):
            p.mul_(0.99).clamp_(-1, 1)


def initialised(model):
    with torch.no_grad():
        for p in factors(model):
            nn.init.normal_(p, std=0.1)


@pytest.mark.parametrize("change", [loaded, merged, switched, cast, averaged, decayed, initialised])
@pytest.mark.parametrize("when", ["before training", "between all steps"])
def test_deliberate_changes_raise_no_alarm(change, when):
    model = displaced(proximal(), 0.1)
    optimizer = SGD(factors(model), lr=1e-3)
    for index in range(8):
        if when == "between all steps" or index == 0:
            change(model)
        train(model, optimizer, 1)


@pytest.mark.parametrize("change", [loaded, merged, switched, cast, averaged, decayed, initialised])
def test_deliberate_changes_without_a_step_raise_no_alarm(change):
    torch.manual_seed(0)
    model = displaced(proximal(), 0.1)
    for _ in range(2):
        change(model)
        loss(model).backward()


def test_moving_weights_of_another_model_into_this_one_raises_no_alarm():
    """A model whose factors are copied from one that trains, and that is only run forward."""
    model = displaced(proximal())
    teacher = copy.deepcopy(model)
    optimizer = SGD(factors(model), lr=1e-3)
    for _ in range(8):
        train(model, optimizer, 1)
        with torch.no_grad():
            for p, q in zip(factors(teacher), factors(model), strict=True):
                p.lerp_(q, 0.1)
        loss(teacher)


def test_optimizers_in_the_backward_pass_raise_no_alarm():
    model = displaced(proximal())
    for p in factors(model):
        optimizer = SGD([p], lr=1e-3)

        def update(parameter, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(update)
    for _ in range(8):
        loss(model).backward()


def test_two_optimizers_that_share_an_adapter_raise_no_alarm():
    model = displaced(proximal())
    optimizers = [SGD(factors(model)[:3], lr=1e-3), torch.optim.AdamW(factors(model)[2:], lr=1e-3)]
    for _ in range(8):
        model.zero_grad()
        loss(model).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_a_gpus_comparisons_are_read_a_pass_later(monkeypatch):
    """The same decisions where the host does not wait: two passes later at most."""
    from peft_linear.tuners.proximal_lora import guard

    monkeypatch.setattr(guard, "_waits", lambda tensor: False)
    model = displaced(proximal())
    train(model, SGD(factors(model), lr=1e-3), 6)
    with pytest.raises(PeftLinearError, match=BYPASSED):
        train_by_hand(model, 8)


def test_the_guard_holds_no_model():
    import gc
    import weakref

    model = displaced(proximal())
    train(model, SGD(factors(model), lr=1e-3), 2)
    gc.collect()
    gc.disable()
    try:
        parameter = weakref.ref(factors(model)[0])
        del model
        assert parameter() is None
    finally:
        gc.enable()
