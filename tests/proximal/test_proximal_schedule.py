# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""λ by step and by module, against loops written by hand; where the position in a schedule is stored."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from peft_linear.errors import PeftLinearError
from peft_linear.proximal import proximal_firing_rate, proximal_strength, proximal_summary
from peft_linear.tuners.proximal_lora import ProximalLoraConfig, set_proximal_schedule
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.proximal_loop import assert_same, batches, groups, lora, proximal, reference_run, risk, train
from tests.helpers.reference_proximal import lora_parameters


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
VARIANTS = [
    {},
    {"selective": True},
    {"mode": "coupled", "selective": True},
    {"mode": "projection"},
    {"space": "delta"},
    {"space": "delta", "mode": "coupled", "selective": True},
]
FACTORS = {  # by hand, of 8 steps
    "linear": lambda t: max(8 - t, 0) / 8,
    "cosine": lambda t: math.cos(math.pi * min(t, 8) / 16) ** 2,
    "warmup": lambda t: min(t, 8) / 8,
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fields(variant):
    return {f"proximal_{key}": value for key, value in variant.items()}


def position(model):
    return find_adapters(model)[0].statistics.position


# --- schedules and patterns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", list(FACTORS))
def test_schedules_equal_the_loop_written_by_hand(name, variant):
    expected, reference = reference_run(ADAMW, lam=lambda _, t: 2.0 * FACTORS[name](t), **variant)
    model = proximal(2.0, proximal_schedule=name, proximal_schedule_steps=8, **fields(variant))
    train(model, ADAMW(groups(model)))
    assert_same(model, expected)
    assert position(model) == 12
    active = [fired for t, fired in enumerate(reference.fired) if FACTORS[name](t) > 1e-12]
    assert proximal_firing_rate(model) == pytest.approx(sum(active) / len(active))
    assert proximal_strength(model) == {"default": pytest.approx(2.0 * FACTORS[name](11), abs=1e-12)}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("pattern", [{"2": 0.0}, {"0": 3.0, "2": 0.0}, {r"\d": 2.0}, {"2": 4.0}], ids=str)
@pytest.mark.parametrize("base", [0.0, 1.0])
def test_patterns_equal_the_loop_written_by_hand(base, pattern, variant):
    def lam(name, step):
        module = name.split(".")[2]
        return pattern.get(module, pattern.get(r"\d", base))

    expected, _ = reference_run(ADAMW, lam=lam, **variant)
    model = proximal(base, proximal_lambda_pattern=pattern, **fields(variant))
    train(model, ADAMW(groups(model)))
    assert_same(model, expected)


def test_a_pattern_of_zeros_and_lambda_zero_are_lora_bit_for_bit():
    plain, model = lora(), proximal(0.0, proximal_lambda_pattern={"0": 0.0})
    train(plain, ADAMW(groups(plain)))
    train(model, ADAMW(groups(model)))
    for a, b in zip(lora_parameters(plain).values(), lora_parameters(model).values(), strict=True):
        assert torch.equal(a, b)
    assert math.isnan(proximal_firing_rate(model))


def test_a_schedule_that_ended_is_lora_bit_for_bit():
    model = proximal(5.0, proximal_schedule="linear", proximal_schedule_steps=4, proximal_selective=False)
    optimizer = SGD(groups(model))
    train(model, optimizer, data=batches(4))
    plain = lora()
    plain.load_state_dict(model.state_dict())
    train(plain, SGD(groups(plain)), data=batches(3))
    train(model, optimizer, data=batches(3))
    for a, b in zip(lora_parameters(plain).values(), lora_parameters(model).values(), strict=True):
        assert torch.equal(a, b)


def test_the_first_pattern_that_matches_is_used_and_patterns_may_change():
    model = proximal(1.0, proximal_lambda_pattern={"2": 5.0, r"\d": 7.0})
    strengths = find_adapters(model)[0].strengths
    assert [strengths.base(name) for name in ("0", "2")] == [7.0, 5.0]
    model.peft_config["default"].proximal_lambda_pattern = {"0": 3.0}
    assert [strengths.base(name) for name in ("0", "2")] == [3.0, 1.0]
    model.peft_config["default"].proximal_lambda_pattern["0"] = -3.0
    with pytest.raises(PeftLinearError, match=r"proximal_lambda_pattern\['0'\] must be a finite number >= 0"):
        train(model, SGD(groups(model)))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_pattern_that_matches_nothing_is_refused_before_the_model_is_changed(mixed):
    base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    config = ProximalLoraConfig(target_modules=["0"], proximal_lambda_pattern={"quary": 1.0})
    with pytest.raises(PeftLinearError, match="the key 'quary', which matches no module of the model"):
        get_peft_model(base, config, mixed=mixed)
    assert all(type(module) is nn.Linear for module in base)


def test_a_pattern_may_match_only_modules_without_adapter():
    """As after restricting the adapter."""
    base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    get_peft_model(base, ProximalLoraConfig(target_modules=["0"], proximal_lambda_pattern={"1": 1.0}))


def test_parameters_are_matched_by_their_own_name_as_by_rank_pattern():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 4, 3))

        def forward(self, x):
            return torch.einsum("bi,eij,ejk->bk", x, self.up, self.down)

    net = nn.Sequential(Experts())
    pattern = {"0.up": 3.0}
    config = ProximalLoraConfig(
        target_parameters=["0.up", "0.down"],
        target_modules=[],
        r=2,
        rank_pattern={"0.up": 1},
        proximal_lambda=1.5,
        proximal_lambda_pattern=pattern,
    )
    adapter = find_adapters(get_peft_model(net, config))[0]
    found = {
        layer.parameter_name: (layer.r["default"], adapter.strengths.base(name))
        for name, layer, *_ in adapter.layers()
    }
    assert found == {"up": (1, 3.0), "down": (2, 1.5)}


