# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""bfloat16 and float16 adapters are pulled as float32 ones are, at the numbers of docs/how-to/use_trl.md.

There λ = 10 at a learning rate of 2e-4: a pull of 0.2 % a step, less than half a unit in the last place of bfloat16.
Without what the term adds, 200 steps shrink the distance by 0.9999; 0.6706 is right.
"""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_linear.errors import PeftLinearError
from peft_linear.proximal import attach_proximal, proximal_distance
from peft_linear.tuners.proximal_lora.counts import REMAINDERS_KEY
from tests.helpers.function_space import metric, statistics, with_reference
from tests.helpers.proximal_at_rest import SGD, config
from tests.helpers.reference_proximal import ReferenceProximal, lora_parameters


LOW = [torch.bfloat16, torch.float16]
RATE, LAMBDA, STEPS = 2e-4, 10.0, 200
VARIANTS = [
    *itertools.product(["factors", "delta", "function"], ["decoupled", "coupled"], [False, True]),
    ("factors", "projection", False),
]


def ADAMW(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, eps=1e-4)  # squares of 1e-2 are zero in float16


def proximal(dtype, lam=LAMBDA, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 24))
    model = get_peft_model(model, config(lam=lam, r=8, **options), autocast_adapter_dtype=False)
    return with_reference(model).to(dtype)


def displaced(dtype, amount=0.3, **options):
    """The same displacement in each dtype, as near as it can be."""
    model = proximal(dtype, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.copy_(p + (amount * torch.randn(p.shape, generator=generator)).to(torch.bfloat16))
    return model


def gradients(model, noise, generator):
    for p in lora_parameters(model).values():
        p.grad = (noise * torch.randn(p.shape, generator=generator)).to(p)


def shrinkage(dtype, make=SGD, noise=0.0, rate=RATE, steps=STEPS, **options):
    """What the distance is multiplied by, measured on the model's own weights."""
    model = displaced(dtype, **options)
    space = options.get("proximal_space", "factors")
    optimizer, before = make(lora_parameters(model).values(), lr=rate), proximal_distance(model, space=space)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        gradients(model, noise, generator)
        optimizer.step()
    assert all(p.dtype == dtype for p in lora_parameters(model).values())
    return proximal_distance(model, space=space) / before


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("space", "mode", "selective"), VARIANTS)
def test_the_distance_shrinks_as_in_float32(space, mode, selective, dtype):
    options = {"proximal_space": space, "proximal_mode": mode, "proximal_selective": selective}
    right = shrinkage(torch.float32, **options)
    assert shrinkage(dtype, **options) == pytest.approx(right, rel=0.01)
    if (space, mode) == ("factors", "decoupled"):
        assert right == pytest.approx((1 + RATE * LAMBDA) ** -STEPS, rel=1e-3)
    assert (right < 0.7) == (mode != "projection")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("space", "mode"), itertools.product(["factors", "delta", "function"], ["decoupled", "coupled"])
)
def test_the_distance_shrinks_as_in_float32_beside_adam(space, mode, dtype):
    options = {"proximal_space": space, "proximal_mode": mode, "noise": 0.0 if mode == "coupled" else 0.01}
    right = shrinkage(torch.float32, ADAMW, **options)
    assert right < 0.95
    assert shrinkage(dtype, ADAMW, **options) == pytest.approx(right, rel=0.01)


@pytest.mark.parametrize("dtype", LOW)
def test_a_projection_holds_the_distance_as_in_float32(dtype):
    options = {"proximal_mode": "projection", "noise": 1.0, "rate": 0.01, "lam": 8.0}
    right = shrinkage(torch.float32, **options)
    assert right < 0.97 * shrinkage(torch.float32, **options | {"lam": 0.0})
    assert shrinkage(dtype, **options) == pytest.approx(right, rel=0.01)


@pytest.mark.parametrize("make", [SGD, ADAMW])
@pytest.mark.parametrize("space", ["factors", "delta", "function"])
def test_a_bfloat16_run_follows_the_float64_loop_written_by_hand(space, make):
    """With gradients, as well as bfloat16 can: the pulled displacement is the reference's to 2 %."""
    exact = displaced(torch.bfloat16, lam=0.0, proximal_space=space).double()
    model = displaced(torch.bfloat16, proximal_space=space)
    start = lora_parameters(proximal(torch.bfloat16))
    dense = metric(statistics(model)) if space == "function" else None
    reference = ReferenceProximal(exact, lam=LAMBDA, space=space, scaling=0.5, metric=dense)
    reference.start = {name: p.detach().double() for name, p in start.items()}
    runs = [(m, make(lora_parameters(m).values(), lr=0.01)) for m in (exact, model)]
    generators = [torch.Generator().manual_seed(3) for _ in runs]
    for _ in range(20):
        for (each, optimizer), generator in zip(runs, generators, strict=True):
            gradients(each, 0.5, generator)
            if each is exact:
                reference.before_step()
            optimizer.step()
            if each is exact:
                reference.after_step(reference.rates(optimizer))
    for name, p in lora_parameters(model).items():
        expected = lora_parameters(exact)[name]
        error = (p.double() - expected).norm() / (expected - reference.start[name]).norm()
        assert error < 0.02, name


@pytest.mark.parametrize(("space", "mode", "selective"), VARIANTS)
def test_float32_and_float64_keep_no_remainder(space, mode, selective):
    for dtype in (torch.float32, torch.float64):
        model = displaced(dtype, proximal_space=space, proximal_mode=mode, proximal_selective=selective)
        optimizer = SGD(lora_parameters(model).values(), lr=0.1)
        gradients(model, 0.1, torch.Generator().manual_seed(0))
        optimizer.step()
        assert all(REMAINDERS_KEY not in group for group in optimizer.param_groups)


