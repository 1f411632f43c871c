# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose weights are not, or not only, the model's parameters: pulled as others are, or refused by name."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from peft_linear.errors import PeftLinearError
from peft_linear.proximal import attach_proximal, proximal_distance
from tests.helpers.optimizers import (
    ApexLikeSGD,
    AttributeMasterSGD,
    AveragedSGD,
    FlatCopiesSGD,
    Lookahead,
    MasterSGD,
    SlowWeights,
)
from tests.helpers.proximal_at_rest import SGD, backward, displaced, proximal
from tests.helpers.proximal_loop import batches, lora, risk
from tests.helpers.proximal_loop import proximal as looped
from tests.helpers.reference_proximal import lora_parameters, schedule_free_step


COPIES = [MasterSGD, ApexLikeSGD, AttributeMasterSGD, lambda params, lr: MasterSGD(params, lr, key="w")]
RATE, LAMBDA, STEPS = 0.01, 2.0, 40


def at_rest(model, optimizer, steps=STEPS):
    """Steps with gradients of zero; the factor by which the distance shrinks."""
    space = model.peft_config["default"].proximal_space
    before = proximal_distance(model, space=space)
    for _ in range(steps):
        for p in lora_parameters(model).values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return proximal_distance(model, space=space) / before


def model_of(dtype, **options):
    model = proximal(lam=LAMBDA, **options).to(dtype)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.add_(0.25)
    return model


