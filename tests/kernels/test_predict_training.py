# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_linear.capture.features import jacobian_features
from peft_linear.capture.ntk import compute_ntk, compute_sign_kernel
from peft_linear.errors import KernelError, OutputError, TargetError
from peft_linear.functional.simulation import simulate_training
from peft_linear.kernels.training import predict_training
from tests.helpers.small_models import bert, seeded, text_batches


EXACT = {"rtol": 1e-9, "atol": 1e-11}
TARGETS = r".*layer\.[01]\.attention\.self\.(query|value)"


@pytest.fixture(scope="module")
def setting():
    model, batches = seeded(bert), text_batches(sizes=(4, 3))
    kernels = compute_ntk(model, batches, TARGETS, rank=2, progress=False)
    features = jacobian_features(model, batches, TARGETS, rank=2, progress=False)
    signs = compute_sign_kernel(model, batches, TARGETS, rank=2, progress=False)
    return kernels, features, signs


@settings(max_examples=12, deadline=None)
@given(chosen=st.sets(st.integers(0, 3)), held_out=st.sets(st.integers(0, 6), min_size=0, max_size=6))
def test_any_subset_and_any_split_is_sgd_on_their_features(setting, chosen, held_out):
    kernels, features, _ = setting
    names = [kernels.names[number] for number in sorted(chosen)]
    held_out = sorted(held_out)
    train = [number for number in range(7) if number not in held_out]
    part = features.subset(names)
    batches = [torch.tensor([step % len(train)]) for step in range(6)]
    shared = {"learning_rate": 0.05, "steps": 6, "batches": batches, "proximal_mode": "decoupled", "ridge": 2.0}
    slow = part.select_examples(train).train(
        held_out=part.select_examples(held_out) if held_out else None, optimizer=torch.optim.SGD, **shared
    )
    curve = predict_training(kernels, names, held_out=held_out, **shared)
    assert_close(curve.train_loss, slow.train_loss, **EXACT)
    assert_close(curve.distance, slow.distance, **EXACT)
    assert (curve.held_out_loss is None) == (not held_out)
    if held_out:
        assert_close(curve.held_out_loss, slow.held_out_loss, **EXACT)
        assert_close(curve.held_out_accuracy, slow.held_out_accuracy, **EXACT)


def test_the_head_is_pulled_only_on_request(setting):
    kernels, _, _ = setting
    shared = {"learning_rate": 0.05, "steps": 20, "ridge": 15.0}
    free, pulled = (predict_training(kernels, pull_base=pull, **shared) for pull in (False, True))
    assert pulled.distance[-1] < free.distance[-1]
    plain = simulate_training(kernels.subset(), kernels.outputs, kernels.labels, **shared)
    assert_close(pulled.outputs, plain.outputs, rtol=0, atol=0)
    far = predict_training(kernels, learning_rate=1e-3, steps=30, ridge=1e9, proximal_mode="decoupled")
    head_alone = predict_training(kernels, [], learning_rate=1e-3, steps=30)
    assert_close(far.outputs, head_alone.outputs, rtol=1e-5, atol=1e-6)  # λ → ∞: the adapters stay where they are


def test_sign_kernels_predict_adam(setting):
    kernels, features, signs = setting
    shared = {"learning_rate": 3e-3, "steps": 15}
    adam = features.select_examples(range(5)).train(
        held_out=features.select_examples([5, 6]), optimizer_arguments={"weight_decay": 0.0}, **shared
    )
    predicted = predict_training(signs, held_out=[5, 6], **shared)
    descent = predict_training(kernels, held_out=[5, 6], **shared)
    drop = adam.train_loss[0] - adam.train_loss[-1]
    assert (predicted.train_loss[-1] - adam.train_loss[-1]).abs() < 0.5 * drop
    assert (descent.train_loss[-1] - adam.train_loss[-1]).abs() > 0.5 * drop
    assert predicted.distance.isnan().all() and predicted.held_out_loss.shape == (16,)


BAD_CALLS = [
    ({"held_out": [7]}, KernelError, r"held_out must be different numbers in \[0, 7\), got \[7\]"),
    ({"held_out": [1, 1]}, KernelError, "must be different numbers"),
    ({"held_out": range(7)}, KernelError, "all 7 examples are held out"),
    ({"names": "nothing"}, TargetError, "no kernel of a module 'nothing'"),
]


@pytest.mark.parametrize("arguments, error, message", BAD_CALLS)
def test_bad_calls_are_named(setting, arguments, error, message):
    kernels, _, _ = setting
    with pytest.raises(error, match=message):
        predict_training(kernels, steps=1, **arguments)


def test_kernels_without_labels_need_labels_to_be_given():
    unlabelled = compute_ntk(
        seeded(bert), [{k: v for k, v in text_batches()[0].items() if k != "labels"}], TARGETS, progress=False
    )
    with pytest.raises(OutputError, match="hold no labels"):
        predict_training(unlabelled, steps=1)
    assert predict_training(unlabelled, labels=torch.tensor([0, 1, 2]), steps=1).steps == 1
