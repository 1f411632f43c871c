# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Training on features against AdamW written out, against kernel space, and the sign kernel's approximation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_linear.errors import KernelError
from peft_linear.functional.adam_simulation import simulate_adam
from peft_linear.functional.feature_training import train_on_features
from peft_linear.functional.simulation import simulate_training
from tests.helpers.reference_linear import adamw_in_parameters


EXACT = {"rtol": 1e-9, "atol": 1e-10}
NEAR = {"rtol": 1e-6, "atol": 1e-7}  # the arcsine near 1 turns rounding of 1e-16 into 1e-8
STEPS, PULLED = 9, 8


def problem(seed=0, examples=5, outputs=3, parameters=11, held_out=4):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "J": normal(examples * outputs, parameters),
        "f0": normal(examples, outputs),
        "labels": torch.randint(0, outputs, (examples,), generator=generator),
        "J_held": normal(held_out * outputs, parameters),
        "f0_held": normal(held_out, outputs),
        "labels_held": torch.randint(0, outputs, (held_out,), generator=generator),
        "start": normal(parameters),
        "batches": [torch.randperm(examples, generator=generator)[:2] for _ in range(STEPS)],
        "rates": [0.02 * (1 - step / STEPS) for step in range(STEPS)],
    }


def held_out(p):
    return p["J_held"], p["f0_held"], p["labels_held"]