def test_memory_is_four_bytes_a_low_precision_parameter():
    model = displaced(torch.bfloat16)
    optimizer = SGD(lora_parameters(model).values(), lr=0.1)
    gradients(model, 0.0, torch.Generator())
    optimizer.step()
    kept = optimizer.param_groups[0][REMAINDERS_KEY]["default"].values()
    assert sum(t.untyped_storage().nbytes() for t in kept) == 4 * sum(
        p.numel() for p in lora_parameters(model).values()
    )


@pytest.mark.parametrize("make", [SGD, ADAMW])
@pytest.mark.parametrize(("space", "mode", "selective"), VARIANTS)
def test_a_run_resumed_from_saved_states_is_the_uninterrupted_run_bit_for_bit(space, mode, selective, make):
    options = {"proximal_space": space, "proximal_mode": mode, "proximal_selective": selective}

    def continued(model, optimizer, first, last):
        generator = torch.Generator().manual_seed(4)
        for step in range(last):
            gradients(model, 0.1, generator)
            if step >= first:
                optimizer.step()
        return lora_parameters(model)

    whole = displaced(torch.bfloat16, **options)
    optimizer = make(lora_parameters(whole).values(), lr=1e-3)
    continued(whole, optimizer, 0, 5)
    buffer = io.BytesIO()
    torch.save((whole.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    other = displaced(torch.bfloat16, **options)
    other.load_state_dict(weights)
    resumed = make(lora_parameters(other).values(), lr=1e-3)
    resumed.load_state_dict(state)
    expected = continued(whole, optimizer, 5, 12)
    for name, p in continued(other, resumed, 5, 12).items():
        assert torch.equal(p, expected[name]), name


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_an_adapter_that_is_cast_to_float32_during_the_run_loses_nothing(mode):
    model = displaced(torch.bfloat16, proximal_mode=mode)
    optimizer, before = SGD(lora_parameters(model).values(), lr=RATE), proximal_distance(model)
    for step in range(STEPS):
        if step == STEPS // 2:
            model.float()
        gradients(model, 0.0, torch.Generator())
        optimizer.step()
    assert proximal_distance(model) == pytest.approx(before * (1 + RATE * LAMBDA) ** -STEPS, rel=2e-3)
    assert optimizer.param_groups[0][REMAINDERS_KEY] == {"default": {}}


def test_weights_that_are_replaced_do_not_keep_the_remainders_of_others():
    model = displaced(torch.bfloat16)
    optimizer = SGD(lora_parameters(model).values(), lr=1e-3)
    gradients(model, 0.0, torch.Generator())
    optimizer.step()
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.zero_()
    model.peft_config["default"].proximal_lambda = 1e-30
    gradients(model, 0.0, torch.Generator())
    optimizer.step()
    assert all(float(p.abs().max()) < 1e-30 for p in lora_parameters(model).values())


def test_a_skipped_step_changes_no_bit():
    model = displaced(torch.bfloat16)
    optimizer = torch.optim.SGD(lora_parameters(model).values(), lr=1e-3, fused=True)
    gradients(model, 0.0, torch.Generator())
    optimizer.step()
    before = copy.deepcopy((list(lora_parameters(model).values()), optimizer.param_groups[0][REMAINDERS_KEY]))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(model).values(), before[0], strict=True))
    after = optimizer.param_groups[0][REMAINDERS_KEY]["default"]
    assert all(torch.equal(value, before[1]["default"][name]) for name, value in after.items())


@pytest.mark.parametrize("kwargs", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}])
def test_coupled_steps_leave_the_state_in_the_dtype_of_the_factor(kwargs):
    model = displaced(torch.bfloat16, proximal_mode="coupled")
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=RATE, weight_decay=0.0, **kwargs)
    kept = []
    for _ in range(3):
        gradients(model, 0.1, torch.Generator().manual_seed(0))
        kept = [(p, p.grad, p.grad.clone()) for p in lora_parameters(model).values()]
        optimizer.step()
        assert all(p.grad is grad and torch.equal(grad, value) for p, grad, value in kept)
    for p in lora_parameters(model).values():
        moments = {key: value for key, value in optimizer.state[p].items() if key != "step"}
        assert len(moments) >= 2 and all(value.dtype == p.dtype == torch.bfloat16 for value in moments.values())


def test_a_low_precision_optimizer_that_is_attached_is_pulled():
    class Own:
        def __init__(self, params, lr):
            self.param_groups = [{"params": list(params), "lr": lr}]

        def step(self):
            for p in self.param_groups[0]["params"]:
                p.data.sub_(self.param_groups[0]["lr"] * p.grad)

    model = displaced(torch.bfloat16)
    optimizer, before = Own(lora_parameters(model).values(), RATE), proximal_distance(model)
    attach_proximal(model, optimizer)
    gradients(model, 0.0, torch.Generator())
    for _ in range(STEPS):
        optimizer.step()
    assert proximal_distance(model) == pytest.approx(0.6706 * before, rel=0.01)


def test_coupled_steps_of_sharded_low_precision_factors_are_refused():
    from peft_linear.proximal.step import _stepped_in_float32
    from peft_linear.proximal.updates import find_updates

    model = displaced(torch.bfloat16, proximal_mode="coupled")
    gradients(model, 0.0, torch.Generator())
    (update,) = find_updates(SGD(lora_parameters(model).values(), lr=0.1))
    factor = update.factors()[0]
    factor.parameter.device_mesh = factor.parameter.placements = object()  # as on a DTensor
    with pytest.raises(PeftLinearError, match=r"is sharded .* in torch.bfloat16.*autocast_adapter_dtype"):
        _stepped_in_float32(None, factor, torch.zeros(()))
