# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizers that step in several threads: unrelated ones never fail, ProximalLoRA models train as alone."""

from __future__ import annotations

import itertools
import sys
import threading

import pytest
import torch
from torch import nn

from peft_linear.tuners.proximal_lora.state import LiveRecords, live_records
from tests.helpers.proximal_loop import proximal, train
from tests.helpers.reference_proximal import lora_parameters


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


@pytest.fixture(autouse=True)
def switch_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(*functions):
    """Runs the functions at the same time; raises what one of them raised; returns their results."""
    barrier, results, errors = threading.Barrier(len(functions)), {}, []

    def run(index, function):
        barrier.wait()
        try:
            results[index] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    return [results[index] for index in range(len(functions))]


def test_unrelated_optimizers_step_while_models_are_made_and_trained():
    def unrelated():
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = SGD([p], lr=1e-3)
        for _ in range(400):
            optimizer.step()
        return p.detach()

    def models():
        for _ in range(5):
            model = proximal()
            train(model, SGD(lora_parameters(model).values(), lr=0.1))

    alone = unrelated()
    found = together(unrelated, models, unrelated, models)
    assert torch.equal(found[0], alone) and torch.equal(found[2], alone)


@pytest.mark.parametrize(("mode", "selective"), [*itertools.product(["decoupled", "coupled"], [False, True])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_models_trained_in_two_threads_are_those_trained_one_after_the_other(mode, selective, dtype):
    torch.manual_seed(3)
    data = [(torch.randn(6, 5).to(dtype), torch.randint(0, 4, (6,))) for _ in range(15)]

    def made():
        options = {"proximal_mode": mode, "proximal_selective": selective, "proximal_space": "delta"}
        return [proximal(lam=lam, seed=lam, **options).to(dtype) for lam in (1, 5)]

    def fit(model):
        train(model, ADAMW(lora_parameters(model).values(), lr=0.05), data=data)
        return [p.detach().clone() for p in lora_parameters(model).values()]

    expected = [fit(model) for model in made()]
    found = together(*[lambda model=model: fit(model) for model in made()])
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(*expected, strict=True))


def test_records_may_be_added_while_they_are_looked_at():
    class Record:
        pass

    records, kept = LiveRecords(), []

    def add():
        for _ in range(500):
            kept.append(Record())
            records.add(kept[-1])

    def look():
        return [sum(1 for _ in records) for _ in range(200)]

    together(add, look, add, look)
    assert len(records) == 1000 and set(records) == set(kept)
    del kept[1:]
    assert len(records) == 1 and list(records) == kept
    records.clear()
    assert not records and live_records is not records