@pytest.mark.parametrize("make", COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("space", ["factors", "delta", "function"])
def test_weights_of_which_the_optimizer_keeps_copies_are_pulled_as_others_are(make, dtype, space):
    model = model_of(torch.float32, proximal_space=space)
    right = at_rest(model, SGD(lora_parameters(model).values(), lr=RATE))
    model = model_of(dtype, proximal_space=space)
    assert right < 0.6
    assert at_rest(model, make(lora_parameters(model).values(), RATE)) == pytest.approx(right, rel=0.01)


def trained(model, optimizer, steps=12):
    for batch in batches(steps):
        model.zero_grad()
        risk(model, (batch[0].to(next(model.parameters()).dtype), batch[1])).backward()
        optimizer.step()
    return [p.detach().clone() for p in lora_parameters(model).values()]


@pytest.mark.parametrize("make", COPIES)
@pytest.mark.parametrize("mode", ["decoupled", "coupled", "projection"])
def test_training_with_copies_is_training_without(make, mode):
    for model in (looped(proximal_mode=mode),):
        expected = trained(model, SGD(lora_parameters(model).values(), lr=0.2))
    model = looped(proximal_mode=mode)
    for p, q in zip(trained(model, make(lora_parameters(model).values(), 0.2)), expected, strict=True):
        torch.testing.assert_close(p, q)


def test_a_moment_that_once_equals_a_weight_is_not_taken_for_a_copy():
    class Noting(SGD):
        @torch.no_grad()
        def step(self, closure=None):
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("first", p.detach().clone())

    model = displaced(proximal())
    optimizer = Noting(lora_parameters(model).values(), lr=0.1)
    for _ in range(2):
        backward(model)
        optimizer.step()
    noted = [optimizer.state[p]["first"].clone() for p in lora_parameters(model).values()]
    for _ in range(3):
        backward(model)
        optimizer.step()
    assert all(
        torch.equal(optimizer.state[p]["first"], first)
        for p, first in zip(lora_parameters(model).values(), noted, strict=True)
    )


def test_a_starting_point_kept_by_the_optimizer_stays_where_it_was():
    """As Prodigy's: equal to the weights until they first move, however late that is."""

    class Starting(SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("p0", p.detach().clone())
            super().step()

    model = displaced(proximal(lam=0.5))
    optimizer = Starting(lora_parameters(model).values(), lr=0.1)
    at_rest(model, optimizer, 6)  # 0.95 a step
    backward(model)
    optimizer.step()
    noted = [optimizer.state[p]["p0"].clone() for p in lora_parameters(model).values()]
    at_rest(model, optimizer, 2)
    for p, start in zip(lora_parameters(model).values(), noted, strict=True):
        assert torch.equal(optimizer.state[p]["p0"], start)


@pytest.mark.parametrize("mode", ["decoupled", "projection"])
@pytest.mark.parametrize(
    "make",
    [
        SlowWeights,
        lambda params, lr: SlowWeights(params, lr, lazy=True),
        AveragedSGD,
        type("LookaheadSGD", (SGD,), {}),
    ],
    ids=["slow weights", "made in the first step", "average", "by its class"],
)
def test_averages_are_refused_where_the_term_acts_on_the_weights(make, mode):
    model = displaced(proximal(proximal_mode=mode))
    optimizer = make(lora_parameters(model).values(), lr=1e-3)
    backward(model)
    with pytest.raises(PeftLinearError, match=r"averages weights \(.*use proximal_mode='coupled'"):
        optimizer.step()


@pytest.mark.parametrize("make", [SlowWeights, AveragedSGD])
def test_averages_carry_the_coupled_term(make):
    """Written by hand: the same optimizer on the loss plus the penalty."""
    torch.set_default_dtype(torch.float64)
    try:
        plain, model = lora(), looped(lam=3.0, proximal_mode="coupled")
        start = [p.detach().clone() for p in lora_parameters(plain).values()]
        optimizer = make(lora_parameters(plain).values(), lr=0.1)
        for batch in batches():
            plain.zero_grad()
            pairs = zip(lora_parameters(plain).values(), start, strict=True)
            (risk(plain, batch) + sum(1.5 * (p - s).square().sum() for p, s in pairs)).backward()
            optimizer.step()
        found = trained(model, make(lora_parameters(model).values(), lr=0.1))
    finally:
        torch.set_default_dtype(torch.float32)
    for p, q in zip(lora_parameters(plain).values(), found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["exp_avg_slow", "ema_grad", "average_sq"])
def test_averages_of_gradients_are_not_taken_for_averages_of_weights(name):
    class Averaging(SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p][name] = p.detach() * 1.01
            super().step()

    model = displaced(proximal())
    backward(model)
    Averaging(lora_parameters(model).values(), lr=0.1).step()


def test_an_average_in_a_wrapper_without_hooks_is_warned_of_once():
    model = displaced(proximal())
    optimizer = Lookahead(SGD(lora_parameters(model).values(), lr=1e-3), k=3)
    with pytest.warns(UserWarning, match=r"is averaged with its own earlier values .*weight 0\.5.* Lookahead") as seen:
        for _ in range(15):
            model.zero_grad()
            backward(model)
            optimizer.step()
    assert len(seen) == 1


def test_attaching_to_a_wrapper_that_averages_refuses_it():
    model = displaced(proximal())
    optimizer = Lookahead(SGD(lora_parameters(model).values(), lr=0.01))
    attach_proximal(model, optimizer)
    backward(model)
    with pytest.raises(PeftLinearError, match=r"Lookahead averages weights"):
        optimizer.step()


def test_stepping_copies_that_no_hook_connects_with_the_model_is_an_error():
    model = looped()
    with pytest.raises(PeftLinearError, match="plain LoRA is being trained"):
        trained(model, FlatCopiesSGD(lora_parameters(model).values(), 0.1))


@pytest.mark.parametrize("name", ["main_grad", "decoupled_grad"])
def test_gradients_in_another_attribute_are_refused(name):
    model = proximal()
    optimizer = SGD(lora_parameters(model).values(), lr=0.1)
    for p in lora_parameters(model).values():
        setattr(p, name, torch.zeros_like(p))
    with pytest.raises(PeftLinearError, match=rf"have their gradients in \.{name} .*accumulate gradients in \.grad"):
        optimizer.step()


def test_a_gradient_that_is_moved_to_grad_before_the_step_is_accepted():
    model = displaced(proximal())
    before = proximal_distance(model)
    for p in lora_parameters(model).values():
        p.main_grad = p.grad = torch.zeros_like(p)
    SGD(lora_parameters(model).values(), lr=0.5).step()
    assert proximal_distance(model) == pytest.approx(before / 2)


def schedule_free():
    return pytest.importorskip("schedulefree", reason="the package schedulefree is not installed")


def steps_of(optimizer, model, steps=15):
    optimizer.train()
    for batch in batches(steps):
        model.zero_grad()
        risk(model, batch).backward()
        optimizer.step()
    optimizer.eval()
    return lora_parameters(model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGDScheduleFree", {"foreach": True, "warmup_steps": 5}),
        ("SGDScheduleFree", {"foreach": False}),
        ("SGDScheduleFreeReference", {}),
    ],
)
def test_schedule_free_is_the_method_with_a_proximal_step_of_z(name, options):
    package = schedule_free()
    torch.set_default_dtype(torch.float64)
    try:
        model, plain = looped(lam=3.0), lora()
        if name.endswith("Reference"):
            name_of = package.sgd_schedulefree_reference.SGDScheduleFreeReference
        else:
            name_of = getattr(package, name)
        found = steps_of(name_of(lora_parameters(model).values(), lr=0.1, **options), model)
        expected = schedule_free_step(plain, batches(15), risk, lam=3.0, lr=0.1, warmup=options.get("warmup_steps", 0))
    finally:
        torch.set_default_dtype(torch.float32)
    for key, p in found.items():
        torch.testing.assert_close(p, expected[key], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "mode", "space"),
    itertools.product(
        ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"],
        ["decoupled", "coupled"],
        ["factors", "delta", "function"],
    ),
)
def test_schedule_free_optimizers_stay_nearer_the_larger_lambda_is(name, mode, space):
    package = schedule_free()
    distances = []
    for lam in (0.0, 1.0, 30.0):
        model = looped(lam=lam, proximal_mode=mode, proximal_space=space)
        steps_of(getattr(package, name)(lora_parameters(model).values(), lr=0.05), model, 60)
        distances.append(proximal_distance(model, space=space))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.5 * distances[0]