def assert_is_path(curve, p, path):
    """The curve is what these displacements give."""
    for step, displacement in enumerate(path):
        outputs = p["f0"] + (p["J"] @ displacement).view_as(p["f0"])
        held = p["f0_held"] + (p["J_held"] @ displacement).view_as(p["f0_held"])
        assert_close(curve.train_loss[step], F.cross_entropy(outputs, p["labels"]), **EXACT)
        assert_close(curve.held_out_loss[step], F.cross_entropy(held, p["labels_held"]), **EXACT)
        assert_close(curve.distance[step], displacement.norm(), **EXACT)
        right = (held.argmax(1) == p["labels_held"]).double().mean()
        assert curve.held_out_accuracy[step] == pytest.approx(float(right))
    assert_close(curve.displacement, path[-1], **EXACT)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_adamw_with_the_proximal_term_is_the_algorithm_written_out(mode, selective, clip):
    p = problem()
    path = adamw_in_parameters(
        p["J"], p["f0"], F.cross_entropy, p["labels"], p["rates"], p["batches"], p["start"], PULLED,
        betas=(0.8, 0.95), eps=1e-5, weight_decay=0.3, ridge=6.0, mode=mode, selective=selective, clip=clip,
    )  # fmt: skip
    curve = train_on_features(
        p["J"], p["f0"], p["labels"], learning_rate=p["rates"], steps=STEPS, batches=p["batches"], start=p["start"],
        pulled=PULLED, ridge=6.0, proximal_mode=mode, selective=selective, max_grad_norm=clip, held_out=held_out(p),
        optimizer_arguments={"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3},
    )  # fmt: skip
    assert_is_path(curve, p, path)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
@pytest.mark.parametrize("selective", [False, True])
def test_sgd_on_features_is_gradient_descent_in_kernel_space(mode, selective):
    p = problem(1)
    shared = {"learning_rate": p["rates"], "steps": STEPS, "batches": p["batches"], "ridge": 6.0}
    shared |= {"proximal_mode": mode, "selective": selective}
    on_features = train_on_features(
        p["J"], p["f0"], p["labels"], optimizer=torch.optim.SGD, pulled=PULLED, held_out=held_out(p), **shared
    )
    both, free = torch.cat([p["J"], p["J_held"]]), slice(PULLED, None)
    cross = p["J_held"] @ p["J"].T, p["f0_held"], p["labels_held"]
    base = both[:, free] @ p["J"][:, free].T
    in_kernels = simulate_training(p["J"] @ p["J"].T, p["f0"], p["labels"], held_out=cross, base=base, **shared)
    for name in ("train_loss", "held_out_loss", "distance", "held_out_outputs", "outputs"):
        assert_close(getattr(in_kernels, name), getattr(on_features, name), **EXACT)
    displacement = torch.cat(
        [
            p["J"][:, :PULLED].T @ in_kernels.coefficients,
            p["J"][:, free].T @ in_kernels.base_coefficients,
        ]
    )
    assert_close(displacement, on_features.displacement, **EXACT)


def test_the_selective_rule_changes_the_training_and_keeps_still_while_descent_is_steady():
    p = problem(2)
    shared = {"learning_rate": 1e-3, "steps": 5, "ridge": 50.0, "proximal_mode": "decoupled"}
    always, selective, free = (
        simulate_training(p["J"] @ p["J"].T, p["f0"], p["labels"], **(shared | change))
        for change in ({}, {"selective": True}, {"ridge": 0.0})
    )
    assert always.distance[-1] < 0.95 * free.distance[-1]
    # only the first step fires, where θ = θ0 and the product is 0
    assert always.distance[-1] < selective.distance[-1] < free.distance[-1]
    assert_close(
        selective.distance[-1] - selective.distance[1], free.distance[-1] - free.distance[1], rtol=0.05, atol=0
    )


def test_the_two_modes_differ_in_second_order_only():
    p = problem(3)

    def gap(rate):
        coupled, decoupled = (
            simulate_training(
                p["J"] @ p["J"].T, p["f0"], p["labels"], learning_rate=rate, steps=4, ridge=1.0, proximal_mode=mode
            )
            for mode in ("coupled", "decoupled")
        )
        return float((coupled.outputs - decoupled.outputs).norm())

    assert gap(1e-2) / gap(5e-3) == pytest.approx(4, rel=0.15)


@given(st.integers(1, 12), st.integers(0, 10))
@settings(max_examples=20, deadline=None)
def test_recording_less_often_changes_nothing_but_the_record(every, steps):
    p = problem(4)
    for simulate in (train_on_features, lambda J, *rest, **kw: simulate_training(J @ J.T, *rest, **kw)):
        full = simulate(p["J"], p["f0"], p["labels"], learning_rate=0.05, steps=steps)
        sparse = simulate(p["J"], p["f0"], p["labels"], learning_rate=0.05, steps=steps, record_every=every)
        assert sparse.recorded.tolist() == sorted({*range(0, steps + 1, every), steps})
        assert sparse.steps == full.steps == steps
        assert_close(sparse.train_loss, full.train_loss[sparse.recorded], rtol=0, atol=0)
        assert_close(sparse.outputs, full.outputs, rtol=0, atol=0)


@pytest.mark.parametrize("pulled", [0, 11])
def test_all_or_none_of_the_parameters_may_be_pulled(pulled):
    p = problem(5)
    curve = train_on_features(p["J"], p["f0"], p["labels"], learning_rate=0.1, steps=5, ridge=1e6, pulled=pulled)
    assert (curve.distance[-1] < 1e-4) == (pulled == 11)


def test_other_optimizers_and_losses():
    p = problem(6)
    curve = train_on_features(
        p["J"], p["f0"], p["labels"], learning_rate=0.05, steps=400, loss="squared",
        optimizer=torch.optim.SGD, optimizer_arguments={"momentum": 0.9}, ridge=0.2, proximal_mode="coupled",
    )  # fmt: skip
    closed = simulate_training(p["J"] @ p["J"].T, p["f0"], p["labels"], steps=5000, loss="squared", ridge=0.2)
    assert_close(curve.outputs, closed.outputs, rtol=1e-5, atol=1e-6)
    single = train_on_features(p["J"].float(), p["f0"], p["labels"], learning_rate=0.05, steps=3)
    double = train_on_features(p["J"], p["f0"], p["labels"], learning_rate=0.05, steps=3)
    assert single.train_loss.dtype == torch.float64
    assert_close(single.train_loss, double.train_loss, rtol=1e-5, atol=1e-6)


def parallel(seed):
    """Rows that are ± one and the same: the sign kernel's approximation is exact for them."""
    p = problem(seed)
    sizes = torch.rand(11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    p["J"], p["J_held"] = p["J"][:, :1].sign() * sizes, p["J_held"][:, :1].sign() * sizes
    return p


def sign_kernel(rows, others):
    return (rows @ others.sign().T + rows.sign() @ others.T) / 2


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.999), (0.5, 0.6)])
@pytest.mark.parametrize("selective", [False, True])
def test_the_sign_kernel_is_exact_for_rows_that_differ_in_sign_alone(betas, selective):
    p = parallel(7)
    shared = {"learning_rate": p["rates"], "steps": STEPS, "batches": p["batches"], "ridge": 6.0}
    shared["selective"] = selective
    exact = train_on_features(
        p["J"], p["f0"], p["labels"], pulled=PULLED, held_out=held_out(p),
        optimizer=torch.optim.Adam, optimizer_arguments={"betas": betas, "eps": 1e-30}, **shared,
    )  # fmt: skip
    both, free = torch.cat([p["J"], p["J_held"]]), slice(PULLED, None)
    approximate = simulate_adam(
        sign_kernel(p["J"], p["J"]), p["f0"], p["labels"], betas=betas,
        held_out=(sign_kernel(p["J_held"], p["J"]), p["f0_held"], p["labels_held"]),
        base=sign_kernel(both[:, free], p["J"][:, free]), **shared,
    )  # fmt: skip
    for name in ("train_loss", "held_out_loss", "outputs"):
        assert_close(getattr(approximate, name), getattr(exact, name), **NEAR)
    assert approximate.distance.isnan().all()


