# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The term in plain PyTorch loops, against loops written by hand on plain LoRA in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from peft_linear.errors import PeftLinearError
from peft_linear.proximal import attach_proximal, proximal_distance, proximal_firing_rate
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.proximal_loop import assert_same, batches, groups, lora, proximal, reference_run, risk, train
from tests.helpers.reference_proximal import ReferenceProximal, lora_parameters


MODES = ["decoupled", "coupled", "projection"]
SELECTIVE = [*itertools.product(MODES[:2], [True, False]), ("projection", False)]
VARIANTS = [
    *itertools.product(["factors", "delta", "function"], MODES[:2], [True, False]),
    *itertools.product(["factors"], ["projection"], [True, False]),
]
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("space", "mode", "selective"), VARIANTS)
@pytest.mark.parametrize("make", [SGD, ADAMW])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_every_variant_equals_the_loop_written_by_hand(space, mode, selective, make, clip):
    options = {"space": space, "mode": mode, "selective": selective}
    expected, reference = reference_run(make, clip=clip, **options)
    model = proximal(proximal_space=space, proximal_mode=mode, proximal_selective=selective)
    train(model, make(groups(model)), clip=clip)
    assert_same(model, expected)
    assert proximal_firing_rate(model) == pytest.approx(sum(reference.fired) / len(reference.fired))
    plain = lora()
    train(plain, make(groups(plain)), clip=clip)
    assert any(
        (a - b).abs().max() > 1e-4
        for a, b in zip(lora_parameters(model).values(), lora_parameters(plain).values(), strict=True)
    )


@pytest.mark.parametrize(("space", "mode", "selective"), VARIANTS)
def test_lambda_zero_is_lora_bit_for_bit(space, mode, selective):
    plain = lora()
    model = proximal(lam=0.0, proximal_space=space, proximal_mode=mode, proximal_selective=selective)
    train(plain, ADAMW(groups(plain)))
    train(model, ADAMW(groups(model)))
    for a, b in zip(lora_parameters(plain).values(), lora_parameters(model).values(), strict=True):
        assert torch.equal(a, b)


def test_projection_ignores_the_selective_field():
    models = [proximal(proximal_mode="projection", proximal_selective=selective) for selective in (True, False)]
    for model in models:
        train(model, ADAMW(groups(model)))
    for a, b in zip(*(lora_parameters(model).values() for model in models), strict=True):
        assert torch.equal(a, b)
    assert 0 < proximal_firing_rate(models[0]) == proximal_firing_rate(models[1]) < 1


@pytest.mark.parametrize("space", ["factors", "delta", "function"])
def test_with_a_very_large_lambda_training_stays_at_the_pretrained_model(space):
    """See tests/functional/test_proximal_laws.py for the other modes."""
    model = proximal(lam=1e12, proximal_space=space, proximal_selective=False)
    train(model, ADAMW(groups(model)))
    assert proximal_distance(model, space="delta") < 1e-9
    if space == "factors":
        assert proximal_distance(model) < 1e-9


@pytest.mark.parametrize("space", ["factors", "delta", "function"])
def test_coupled_and_decoupled_sgd_agree_to_second_order(space):
    def gap(rate):
        ends = []
        for mode in ("coupled", "decoupled"):
            model = proximal(proximal_space=space, proximal_mode=mode, proximal_selective=False)
            with torch.no_grad():  # away from the anchor, so that the first step pulls
                torch.manual_seed(5)
                for p in lora_parameters(model).values():
                    p.add_(torch.randn_like(p))
            train(model, SGD(lora_parameters(model).values(), lr=rate), data=batches(1))
            ends.append(torch.cat([p.detach().ravel() for p in lora_parameters(model).values()]))
        return float((ends[0] - ends[1]).norm())

    assert gap(1e-5) == pytest.approx(100 * gap(1e-6), rel=0.05)
    assert gap(1e-5) > 0


