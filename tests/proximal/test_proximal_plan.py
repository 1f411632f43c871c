# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""λ from the planned run: the sums of rates against loops that are run; loops of one's own; logs and warnings."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers
from transformers import SchedulerType, get_scheduler

from peft_linear import attach_proximal
from peft_linear.errors import PeftLinearError
from peft_linear.proximal import proximal_distance, proximal_exponent, proximal_strength, proximal_summary
from peft_linear.proximal.plan import planned_sums
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from peft_linear.tuners.proximal_lora.config import AUTO_EXPONENTS, SPACES
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.proximal_loop import batches, groups, lora, proximal, risk, train
from tests.helpers.reference_proximal import lora_parameters


STEPS = 24
SETTINGS = {
    "polynomial": {"lr_end": 1e-3, "power": 2.0},
    "cosine_with_restarts": {"num_cycles": 3},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 6},
}
DEPENDENT = ("reduce_lr_on_plateau", "greedy")  # their rates depend on the run


def optimizer_of(rates=(0.05, 0.2), kind=SGD):
    return kind([{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates], lr=0.1)


def of_transformers(name):
    def make(optimizer):
        return get_scheduler(name, optimizer, 4, STEPS, SETTINGS.get(name))

    return make


def in_sequence(optimizer):
    parts = [
        schedulers.LinearLR(optimizer, 0.1, 1.0, total_iters=5),
        schedulers.CosineAnnealingLR(optimizer, STEPS - 10),
        schedulers.ExponentialLR(optimizer, 0.8),
    ]
    return schedulers.SequentialLR(optimizer, parts, milestones=[5, 16])


def chained(optimizer):
    parts = [schedulers.ConstantLR(optimizer, 0.3, total_iters=4), schedulers.ExponentialLR(optimizer, 0.9)]
    return schedulers.ChainedScheduler(parts)


OF_TORCH = {
    "lambdas": lambda o: schedulers.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t]),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "step": lambda o: schedulers.StepLR(o, 5, 0.5),
    "multi step": lambda o: schedulers.MultiStepLR(o, [3, 9]),
    "linear": lambda o: schedulers.LinearLR(o, 0.2, total_iters=8),
    "polynomial": lambda o: schedulers.PolynomialLR(o, STEPS, power=2),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 7, eta_min=1e-3),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5, T_mult=2),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=STEPS),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "sequence": in_sequence,
    "chain": chained,
}
OF_TRANSFORMERS = {kind.value: of_transformers(kind.value) for kind in SchedulerType if kind.value not in DEPENDENT}


