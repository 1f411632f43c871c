# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Every arm trains, leaves the base model bitwise as it was, and computes the term that it says."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional

from examples.benchmarks.forgetting_language import loss_terms, penalties, queue
from examples.benchmarks.forgetting_language.arms import ARMS, Request, make_arm
from examples.benchmarks.forgetting_language.measures import Measures, divergence
from examples.benchmarks.forgetting_language.plan import DECIDING, OTHERS
from examples.benchmarks.forgetting_language.training import train_and_measure
from examples.benchmarks.language.batches import Encoded
from examples.benchmarks.language.training import with_adapter
from peft_linear.errors import PeftLinearError
from tests.helpers.language import language_model


STEPS = 6


def texts(count, length=9, seed=0):
    rng = random.Random(seed)
    rows = [sorted(rng.randrange(2, 40) for _ in range(length)) for _ in range(count)]
    return [Encoded(row, row) for row in rows]


def request(model, strength=1.0, memo=None):
    return Request(model, strength, 0, STEPS, 0.05, texts(6, seed=1), texts(4, seed=2), {} if memo is None else memo)


def measures(model):
    kinds = {kind: texts(3, seed=seed) for seed, kind in enumerate(("descriptions", "code", "far"))}
    return Measures(model, kinds, texts(4, seed=7), texts(2, seed=8))


@pytest.fixture(scope="module")
def plain():
    model = language_model()
    return train_and_measure(make_arm("lora", request(model)), texts(24, seed=3), texts(4), measures(model), 0.02)


STRENGTHS = {arm: strengths[0] for arm, strengths in (*OTHERS, *DECIDING)} | {"stm": 43.0}


@pytest.mark.parametrize("name", sorted(ARMS))
@pytest.mark.filterwarnings("ignore:the run ends at a KL")
def test_every_arm_trains_and_the_base_model_comes_back(name, plain):
    model = language_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    arm = make_arm(name, request(model, STRENGTHS[name]))
    found = train_and_measure(arm, texts(24, seed=3), texts(4), measures(model), 0.02)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert set(found["scales"]) == {f"{scale:g}" for scale in arm.scales} >= {"1", "0.7"}
    assert 0 < found["trained_steps"] <= STEPS
    assert found["scales"]["1"]["kl_code"] > 0
    if name != "lora":
        assert found["scales"]["1"] != plain["scales"]["1"]


def test_the_plan_names_arms_that_exist():
    assert {name for name, _ in (*DECIDING, *OTHERS)} == set(ARMS)


def test_an_unknown_arm_is_refused():
    with pytest.raises(PeftLinearError, match="no arm 'nothing'"):
        make_arm("nothing", request(language_model()))


def trained(model, arm):
    """An adapter away from its start."""
    manager = with_adapter(model, arm.config(), 0)
    wrapped = manager.__enter__()
    arm.attach(wrapped)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter)
                )
    return manager, wrapped


def test_the_fisher_penalty_is_the_sum_over_weights_and_so_is_its_gradient():
    model = language_model(dtype=torch.float64)
    arm = make_arm("ewc_lora", request(model))
    manager, _ = trained(model, arm)
    layers = penalties.lora_layers(model)
    penalty = arm.penalty()
    penalty.backward()
    for name, layer in layers.items():
        a, b, scaling = penalties.matrices(layer)
        left, right = a.detach().requires_grad_(True), b.detach().requires_grad_(True)
        (0.5 * (arm.fisher[name] * (scaling * right @ left).square()).sum()).backward()
        torch.testing.assert_close(a.grad, left.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(b.grad, right.grad, rtol=1e-6, atol=1e-9)
    dense = sum(
        0.5 * float((arm.fisher[name] * (s * b @ a).square()).sum())
        for name, (a, b, s) in ((name, penalties.matrices(layer)) for name, layer in layers.items())
    )
    assert float(penalty.detach()) == pytest.approx(dense, rel=1e-5)
    assert dense > 0
    manager.__exit__(None, None, None)


@pytest.mark.parametrize("name", ["lalora_diagonal", "lalora_kfac"])
def test_laplace_penalties_are_zero_at_the_start_and_positive_away_from_it(name):
    model = language_model()
    arm = make_arm(name, request(model))
    with with_adapter(model, arm.config(), 0) as wrapped:
        arm.attach(wrapped)
        assert float(arm.penalty().detach()) == 0
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.add_(0.1)
        assert float(arm.penalty().detach()) > 0


def test_a_divergence_is_that_of_torch_and_the_masked_one_leaves_the_label_out():
    torch.manual_seed(0)
    tuned, base = torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    labels = torch.tensor([0, 10, 3, 3, 7])
    expected = functional.kl_div(tuned.log_softmax(-1), base.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )
    assert torch.allclose(divergence(tuned.log_softmax(-1), base.log_softmax(-1)), expected)
    masked = loss_terms.masked_divergence(tuned, base, labels)
    for row, label in enumerate(labels):
        keep = torch.arange(11) != label
        p, q = base[row, keep].softmax(-1), tuned[row, keep].softmax(-1)
        assert float(masked[row]) == pytest.approx(float((p * (p / q).log()).sum()))


def test_a_queue_goes_on_where_it_was(tmp_path):
    from examples.benchmarks.forgetting_language.plan import Run

    class Fake:
        def __init__(self):
            self.done = []

        def run(self, run):
            self.done.append(run)
            full = {"test_loss": 1.0, "kl_descriptions": 0.1, "kl_code": 0.1, "kl_far": 0.1}
            times = dict.fromkeys(("cpu_seconds_per_step", "preparation_cpu_seconds", "peak_mib", "seconds"), 1)
            return {**vars(run), "scales": {"1": full}, **times}

    plan = [Run("m", "t", "lora", 0.0, seed) for seed in range(3)]
    bench = Fake()
    assert queue.work(queue.open_log(tmp_path, None), plan, bench, limit=2) == 2
    assert queue.work(queue.open_log(tmp_path, None), plan, bench) == 1
    assert bench.done == plan