@pytest.mark.parametrize(("mode", "selective"), SELECTIVE)
@pytest.mark.parametrize("kwargs", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_foreach_and_fused_optimizers_equal_the_loop_written_by_hand(mode, selective, kwargs):
    expected, _ = reference_run(lambda params: ADAMW(params, foreach=False), mode=mode, selective=selective)
    model = proximal(proximal_mode=mode, proximal_selective=selective)
    train(model, ADAMW(groups(model), **kwargs))
    assert_same(model, expected, 1e-10)


@pytest.mark.parametrize(("mode", "selective"), SELECTIVE)
def test_a_learning_rate_may_be_a_tensor(mode, selective):
    expected, _ = reference_run(ADAMW, mode=mode, selective=selective)
    model = proximal(proximal_mode=mode, proximal_selective=selective)
    train(model, ADAMW([{**group, "lr": torch.tensor(group["lr"])} for group in groups(model)], foreach=False))
    assert_same(model, expected)


@pytest.mark.parametrize(("space", "mode", "selective"), VARIANTS)
def test_a_closure_equals_a_backward_pass_before_the_step(space, mode, selective):
    expected, _ = reference_run(SGD, space=space, mode=mode, selective=selective)
    model = proximal(proximal_space=space, proximal_mode=mode, proximal_selective=selective)
    optimizer = SGD(groups(model))
    for index, batch in enumerate(batches()):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = risk(model, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure) if index % 2 else optimizer.step(closure=closure)
        assert loss.requires_grad  # what the closure returned comes back
    assert_same(model, expected)


def closure_for(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = risk(model, batches(1)[0])
        loss.backward()
        return loss

    return closure


def test_decoupled_acts_once_a_step_of_lbfgs():
    plain, model = lora(), proximal(lam=2.0, proximal_selective=False)
    for each in (plain, model):
        optimizer = torch.optim.LBFGS(lora_parameters(each).values(), lr=0.1, max_iter=4)
        start = [p.detach().clone() for p in lora_parameters(each).values()]
        optimizer.step(closure_for(each, optimizer))
    for s, a, b in zip(start, lora_parameters(plain).values(), lora_parameters(model).values(), strict=True):
        torch.testing.assert_close(b, s + (a - s) / (1 + 0.1 * 2.0))


def test_coupled_is_refused_for_lbfgs():
    model = proximal(proximal_mode="coupled")
    optimizer = torch.optim.LBFGS(lora_parameters(model).values(), lr=0.1, max_iter=4)
    with pytest.raises(PeftLinearError, match="evaluates the gradient several times"):
        optimizer.step(closure_for(model, optimizer))


def test_an_optimizer_that_ignores_its_closure_is_refused():
    class IgnoresClosure(SGD):
        def step(self, closure=None):
            return None

    model = proximal()
    optimizer = IgnoresClosure(lora_parameters(model).values(), lr=0.1)
    risk(model, batches(1)[0]).backward()
    with pytest.raises(PeftLinearError, match="did not call the closure"):
        optimizer.step(lambda: 0.0)


def test_coupled_restores_a_gradient_that_is_kept():
    model = proximal(lam=3.0, proximal_mode="coupled", proximal_selective=False)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.add_(0.5)
    risk(model, batches(1)[0]).backward()
    before = [p.grad for p in lora_parameters(model).values()]
    values = [g.clone() for g in before]
    SGD(lora_parameters(model).values(), lr=0.1).step()
    for p, gradient, value in zip(lora_parameters(model).values(), before, values, strict=True):
        assert p.grad is gradient and torch.equal(gradient, value)


@pytest.mark.parametrize(("mode", "selective"), SELECTIVE)
def test_the_term_is_applied_once_when_a_subclass_calls_its_parents_step(mode, selective):
    SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # torch hooks a class when its first instance is made

    class Twice(SGD):
        def step(self, closure=None):
            return super().step(closure)

    expected, _ = reference_run(SGD, mode=mode, selective=selective)
    model = proximal(proximal_mode=mode, proximal_selective=selective)
    train(model, Twice(groups(model)))
    assert_same(model, expected)


@pytest.mark.parametrize(("mode", "selective"), SELECTIVE)
def test_the_term_is_applied_once_when_an_optimizer_wraps_another(mode, selective):
    class Outer(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            return self.inner.step()

    expected, reference = reference_run(SGD, mode=mode, selective=selective)
    model = proximal(proximal_mode=mode, proximal_selective=selective)
    train(model, Outer(SGD(groups(model))))
    assert_same(model, expected)
    assert proximal_firing_rate(model) == pytest.approx(sum(reference.fired) / len(reference.fired))


@pytest.mark.parametrize("selective", [True, False])
def test_each_of_two_optimizers_decides_for_its_own_factors(selective):
    model, expected = proximal(proximal_selective=selective), lora()
    start = {n: p.detach().clone() for n, p in lora_parameters(expected).items()}
    parts = [[n for n in start if letter in n] for letter in ("lora_A", "lora_B")]
    for each, by_hand in ((model, False), (expected, True)):
        named = lora_parameters(each)
        optimizers = [SGD([named[n] for n in names], lr=rate) for names, rate in zip(parts, (0.05, 0.2), strict=True)]
        for batch in batches():
            each.zero_grad()
            risk(each, batch).backward()
            for optimizer, names, rate in zip(optimizers, parts, (0.05, 0.2), strict=True):
                inner = sum(float((named[n].grad * (named[n].detach() - start[n])).sum()) for n in names)
                optimizer.step()
                if by_hand and (inner >= 0 or not selective):
                    with torch.no_grad():
                        for n in names:
                            named[n].copy_(start[n] + (named[n] - start[n]) / (1 + rate))
    assert_same(model, expected)


@pytest.mark.parametrize("space", ["factors", "delta", "function"])
def test_a_factor_that_is_frozen_or_without_gradient_does_not_change(space):
    model = proximal(lam=10.0, proximal_space=space, proximal_selective=False)
    named = lora_parameters(model)
    with torch.no_grad():
        for p in named.values():
            p.add_(0.1)
    frozen = {n: p.detach().clone() for n, p in named.items() if "lora_A" in n}
    for n in frozen:
        named[n].requires_grad_(False)
    optimizer = SGD(named.values(), lr=0.1)
    for index, batch in enumerate(batches(3)):
        optimizer.zero_grad()
        risk(model, batch).backward()
        skipped = next(n for n in named if "lora_B" in n)
        if index == 1:
            named[skipped].grad = None
            held = named[skipped].detach().clone()
        optimizer.step()
        if index == 1:
            assert torch.equal(named[skipped], held)
    for n, value in frozen.items():
        assert torch.equal(named[n], value)
    assert proximal_firing_rate(model) == 1.0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_scaled_gradients_and_skipped_steps_equal_the_unscaled_loop(fused, mode):
    torch.set_default_dtype(torch.float32)

    def run(model, reference=None, scaled=True, poison=3):
        optimizer = ADAMW(groups(model), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for index, batch in enumerate(batches(8)):
            optimizer.zero_grad()
            scaler.scale(risk(model, batch)).backward()
            if index == poison:
                if not scaled:
                    continue
                next(iter(lora_parameters(model).values())).grad.fill_(float("inf"))
            if reference:
                reference.before_step()
            scaler.step(optimizer)
            scaler.update()
            if reference:
                reference.after_step(reference.rates(optimizer))
        return model

    plain = lora()
    reference = ReferenceProximal(plain, lam=1.0, mode=mode)
    expected = run(plain, reference, scaled=False)
    model = run(proximal(proximal_mode=mode))
    assert_same(model, expected, 2e-5)
    assert find_adapters(model)[0].statistics.total().steps == 7
    assert proximal_firing_rate(model) == pytest.approx(sum(reference.fired) / 7)


class OwnOptimizer:
    """Not a torch.optim.Optimizer; plain gradient descent."""

    def __init__(self, param_groups):
        self.param_groups = param_groups

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
        return loss


@pytest.mark.parametrize(("space", "mode", "selective"), VARIANTS)
def test_attached_optimizers_equal_the_loop_written_by_hand(space, mode, selective):
    expected, _ = reference_run(SGD, space=space, mode=mode, selective=selective)
    model = proximal(proximal_space=space, proximal_mode=mode, proximal_selective=selective)
    optimizer = OwnOptimizer(groups(model))
    attach_proximal(model, optimizer)
    attach_proximal(model, optimizer)  # a second time has no effect
    train(model, optimizer)
    assert_same(model, expected)


def test_removing_the_handle_restores_the_step():
    model = proximal()
    own = OwnOptimizer(groups(model))
    handle = attach_proximal(model, own)
    assert "step" in vars(own)
    handle.remove()
    handle.remove()
    assert "step" not in vars(own)
    own.step = own.step  # an optimizer whose step is an attribute of the instance
    attach_proximal(model, own).remove()
    assert "step" in vars(own)


def test_attaching_does_not_change_torchs_optimizers_nor_wrappers_of_them():
    model = proximal()
    torchs = SGD(groups(model))
    attach_proximal(model, torchs).remove()
    assert "step" not in vars(torchs)
    wrapped = type("Wrapper", (), {"optimizer": torchs, "step": lambda self: self.optimizer.step()})()
    attach_proximal(model, wrapped)
    assert "step" not in vars(wrapped) and "step" not in vars(torchs)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (object(), "an optimizer needs a method step"),
        (type("NoGroups", (), {"step": print, "param_groups": [1]})(), "param_groups, a list"),
        (OwnOptimizer([{"params": [nn.Parameter(torch.zeros(3))], "lr": 0.1}]), "holds no factor of the adapters"),
        (SGD([nn.Parameter(torch.zeros(3))], lr=0.1), "holds no factor of the adapters"),
    ],
)
def test_what_cannot_be_attached_is_refused(optimizer, message):
    with pytest.raises(PeftLinearError, match=message):
        attach_proximal(proximal(), optimizer)


def test_plain_lora_cannot_be_attached():
    model = lora()
    with pytest.raises(PeftLinearError, match="has no active ProximalLoRA adapter"):
        attach_proximal(model, SGD(groups(model)))