def test_outputs_with_coordinates_of_their_own_have_a_scale_of_their_own():
    """As in a linear task head. Within an output the rows differ in sign alone, so that the approximation is exact."""
    p = problem(11, parameters=12)
    own = torch.block_diag(*torch.rand(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1)
    signs, signs_held = p["f0"].sign(), p["f0_held"].sign()
    p["J"] = (signs[..., None] * own).flatten(0, 1)
    p["J_held"] = (signs_held[..., None] * own).flatten(0, 1)
    shared = {"learning_rate": p["rates"], "steps": STEPS, "batches": p["batches"]}
    exact = train_on_features(
        p["J"], p["f0"], p["labels"], optimizer=torch.optim.Adam, optimizer_arguments={"eps": 1e-30}, **shared
    )
    kernel = sign_kernel(p["J"], p["J"])
    assert_close(simulate_adam(kernel, p["f0"], p["labels"], **shared).outputs, exact.outputs, **NEAR)
    as_base = simulate_adam(kernel, p["f0"], p["labels"], base=kernel, ridge=1e9, **shared)
    assert_close(as_base.outputs, exact.outputs, **NEAR)  # nothing is left for λ to pull


def test_rows_without_any_coordinate_stay_where_they_are():
    p = parallel(12)
    p["J"][3:6] = 0
    kernel = sign_kernel(p["J"], p["J"])
    curve = simulate_adam(kernel, p["f0"], p["labels"], learning_rate=0.05, steps=5)
    assert_close(curve.outputs[1], p["f0"][1], rtol=0, atol=0)
    assert not torch.allclose(curve.outputs[0], p["f0"][0]) and curve.outputs.isfinite().all()


def test_the_sign_kernel_is_right_to_a_few_percent_for_the_first_step_on_independent_gaussian_rows():
    p = problem(8, parameters=20_000)
    exact = train_on_features(
        p["J"], p["f0"], p["labels"], learning_rate=1e-5, steps=1, optimizer_arguments={"weight_decay": 0.0}
    )
    approximate = simulate_adam(sign_kernel(p["J"], p["J"]), p["f0"], p["labels"], learning_rate=1e-5, steps=1)
    moved = exact.outputs - p["f0"]
    assert (approximate.outputs - p["f0"] - moved).norm() < 0.05 * moved.norm()


def test_the_scale_of_the_loss_cancels_in_the_sign_kernel_too():
    p = problem(9)
    kernel = sign_kernel(p["J"], p["J"])
    runs = [
        simulate_adam(kernel, p["f0"], p["labels"], learning_rate=0.02, steps=6, loss=loss)
        for loss in (F.cross_entropy, lambda outputs, labels: 1e-3 * F.cross_entropy(outputs, labels))
    ]
    assert_close(runs[0].outputs, runs[1].outputs, **EXACT)
    still = simulate_adam(kernel, p["f0"], p["f0"], learning_rate=0.1, steps=3, loss="squared")
    assert_close(still.outputs, p["f0"], rtol=0, atol=0)  # no gradient: nothing moves, nothing is 0/0
    assert math.isclose(float(still.train_loss[-1]), 0.0)


def bad_calls():
    p = problem(10)
    J, f0, labels = p["J"], p["f0"], p["labels"]
    gram = J @ J.T
    broken = J.clone()
    broken[0, 0] = torch.inf

    def features(rows=J, outputs=f0, **changes):
        return train_on_features(rows, outputs, labels, **({"learning_rate": 0.1, "steps": 3} | changes))

    return {
        "features have shape": lambda: features(J[:4]),
        "features must be float32 or float64": lambda: features(J.half()),
        "features: 1 entries are NaN or infinite": lambda: features(broken),
        "the outputs of features": lambda: features(outputs=f0 * torch.nan),
        "outputs0 must be": lambda: features(J[:5], f0[:, 0]),
        "proximal_mode must be": lambda: features(proximal_mode="projection"),
        "pulled=12 is not a number of parameters": lambda: features(pulled=12),
        "start has shape": lambda: features(start=torch.zeros(3)),
        "held-out features have 2 columns": lambda: features(held_out=(p["J_held"][:, :2], p["f0_held"], labels[:4])),
        "record_every must be at least 1": lambda: features(record_every=0),
        "ridge=-1": lambda: features(ridge=-1),
        "diverged at step": lambda: features(learning_rate=1e200, steps=4, loss="squared"),
        "betas must be in": lambda: simulate_adam(gram, f0, labels, learning_rate=0.1, steps=1, betas=(0.9, 1.0)),
        "base has shape": lambda: simulate_training(gram, f0, labels, steps=1, base=gram[:3]),
        "and, below, of the held-out ones": lambda: simulate_training(
            gram, f0, labels, steps=1, base=gram, held_out=(p["J_held"] @ J.T, p["f0_held"], p["labels_held"])
        ),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input_is_named(message):
    with pytest.raises(KernelError, match=message):
        bad_calls()[message]()
