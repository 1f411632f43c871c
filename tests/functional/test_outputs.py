# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Kinds of output: their functions against the formulas, and the errors they know against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from peft_linear.errors import OutputError, PeftLinearError
from peft_linear.functional.outputs import (
    IGNORED,
    OUTPUTS,
    Logits,
    LogLikelihood,
    Loss,
    Margin,
    Output,
    RandomProjection,
    kinds_providing,
    recorded_output,
    resolve_output,
    token_kinds,
)


EXACT = {"rtol": 1e-12, "atol": 1e-12}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS, LABELS = numbers(5, 3), torch.tensor([0, 2, 1, 1, 0])
LOSSES = {  # of one example, as a function of f (N, C)
    "logits": lambda f: F.cross_entropy(f, LABELS, reduction="none"),
    "margin": lambda f: F.softplus(-f[:, 0]),
    "log_likelihood": lambda f: -f[:, 0],
    "loss": lambda f: f[:, 0],
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_error_of_a_kind_is_the_gradient_of_its_loss(name):
    output = resolve_output(name)
    values = output(LOGITS, LABELS).requires_grad_()
    (expected,) = torch.autograd.grad(LOSSES[name](values).sum(), values)
    assert_close(output.error(values.detach(), LABELS), expected, **EXACT)


@pytest.mark.parametrize("name", ["logits", "log_likelihood", "loss"])
def test_kinds_of_one_loss_have_the_same_loss(name):
    expected = F.cross_entropy(LOGITS, LABELS, reduction="none")
    assert_close(LOSSES[name](resolve_output(name)(LOGITS, LABELS)), expected, **EXACT)


def test_the_logistic_loss_of_the_margin_is_cross_entropy():
    assert_close(
        LOSSES["margin"](Margin()(LOGITS, LABELS)), F.cross_entropy(LOGITS, LABELS, reduction="none"), **EXACT
    )


def test_float_labels_of_logits_are_targets_of_a_squared_loss():
    targets, output = numbers(5, 3, seed=1), Logits()
    assert output.provides(targets) == {"residual", "error"}
    assert_close(output.error(LOGITS, targets), LOGITS - targets, rtol=0, atol=0)
    assert_close(output.targets(LOGITS, targets), targets, rtol=0, atol=0)


@pytest.mark.parametrize("name, target", [("margin", 1.0), ("log_likelihood", 0.0), ("loss", 0.0)])
def test_the_target_of_a_single_output_is_one_number(name, target):
    values = numbers(4, 1)
    assert_close(resolve_output(name).targets(values, LABELS[:4]), torch.full_like(values, target), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["label_logit", "random_projection"])
def test_a_kind_without_target_or_loss_says_so(name):
    output = resolve_output(name)
    assert not output.provides(LABELS)
    with pytest.raises(OutputError, match=f"outputs of kind '{name}' have no target to regress to"):
        output.targets(LOGITS, LABELS)
    with pytest.raises(OutputError, match=f"outputs of kind '{name}' do not determine a loss"):
        output.error(LOGITS, LABELS)


def test_logits_without_labels_provide_nothing():
    output = Logits()
    assert not output.provides(None)
    with pytest.raises(OutputError, match="logits without labels have no target"):
        output.targets(LOGITS, None)
    with pytest.raises(OutputError, match="logits without labels do not determine a loss"):
        output.error(LOGITS, None)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", [LogLikelihood(), Loss()])
def test_token_kinds_are_sums_and_means_over_labelled_tokens(kind, shift):
    logits, labels = numbers(3, 6, 7), torch.randint(0, 7, (3, 6), generator=torch.Generator().manual_seed(1))
    labels[0, 3:] = labels[2, 1] = IGNORED
    expected = []
    for example in range(3):
        terms = [
            torch.log_softmax(logits[example, t - shift], 0)[labels[example, t]]
            for t in range(shift, 6)
            if labels[example, t] != IGNORED
        ]
        total = torch.stack(terms)
        expected.append(-total.mean() if isinstance(kind, Loss) else total.sum())
    assert_close(kind(logits, labels, shift)[:, 0], torch.stack(expected), **EXACT)


def test_random_projections_depend_on_the_seed_and_keep_their_number():
    one, same, other = (RandomProjection(4).seeded(seed) for seed in (1, 1, 2))
    assert one(LOGITS, None).shape == (5, 4)
    assert torch.equal(one(LOGITS, None), same(LOGITS, None))
    assert not torch.equal(one(LOGITS, None), other(LOGITS, None))
    assert RandomProjection(4) == RandomProjection(4) != RandomProjection(5)
    assert RandomProjection(4).arguments == {"num_projections": 4} and RandomProjection().num_projections == 16


@pytest.mark.parametrize("count", [0, -1, 2.0])
def test_a_number_of_projections_that_is_none_is_refused(count):
    with pytest.raises(PeftLinearError, match="num_projections must be a positive integer, got"):
        RandomProjection(count)


@pytest.mark.parametrize("outputs", ["logit", 3, None])
def test_a_name_that_is_no_kind_is_refused_with_those_that_there_are(outputs):
    with pytest.raises(PeftLinearError, match=f"outputs must be one of 'logits', .*'loss', got {outputs!r}"):
        resolve_output(outputs)


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_name_stands_for_an_object_that_knows_it(name):
    output = resolve_output(name)
    assert output.name == name and resolve_output(output) is output
    assert output.__doc__ and type(recorded_output(name)) is type(output)


def test_what_kinds_provide():
    assert kinds_providing("logits") == ["logits"]
    assert kinds_providing("error") == ["logits", "margin", "log_likelihood", "loss"]
    assert token_kinds() == ["log_likelihood", "random_projection", "loss"]


def test_of_a_recorded_kind_that_is_not_registered_only_the_name_is_known():
    output = recorded_output("of a later version")
    assert not output.provides(LABELS) and output.what(LABELS) == "outputs of kind 'of a later version'"
    assert Output.name == ""


BAD_LABELS = [
    (numbers(5), "one integer label an example, got labels of shape .5,. and dtype torch.float64"),
    (LABELS[:, None], "one integer label an example, got labels of shape .5, 1."),
    (LABELS + 2, r"labels must lie in \[0, 3\) for 3 logits, got values from 2 to 4"),
    (LABELS - 1, r"labels must lie in \[0, 3\) for 3 logits, got values from -1 to 1"),
]


@pytest.mark.parametrize("labels, message", BAD_LABELS)
@pytest.mark.parametrize("name", ["label_logit", "margin", "log_likelihood", "loss"])
def test_labels_that_are_no_classes_are_refused(name, labels, message):
    with pytest.raises(OutputError, match=message):
        resolve_output(name)(LOGITS, labels)


BAD_TOKENS = [
    (numbers(2, 3, 4, 5), torch.zeros(2, 3), "needs logits of shape .batch, labels. or .batch, tokens, vocabulary."),
    (numbers(2, 3, 4), None, "needs a label for every token, shape .2, 3. .-100 where none counts., got none"),
    (numbers(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), "needs a label for every token.* got shape .2, 4."),
    (numbers(2, 3, 4), torch.tensor([[0, 1, 2], [IGNORED] * 3]), "example 1 of a batch has no labelled token"),
]


@pytest.mark.parametrize("logits, labels, message", BAD_TOKENS)
@pytest.mark.parametrize("name", token_kinds())
def test_tokens_without_their_labels_are_refused(name, logits, labels, message):
    with pytest.raises(OutputError, match=message):
        resolve_output(name)(logits, labels)


@pytest.mark.parametrize("name", ["logits", "label_logit", "margin"])
def test_classifier_kinds_refuse_tokens_and_name_the_others(name):
    with pytest.raises(OutputError, match='too many for .*use "log_likelihood", "random_projection" or "loss"'):
        resolve_output(name)(numbers(2, 3, 4), None)