def run(optimizer, scheduler, steps):
    """The rates of the steps, by group."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def everything(optimizer, scheduler):
    state = {key: value for key, value in scheduler.state_dict().items() if not callable(value)}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return repr((state, groups)), optimizer.state_dict()["state"]


@pytest.mark.parametrize("done", [0, 1, 11, 20])
@pytest.mark.parametrize("make", [*OF_TORCH.values(), *OF_TRANSFORMERS.values()], ids=[*OF_TORCH, *OF_TRANSFORMERS])
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_the_planned_sum_is_that_of_the_rates_of_the_whole_run_and_nothing_changes(make, done):
    optimizer = optimizer_of()
    scheduler = make(optimizer)
    rates = run(optimizer, scheduler, done)
    before = everything(optimizer, scheduler)
    planned = planned_sums(optimizer, scheduler, STEPS)
    assert everything(optimizer, scheduler) == before
    rates += run(optimizer, scheduler, STEPS - done)
    assert planned.guess == ""
    assert planned.sums == pytest.approx([sum(column) for column in zip(*rates, strict=True)], rel=1e-9)


@pytest.mark.parametrize("make", [*OF_TORCH.values(), *OF_TRANSFORMERS.values()], ids=[*OF_TORCH, *OF_TRANSFORMERS])
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_a_resumed_run_plans_the_same_sum_bit_for_bit(make):
    optimizer = optimizer_of()
    scheduler = make(optimizer)
    first = planned_sums(optimizer, scheduler, STEPS)
    run(optimizer, scheduler, 9)
    other = optimizer_of()
    resumed = make(other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert planned_sums(other, resumed, STEPS) == first


def test_a_scheduler_that_the_run_decides_is_planned_as_constant_and_says_why():
    optimizer = optimizer_of()
    planned = planned_sums(optimizer, schedulers.ReduceLROnPlateau(optimizer), 10)
    assert planned.sums == pytest.approx((0.5, 2.0))
    assert "ReduceLROnPlateau cannot be simulated" in planned.guess


class Counting(schedulers.LRScheduler):
    """Has state of its own that a copy which is set back to its start still has."""

    def get_lr(self):
        self.calls = getattr(self, "calls", -1) + 1
        return [rate / (1 + self.calls) for rate in self.base_lrs]


def test_a_scheduler_that_cannot_be_set_back_is_planned_at_its_start_and_as_constant_later():
    optimizer = optimizer_of()
    scheduler = Counting(optimizer)
    assert planned_sums(optimizer, scheduler, 3).sums == pytest.approx((0.05 * 11 / 6, 0.2 * 11 / 6))
    run(optimizer, scheduler, 2)
    planned = planned_sums(optimizer, scheduler, 3)
    assert "does not come to the present learning rates" in planned.guess
    assert planned.sums == pytest.approx((0.15, 0.6))


def test_rates_in_tensors_are_planned():
    optimizer = optimizer_of((torch.tensor(0.5, dtype=torch.float64),))
    for scheduler, total in ((None, 2.0), (schedulers.ExponentialLR(optimizer, 0.5), 0.9375)):
        assert planned_sums(optimizer, scheduler, 4).sums == pytest.approx((total,))
        assert optimizer.param_groups[0]["lr"] == 0.5


def test_accelerates_wrapper_of_a_scheduler_is_planned():
    optimizer = optimizer_of()
    accelerator = Accelerator(cpu=True)
    wrapped, scheduler = accelerator.prepare(optimizer, schedulers.StepLR(optimizer, 1, 0.5))
    assert planned_sums(wrapped, scheduler, 2).sums == pytest.approx((0.075, 0.3))


# --- "auto" in loops of one's own ---------------------------------------------------------------------------------


def automatic(**kwargs):
    return proximal("auto", **kwargs)


def lambda_of(model):
    return proximal_strength(model)["default"]


@pytest.mark.parametrize("space", SPACES)
def test_the_sum_that_is_given_sets_lambda_of_each_space(space):
    model = automatic(proximal_space=space)
    assert math.isnan(lambda_of(model))
    attach_proximal(model, SGD(groups(model)), total=0.25)
    assert lambda_of(model) == AUTO_EXPONENTS[space] / 0.25
    assert model.peft_config["default"].proximal_lambda == lambda_of(model)


def test_every_space_has_an_exponent():
    assert set(SPACES) <= set(AUTO_EXPONENTS)


def test_steps_and_scheduler_give_the_sum_of_the_largest_group():
    model = automatic()
    optimizer = SGD(groups(model))  # 0.05 for A, 0.2 for B
    attach_proximal(model, optimizer, num_steps=10)
    assert lambda_of(model) == pytest.approx(1 / 2.0)
    scheduler = schedulers.LambdaLR(optimizer, lambda t: 1 - t / 10)
    attach_proximal(model, optimizer, num_steps=10, scheduler=scheduler)
    assert lambda_of(model) == pytest.approx(1 / 1.1)


def test_a_group_without_factors_does_not_count():
    model = automatic()
    optimizer = SGD([*groups(model), {"params": [nn.Parameter(torch.zeros(3))], "lr": 100.0}])
    attach_proximal(model, optimizer, num_steps=10)
    assert lambda_of(model) == pytest.approx(0.5)


def test_an_unopposed_displacement_loses_the_share_that_auto_promises():
    model = automatic()
    parameters = list(lora_parameters(model).values())
    optimizer = SGD(parameters, lr=1e-3)
    attach_proximal(model, optimizer, num_steps=500)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1.0)
    find_adapters(model)[0].stepped = True  # the anchor is where the adapter was made
    before = proximal_distance(model)
    for _ in range(500):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert proximal_distance(model) / before == pytest.approx(math.exp(-1), rel=2e-3)
    summary = proximal_summary(model)
    assert summary["proximal_exponent"] == pytest.approx(1.0)
    assert summary["proximal_removed_share"] == pytest.approx(1 - math.exp(-1))
    assert "proximal_firing_rate" not in summary


def test_auto_trains_exactly_what_its_number_trains():
    model, other = automatic(), proximal(1 / 2.4)
    for each in (model, other):
        optimizer = AdamW(groups(each))
        attach_proximal(each, optimizer, num_steps=12)
        train(each, optimizer)
    for a, b in zip(lora_parameters(model).values(), lora_parameters(other).values(), strict=True):
        assert torch.equal(a, b)
    assert proximal_exponent(model) == pytest.approx(1.0)


@pytest.mark.parametrize("fields", [{}, {"proximal_lambda_pattern": {"0": 0.0}}])
def test_without_a_plan_the_first_step_is_an_error_and_changes_nothing(fields):
    model = automatic(**fields)
    optimizer = AdamW(groups(model))
    before = copy.deepcopy(model.state_dict())
    risk(model, batches(1)[0]).backward()
    with pytest.raises(PeftLinearError, match=r"'auto' is c/Σ .*attach_proximal\(model, optimizer, num"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    attach_proximal(model, optimizer, total=1.0)  # as the message says
    optimizer.step()
    assert proximal_exponent(model) == pytest.approx(0.2)


def test_a_pattern_that_names_all_modules_needs_no_plan():
    model = automatic(proximal_lambda_pattern={r"\d": 2.0})
    train(model, SGD(groups(model)), data=batches(2))
    assert proximal_exponent(model) == pytest.approx(2 * 2.0 * 0.2)
    assert "proximal_lambda" not in proximal_summary(model)


def test_lambda_zero_needs_no_plan_and_is_lora_bit_for_bit():
    plain, model = lora(), proximal(0.0)
    train(plain, AdamW(groups(plain)))
    optimizer = AdamW(groups(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_proximal(model, optimizer, num_steps=12)
    train(model, optimizer)
    for a, b in zip(lora_parameters(plain).values(), lora_parameters(model).values(), strict=True):
        assert torch.equal(a, b)
    assert proximal_exponent(model) == 0.0


def test_another_run_of_the_model_has_its_own_lambda_and_one_that_the_user_sets_stays():
    model = automatic()
    optimizer = SGD(groups(model))
    for total in (0.5, 4.0):
        attach_proximal(model, optimizer, total=total)
        assert lambda_of(model) == 1 / total
    model.peft_config["default"].proximal_lambda = 3.0
    attach_proximal(model, optimizer, total=1.0)
    assert lambda_of(model) == 3.0
    model.peft_config["default"].proximal_lambda = "auto"
    attach_proximal(model, optimizer, total=1.0)
    assert lambda_of(model) == 1.0


def test_one_configuration_serves_two_models():
    config = ProximalLoraConfig(target_modules=["0"])
    models = [get_peft_model(nn.Sequential(nn.Linear(3, 3)), config) for _ in range(2)]
    for model, total in zip(models, (0.5, 4.0), strict=True):
        attach_proximal(model, SGD(model.parameters(), lr=0.1), total=total)
    assert [lambda_of(model) for model in models] == [2.0, 0.25]
    assert config.proximal_lambda == "auto"


def test_the_number_is_saved_and_auto_is_where_no_run_was_planned(tmp_path):
    model = automatic()
    for planned, expected in ((False, "auto"), (True, 4.0)):
        if planned:
            attach_proximal(model, SGD(groups(model)), total=0.25)
        model.save_pretrained(tmp_path)
        base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
        loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        assert loaded.peft_config["default"].proximal_lambda == expected
    attach_proximal(loaded, SGD(groups(loaded)), total=1.0)
    assert lambda_of(loaded) == 4.0


def test_a_copy_of_the_model_keeps_its_plan():
    model = automatic()
    attach_proximal(model, SGD(groups(model)), total=0.25)
    other = copy.deepcopy(model)
    attach_proximal(other, SGD(groups(other)), total=0.5)
    assert (lambda_of(model), lambda_of(other)) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 0.0}, "total, the sum of the learning rates, must be a finite number > 0, got 0.0"),
        ({"total": math.inf}, "must be a finite number > 0, got inf"),
        ({"total": True}, "must be a finite number > 0, got True"),
        ({"total": 1.0, "num_steps": 3}, "give the sum of the learning rates .* not both"),
        ({"scheduler": object()}, "scheduler needs num_steps"),
        ({"num_steps": 0}, "num_steps must be a positive number of optimizer steps, got 0"),
        ({"num_steps": 2.5}, "num_steps must be a positive number of optimizer steps, got 2.5"),
    ],
)
def test_a_plan_that_is_none_is_refused(arguments, message):
    model = automatic()
    with pytest.raises(PeftLinearError, match=message):
        attach_proximal(model, SGD(groups(model)), **arguments)
    assert math.isnan(lambda_of(model))


def test_rates_that_cannot_be_known_are_taken_as_constant_with_a_warning_also_after_a_resume():
    model, resumed = automatic(), automatic()
    optimizer, other = SGD(groups(model)), SGD(groups(resumed))
    scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=0)
    with pytest.warns(UserWarning, match="ReduceLROnPlateau cannot be simulated .*constant learning rates"):
        attach_proximal(model, optimizer, num_steps=10, scheduler=scheduler)
    for _ in range(4):
        scheduler.step(1.0)
    assert optimizer.param_groups[1]["lr"] < 0.2
    other.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="cannot be simulated"):
        attach_proximal(resumed, other, num_steps=10, scheduler=schedulers.ReduceLROnPlateau(other))
    assert lambda_of(model) == lambda_of(resumed) == pytest.approx(0.5)


# --- warnings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exponent", "fields", "message"),
    [
        (0.04, {}, "λ·Ση = 0.04 is below 0.05, so the pull removes 3.9% of what no gradient opposes"),
        (0.06, {}, None),
        (19, {}, None),
        (21, {}, "λ·Ση = 21 is above 20.0, so the pull holds the adapter at the pretrained model"),
        (21, {"proximal_lambda_pattern": {r"\d": 1.0}}, None),
        (0.0, {}, None),
        (0.04, {"proximal_mode": "coupled"}, None),
        (0.04, {"proximal_selective": True}, "is below 0.05"),
        (200, {"proximal_selective": True}, None),
    ],
)
def test_a_number_that_is_far_off_is_warned_of_where_the_run_is_known(exponent, fields, message):
    model = proximal(exponent, **fields)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach_proximal(model, SGD(groups(model)), total=1.0)
    texts = [str(each.message) for each in caught]
    assert len(texts) == (message is not None)
    assert message is None or message in texts[0]


# --- what is logged -----------------------------------------------------------------------------------------------


def test_the_exponent_follows_rates_schedule_and_selection():
    model = proximal(2.0, proximal_schedule="linear", proximal_schedule_steps=4)
    train(model, SGD(groups(model)), data=batches(6))
    assert proximal_exponent(model) == pytest.approx(2.0 * 0.2 * (1 + 0.75 + 0.5 + 0.25))
    chosen = proximal(2.0, proximal_selective=True)
    train(chosen, SGD(groups(chosen)))
    summary = proximal_summary(chosen)
    assert proximal_exponent(chosen) == pytest.approx(summary["proximal_firing_rate"] * 12 * 2.0 * 0.2)


def test_a_resumed_optimizer_continues_the_exponent():
    model = proximal(2.0)
    optimizer = SGD(groups(model))
    train(model, optimizer, data=batches(2))
    other = SGD(groups(model))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, other, data=batches(1))
    assert proximal_exponent(model) == pytest.approx(3 * 2.0 * 0.2)


@pytest.mark.parametrize("mode", ["coupled", "projection"])
def test_modes_whose_lambda_has_another_unit_log_no_exponent(mode):
    model = proximal(0.5, proximal_mode=mode)
    train(model, SGD(groups(model)), data=batches(3))
    assert proximal_exponent(model) == 0.0
    assert "proximal_removed_share" not in proximal_summary(model)
    assert ("proximal_firing_rate" in proximal_summary(model)) == (mode == "projection")