def test_a_very_large_lambda_holds_a_schedule_free_optimizer_at_the_pretrained_model():
    model = looped(lam=1e12)
    steps_of(schedule_free().AdamWScheduleFree(lora_parameters(model).values(), lr=0.05), model)
    assert proximal_distance(model) < 1e-6


@pytest.mark.parametrize("name", ["AdamWScheduleFreeClosure", "SGDScheduleFreeClosure"])
def test_schedule_free_optimizers_that_take_closures_are_pulled(name):
    package = schedule_free()
    distances = []
    for lam in (0.0, 1e12):
        model = looped(lam=lam)
        optimizer = getattr(package, name)(lora_parameters(model).values(), lr=0.05)
        for batch in batches(10):

            def closure(model=model, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                loss = risk(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)
        distances.append(proximal_distance(model))
    assert distances[1] < 1e-5 < distances[0]


def test_a_schedule_free_wrapper_is_pulled_in_the_optimizer_that_it_wraps():
    package = schedule_free()
    torch.set_default_dtype(torch.float64)
    try:
        model, plain = looped(lam=3.0), lora()
        wrapped = package.ScheduleFreeWrapper(SGD(lora_parameters(model).values(), lr=0.1), momentum=0.9)
        found = steps_of(wrapped, model)
        expected = schedule_free_step(plain, batches(15), risk, lam=3.0, lr=0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    for key, p in found.items():
        torch.testing.assert_close(p, expected[key], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_schedule_free_steps_of_low_precision_factors_are_refused(mode):
    model = model_of(torch.bfloat16, proximal_mode=mode)
    optimizer = schedule_free().SGDScheduleFree(lora_parameters(model).values(), lr=1e-3)
    optimizer.train()
    with pytest.raises(PeftLinearError, match=r"is schedule-free.*rounded away in torch.bfloat16.*in float32"):
        at_rest(model, optimizer, 1)


def test_schedule_free_projection_is_refused():
    model = displaced(proximal(proximal_mode="projection"))
    optimizer = schedule_free().SGDScheduleFree(lora_parameters(model).values(), lr=0.1)
    optimizer.train()
    backward(model)
    with pytest.raises(PeftLinearError, match="is schedule-free.*is not defined; use proximal_mode='decoupled'"):
        optimizer.step()


def test_the_model_average_of_torch_is_neither_pulled_nor_warned_of():
    model = displaced(proximal())
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = SGD(lora_parameters(model).values(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            model.zero_grad()
            backward(model)
            optimizer.step()
            average.update_parameters(model)
            average(torch.ones(3, 5))
    assert proximal_distance(average) > proximal_distance(model)


class FlatSGD(torch.optim.Optimizer):
    """SGD on a flat copy of all parameters, from which they are overwritten."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.flat = torch.cat([p.detach().reshape(-1) for group in self.param_groups for p in group["params"]])

    @torch.no_grad()
    def step(self, closure=None):
        first = 0
        for group in self.param_groups:
            for p in group["params"]:
                part = self.flat[first : first + p.numel()].view_as(p)
                p.copy_(part.sub_(p.grad, alpha=group["lr"]))
                first += p.numel()


@pytest.mark.parametrize("grouped", [False, True])
def test_flat_copies_are_refused_where_the_term_acts_on_the_weights(grouped):
    def run(make, **options):
        model = looped(**options)
        params = list(lora_parameters(model).values())
        optimizer = make([{"params": params[:2]}, {"params": params[2:]}] if grouped else params, lr=0.05)
        for batch in batches(4):
            optimizer.zero_grad()
            risk(model, batch).backward()
            optimizer.step()
        return params

    with pytest.raises(PeftLinearError, match=r"FlatSGD keeps a flat copy .*optimizer\.flat.*proximal_mode='coupled'"):
        run(FlatSGD)
    for p, q in zip(run(FlatSGD, proximal_mode="coupled"), run(SGD, proximal_mode="coupled"), strict=True):
        torch.testing.assert_close(p, q)