# --- the position in a schedule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kill=st.integers(0, 12), make=st.sampled_from([SGD, ADAMW]))
def test_a_plain_loop_killed_anywhere_continues_with_its_optimizers_state(variant, kill, make):
    def new():
        model = proximal(2.0, proximal_schedule="cosine", proximal_schedule_steps=10, **fields(variant))
        return model, make(groups(model))

    whole, optimizer = new()
    train(whole, optimizer)
    killed, optimizer = new()
    if kill:
        train(killed, optimizer, data=batches()[:kill])
    buffer = io.BytesIO()
    torch.save((killed.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    resumed, other = new()
    weights, state = torch.load(buffer, weights_only=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    if kill < 12:
        train(resumed, other, data=batches()[kill:])
        for a, b in zip(lora_parameters(whole).values(), lora_parameters(resumed).values(), strict=True):
            assert torch.equal(a, b)
        assert proximal_firing_rate(resumed) == proximal_firing_rate(whole)
        assert position(resumed) == position(whole) == 12


def test_a_saved_state_does_not_change_and_a_new_optimizer_starts_from_zero():
    model = proximal(2.0, proximal_schedule="linear", proximal_schedule_steps=24)
    optimizer = SGD(groups(model))
    train(model, optimizer)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    train(model, optimizer)
    assert state["param_groups"] == kept["param_groups"]
    assert proximal_strength(model)["default"] == pytest.approx(2 / 24)
    train(model, SGD(groups(model)), data=batches(1))
    assert position(model) == 1 and proximal_strength(model)["default"] == 2.0


def test_optimizers_that_share_an_adapter_count_separately():
    model = proximal(2.0, proximal_schedule="linear", proximal_schedule_steps=24)
    optimizers = [SGD([group]) for group in groups(model)]
    for batch in batches():
        model.zero_grad()
        risk(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert position(model) == 12
    assert find_adapters(model)[0].statistics.total().steps == 24


def test_two_models_in_one_optimizer_are_counted_separately():
    models = [proximal(2.0, proximal_schedule="linear", proximal_schedule_steps=24) for _ in range(2)]
    optimizer = SGD([p for model in models for p in lora_parameters(model).values()], lr=0.1)
    for index, batch in enumerate(batches(6)):
        optimizer.zero_grad()
        for model in models[: 1 + index % 2]:
            risk(model, batch).backward()
        optimizer.step()
    assert [position(model) for model in models] == [6, 3]
    assert {label: counts["steps"] for label, counts in optimizer.param_groups[0]["proximal_lora"].items()} == {
        "default": 6,
        "default#2": 3,
    }


@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("mode", ["decoupled", "coupled", "projection"])
def test_a_step_of_nested_optimizers_is_counted_once(mode, selective):
    class Outer(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            return self.inner.step()

    for schedule in ("linear", "warmup"):  # the last begins with λ = 0
        variant = {"mode": mode, "selective": selective}
        expected, _ = reference_run(SGD, lam=lambda _, t, s=schedule: 2.0 * FACTORS[s](t), **variant)
        model = proximal(2.0, proximal_schedule=schedule, proximal_schedule_steps=8, **fields(variant))
        train(model, Outer(SGD(groups(model))))
        assert position(model) == 12
        assert_same(model, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_are_not_counted(fused):
    torch.set_default_dtype(torch.float32)
    model = proximal(2.0, proximal_schedule="linear", proximal_schedule_steps=8, proximal_selective=False)
    optimizer, scaler = ADAMW(groups(model), fused=fused), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for index, batch in enumerate(batches(6)):
        optimizer.zero_grad()
        scaler.scale(risk(model, batch)).backward()
        if index == 3:
            next(iter(lora_parameters(model).values())).grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    assert position(model) == 5
    assert proximal_strength(model)["default"] == pytest.approx(2 * (1 - 4 / 8))


# --- a function as schedule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("selective", [True, False])
def test_a_function_is_a_schedule_and_none_restores_the_configured_one(selective):
    expected, _ = reference_run(SGD, lam=lambda _, t: 2.0 * 0.5**t, selective=selective)
    model = proximal(2.0, proximal_schedule="warmup", proximal_schedule_steps=5, proximal_selective=selective)
    set_proximal_schedule(model, lambda t: 0.5**t)
    train(model, SGD(groups(model)))
    assert_same(model, expected)
    assert proximal_summary(model)["proximal_lambda"] == 2.0 * 0.5**11
    set_proximal_schedule(model, None, "default")
    assert proximal_summary(model)["proximal_lambda"] == 2.0


@pytest.mark.parametrize("value", [-1.0, float("nan"), None])
def test_a_function_that_returns_no_strength_is_refused_at_its_step(value):
    model = proximal()
    set_proximal_schedule(model, lambda t: value if t == 2 else 1.0)
    with pytest.raises(PeftLinearError, match="the value of the schedule at step 2 must be a finite number >= 0"):
        train(model, SGD(groups(model)))


def test_the_schedule_of_an_unknown_adapter_cannot_be_set():
    with pytest.raises(PeftLinearError, match="no ProximalLoRA adapter 'unknown'"):
        set_proximal_schedule(proximal(), None, "unknown")


def test_the_summary_names_adapters_whose_lambda_differs():
    model = proximal(2.0)
    options = {"target_modules": ["0"], "r": 2}
    model.add_adapter("other", ProximalLoraConfig(proximal_lambda=5.0, **options))
    model.base_model.set_adapter(["default", "other"])
    summary = proximal_summary(model)
    assert (summary["proximal_lambda_default"], summary["proximal_lambda_other"]) == (2.0, 5.0)
    assert "proximal_lambda" not in summary
