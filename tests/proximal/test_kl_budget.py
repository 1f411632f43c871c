# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A run ends at its budget of KL, from any λ; it says so where it does not; it is resumed as if never stopped."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_linear import KlBudget, ProximalLoraConfig, kl_to_base
from peft_linear.errors import PeftLinearError
from peft_linear.proximal import attach_proximal, proximal_strength
from tests.helpers.language import language_model
from tests.helpers.reference_proximal import lora_parameters


STEPS, RATE = 80, 0.02


def adapted(strength=30.0, seed=1, **options):
    base = language_model()
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    if strength is None:
        return get_peft_model(base, LoraConfig(**settings))
    config = ProximalLoraConfig(proximal_lambda=strength, **{"proximal_space": "delta"} | options, **settings)
    return get_peft_model(base, config)


def ids(count, seed, length=12):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(2, 40, (4, length), generator=generator)} for _ in range(count)]


REFERENCE = ids(2, 5)


def optimizer_of(model):
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=RATE, weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / STEPS))


def steps(model, optimizer, scheduler, budget, batches):
    for batch in batches:
        optimizer.zero_grad()
        # tokens in ascending order: something to learn
        inputs = batch["input_ids"].sort(dim=1).values
        model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
        if budget is not None:
            budget.step()
        scheduler.step()


def run(model, target=None, **options):
    optimizer, scheduler = optimizer_of(model)
    budget = None
    if target is not None:
        budget = KlBudget(model, optimizer, REFERENCE, target, num_steps=STEPS, scheduler=scheduler, **options)
    steps(model, optimizer, scheduler, budget, ids(STEPS, 9))
    return budget


@pytest.fixture(scope="module")
def free():
    """The KL of a run without a pull."""
    model = adapted(0.0)
    run(model)
    return kl_to_base(model, REFERENCE)


@pytest.mark.parametrize("strength", [0.3, 3.0, 30.0, 300.0, 3000.0])
def test_a_run_ends_at_its_budget_from_any_lambda(free, strength):
    target = 0.3 * free
    model = adapted(strength)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget = run(model, target)
    assert kl_to_base(model, REFERENCE) == pytest.approx(target, rel=0.2)
    last = budget.history[-1]
    assert last.step == STEPS and last.kl == pytest.approx(kl_to_base(model, REFERENCE), rel=1e-6)
    assert [each.step for each in budget.history] == [*range(6, STEPS, 6), STEPS]
    assert list(proximal_strength(model).values()) == [last.strength]


@pytest.mark.parametrize("options", [{"proximal_space": "factors"}, {"proximal_mode": "coupled"}], ids=str)
def test_other_forms_of_the_pull_are_steered_too(free, options):
    model = adapted(3.0, **options)
    run(model, 0.3 * free)
    assert kl_to_base(model, REFERENCE) == pytest.approx(0.3 * free, rel=0.35)


def test_it_starts_from_the_lambda_of_the_plan(free):
    model = adapted("auto")
    optimizer, scheduler = optimizer_of(model)
    attach_proximal(model, optimizer, num_steps=STEPS, scheduler=scheduler)
    budget = KlBudget(model, optimizer, REFERENCE, 0.3 * free, num_steps=STEPS, scheduler=scheduler)
    steps(model, optimizer, scheduler, budget, ids(STEPS, 9))
    assert budget.history[-1].kl == pytest.approx(0.3 * free, rel=0.2)


def test_a_budget_that_is_not_used_up_is_said_and_leaves_the_run_next_to_lora(free):
    model = adapted(0.1)
    with pytest.warns(UserWarning, match="the run forgets less than it may"):
        run(model, 100 * free)
    assert kl_to_base(model, REFERENCE) == pytest.approx(free, rel=0.1)


def test_a_budget_that_is_missed_is_said(free):
    """The learning rate falls to zero at once, after a first step that goes too far."""
    model = adapted(1e-3)
    optimizer = torch.optim.SGD(lora_parameters(model).values(), lr=5.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 4 else 1e-9)
    budget = KlBudget(model, optimizer, REFERENCE, 1e-6, num_steps=10, scheduler=scheduler)
    with pytest.warns(UserWarning, match=r"the target was 1e-06: the pull came too late .* scale"):
        steps(model, optimizer, scheduler, budget, ids(10, 9))


def test_a_resumed_run_is_the_uninterrupted_one(free):
    whole = adapted(3.0)
    run(whole, 0.3 * free)
    model = adapted(3.0)
    optimizer, scheduler = optimizer_of(model)
    budget = KlBudget(model, optimizer, REFERENCE, 0.3 * free, num_steps=STEPS, scheduler=scheduler)
    batches = ids(STEPS, 9)
    steps(model, optimizer, scheduler, budget, batches[:30])
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    weights = {name: p.detach().clone() for name, p in lora_parameters(model).items()}

    resumed = adapted(3.0)
    with torch.no_grad():
        for name, parameter in lora_parameters(resumed).items():
            parameter.copy_(weights[name])
    optimizer, scheduler = optimizer_of(resumed)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    budget = KlBudget(resumed, optimizer, REFERENCE, 0.3 * free, num_steps=STEPS, scheduler=scheduler)
    steps(resumed, optimizer, scheduler, budget, batches[30:])
    for name, parameter in lora_parameters(whole).items():
        assert torch.equal(parameter, lora_parameters(resumed)[name])


def test_what_cannot_be_steered_is_refused():
    model = adapted()
    optimizer, _ = optimizer_of(model)
    for target in (0.0, -1.0, float("nan"), float("inf"), "0.05", True):
        with pytest.raises(PeftLinearError, match="target_kl must be a finite number of nats > 0"):
            KlBudget(model, optimizer, REFERENCE, target, num_steps=10)
    for options, message in (
        ({"num_steps": 0}, "num_steps must be a positive number"),
        ({"num_steps": 10, "every": 0}, "every must be a positive number"),
    ):
        with pytest.raises(PeftLinearError, match=message):
            KlBudget(model, optimizer, REFERENCE, 0.1, **options)
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(PeftLinearError, match="holds no factor"):
        KlBudget(model, other, REFERENCE, 0.1, num_steps=10)
    for model, message in (
        (adapted(0.0), "has λ = 0, which no gain changes"),
        (adapted(1.0, proximal_space="factors", proximal_mode="projection"), "proximal_mode='projection'"),
        (
            adapted(1.0, proximal_selective=True),
            "proximal_selective=True: its pull acts at steps that the rule picks",
        ),
        (adapted(None), "ProximalLoRA"),
    ):
        optimizer, _ = optimizer_of(model)
        with pytest.raises(PeftLinearError, match=message):
            KlBudget(model, optimizer, REFERENCE, 0.1, num_steps=10)
