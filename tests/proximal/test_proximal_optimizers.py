# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The pull of an unopposed displacement, 1/(1+ηλ) a step, under optimizers of other packages and unusual set-ups."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from peft_linear.proximal import proximal_distance
from tests.helpers.proximal_at_rest import SGD, config, displaced, proximal
from tests.helpers.proximal_loop import assert_same, batches, groups, reference_run, risk, train
from tests.helpers.proximal_loop import proximal as looped
from tests.helpers.reference_proximal import lora_parameters


RATE, STEPS = 0.01, 30
RIGHT = (1 + 2 * RATE) ** -STEPS  # λ = 2


def shrinkage(model, step):
    before = proximal_distance(model)
    for _ in range(STEPS):
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.grad = torch.zeros_like(p)
        step()
    return proximal_distance(model) / before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[
            (name, {"weight_decay": 0})
            for name in ("Adam8bit", "AdamW8bit", "PagedAdamW8bit", "AdamW32bit", "Lion8bit")
        ],
        ("SGD8bit", {"momentum": 0.9}),
    ],
)
def test_bitsandbytes(name, options):
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = displaced(proximal())
    optimizer = getattr(library.optim, name)(lora_parameters(model).values(), lr=RATE, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        assert shrinkage(model, optimizer.step) == pytest.approx(RIGHT, rel=1e-5)


def test_adafactor_of_transformers_and_of_torch():
    from transformers.optimization import Adafactor

    options = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    for make, kwargs in ((Adafactor, options), (torch.optim.Adafactor, {})):
        model = displaced(proximal())
        optimizer = make(lora_parameters(model).values(), lr=RATE, **kwargs)
        assert shrinkage(model, optimizer.step) == pytest.approx(RIGHT, rel=1e-5)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_a_compiled_step(mode):
    model = displaced(proximal(proximal_mode=mode))
    optimizer = SGD(lora_parameters(model).values(), lr=RATE)
    right = RIGHT if mode == "decoupled" else (1 - 2 * RATE) ** STEPS
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    assert shrinkage(model, step) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("mode", ["decoupled", "coupled", "projection"])
def test_optimizers_in_the_backward_pass_equal_the_loop_written_by_hand(mode):
    """One optimizer a factor, stepped as soon as its gradient is there."""
    expected, _ = reference_run(SGD, mode=mode)
    model = looped(proximal_mode=mode)
    for group in groups(model):
        for p in group["params"]:
            optimizer = SGD([p], lr=group["lr"])

            def update(parameter, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(update)
    for batch in batches():
        risk(model, batch).backward()
    assert_same(model, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_model_with_its_copied_optimizer_trains_alike(dtype):
    model = looped().to(dtype)
    data = [(x.to(dtype), y) for x, y in batches(8)]
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.05)
    train(model, optimizer, data=data[:4])
    other, others = copy.deepcopy((model, optimizer))
    train(model, optimizer, data=data[4:])
    train(other, others, data=data[4:])
    pairs = zip(lora_parameters(model).values(), lora_parameters(other).values(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_an_adapter_added_after_the_optimizer_was_made():
    model = displaced(proximal())
    optimizer = SGD(lora_parameters(model).values(), lr=RATE)
    model.add_adapter("late", config())
    model.set_adapter("late")
    late = [p for name, p in model.named_parameters() if ".late." in name]
    with torch.no_grad():
        for p in late:
            p.add_(0.5)
    optimizer.add_param_group({"params": late})
    assert shrinkage(model, optimizer.step) == pytest.approx(RIGHT, rel=1e-5)


def test_a_factor_in_two_optimizers_is_pulled_in_each():
    model = displaced(proximal())
    optimizers = [SGD(lora_parameters(model).values(), lr=RATE) for _ in range(2)]

    def step():
        for optimizer in optimizers:
            optimizer.step()

    assert shrinkage(model, step) == pytest.approx(RIGHT**2, rel=1e-5)
