# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering, BertForTokenClassification

from peft_linear.capture.linearize import linearize
from peft_linear.errors import OutputError
from tests.helpers.linear_models import (
    FLOAT32_INSIDE,
    MODELS,
    assert_same,
    build,
    dense_jacobian,
    flat,
    function_of,
    logits,
    moved,
    plain,
    seq2seq_batches,
    snapshot,
    t5_lm,
    with_adapter,
)
from tests.helpers.small_models import ENCODER, bert, causal_batches, llama, text_batches


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_torch_func_jvp(name):
    model, linearized, batch = build(name)
    with sdpa_kernel(SDPBackend.MATH):
        start, tangent = torch.func.jvp(
            function_of(model, batch), (linearized.anchor_state_dict(),), (linearized.displacement(),)
        )
    output = logits(linearized(**batch))
    assert tangent.abs().max() > 0.01
    assert_close(output, start + tangent, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert_close(logits(linearized(**batch)), output, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_central_differences(name):
    model, linearized, batch = build(name)
    start, delta, step = linearized.anchor_state_dict(), linearized.displacement(), 1e-4
    function = function_of(model, batch)
    with torch.no_grad():
        ends = [function({key: start[key] + sign * step * delta[key] for key in start}) for sign in (1, -1)]
        difference = (ends[0] - ends[1]) / (2 * step)
        tolerance = 5e-2 if name in FLOAT32_INSIDE else 1e-6
        scale = difference.abs().max().item()
        assert_close(logits(linearized(**batch)) - function(start), difference, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "custom"])
def test_outputs_and_gradients_are_those_of_the_dense_jacobian(name):
    model, linearized, batch = build(name)
    jacobian = dense_jacobian(model, linearized, batch)
    displacement = flat(linearized.displacement()).requires_grad_()
    start = function_of(model, batch)(linearized.anchor_state_dict()).detach()
    slow = start + (jacobian @ displacement).view_as(start)
    fast = logits(linearized(**batch))
    tolerance = 1e-6 if name in FLOAT32_INSIDE else 1e-11
    assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    labels = torch.arange(len(start)) % start.shape[1]
    (expected,) = torch.autograd.grad(F.cross_entropy(slow, labels), displacement)
    F.cross_entropy(fast, labels).backward()
    gradient = torch.cat([parameter.grad.reshape(-1) for parameter in linearized.parameters()])
    assert expected.abs().max() > 1e-2
    assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


def test_the_model_is_affine_in_its_parameters_and_exact_at_the_start():
    model, linearized, batch = build("gpt2")
    start, delta = linearized.anchor_state_dict(), linearized.displacement()
    with torch.no_grad():
        origin = model(**batch).logits
        once = linearized(**batch).logits
        for factor in (0.0, -1.0, 3.0):
            there = {key: start[key] + factor * delta[key] for key in start}
            output = linearized.linear_outputs(there, **batch).logits
            assert_close(output, origin + factor * (once - origin), rtol=1e-10, atol=1e-10)
        assert_close(linearized(**batch).logits, once, rtol=0, atol=0)


def token_labels(batch):
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100) % 3


def own_loss_cases():
    def bert_of(kind, labels=3):
        return lambda: kind(BertConfig(**ENCODER | {"num_labels": labels}))

    text, causal, seq2seq = text_batches()[0], causal_batches()[0], seq2seq_batches()[0]
    floats = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)
    spans = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 3, 4])}
    tokens = text | {"labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)}

    def shifted(out, labels):
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def flat_tokens(out, labels):
        return F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())

    return {
        "classes": (bert, text, lambda out: F.cross_entropy(out.logits, text["labels"])),
        "several labels": (
            bert,
            text | {"labels": (floats > 0).double()},
            lambda out: F.binary_cross_entropy_with_logits(out.logits, (floats > 0).double()),
        ),
        "regression": (
            lambda: bert(num_labels=1),
            text | {"labels": floats[0]},
            lambda out: F.mse_loss(out.logits[:, 0], floats[0]),
        ),
        "tokens": (
            bert_of(BertForTokenClassification),
            text | {"labels": token_labels(text)},
            lambda out: flat_tokens(out, token_labels(text)),
        ),
        "masked": (bert_of(BertForMaskedLM), tokens, lambda out: flat_tokens(out, tokens["labels"])),
        "spans": (
            bert_of(BertForQuestionAnswering, 2),
            plain([text])[0] | spans,
            lambda out: (
                (
                    F.cross_entropy(out.start_logits, spans["start_positions"])
                    + F.cross_entropy(out.end_logits, spans["end_positions"])
                )
                / 2
            ),
        ),
        "causal": (lambda: llama(causal=True), causal, lambda out: shifted(out, causal["labels"])),
        "causal, summed": (
            lambda: llama(causal=True),
            causal | {"num_items_in_batch": 7},
            lambda out: shifted(out, causal["labels"]) * (causal["labels"][:, 1:] != -100).sum() / 7,
        ),
        "seq2seq": (t5_lm, seq2seq, lambda out: flat_tokens(out, seq2seq["labels"])),
    }


@pytest.mark.parametrize("case", own_loss_cases())
def test_the_loss_is_the_models_own_of_linearised_logits(case):
    factory, batch, expected = own_loss_cases()[case]
    model = with_adapter(factory)
    linearized = moved(linearize(model), 0.1)
    output = linearized(**batch)
    assert type(output) is type(model(**batch))
    own = expected(output)
    assert_close(output.loss.double(), own, rtol=1e-6, atol=1e-6)  # language models cast their logits to float32
    assert abs(output.loss - model(**batch).loss) > 1e-4
    by_loss = torch.autograd.grad(output.loss, list(linearized.parameters()), retain_graph=True)
    by_logits = torch.autograd.grad(own, list(linearized.parameters()))
    for fast, slow in zip(by_loss, by_logits, strict=True):
        assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert_close(linearized(**batch).loss, output.loss, rtol=0, atol=0)


def test_other_outputs_are_linearised_too_and_caches_left_out():
    model, linearized, batch = build("llama lm")
    output = linearized(**batch, output_hidden_states=True, use_cache=True)
    assert output.past_key_values is None
    assert len(output.hidden_states) == 3
    start = linearized.anchor_state_dict()
    hidden = functional_call(model, start, (), batch | {"output_hidden_states": True}).hidden_states
    assert_close(output.hidden_states[0], hidden[0], rtol=0, atol=0)  # below every adapter
    assert not torch.allclose(output.hidden_states[2], hidden[2])
    as_tuple = linearized(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_close(as_tuple[0], output.loss)
    assert_close(as_tuple[1], output.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_the_model_is_left_as_it_was_found_also_after_an_exception(attention):
    model = with_adapter(bert)
    model.base_model.model.bert.encoder.train()  # a mixture of modes
    model.base_model.model.config._attn_implementation = attention
    before = snapshot(model)
    assert before["config"]["problem_type"] is None
    linearized = moved(linearize(model))
    linearized.train()
    batch = text_batches()[0]
    linearized.linear_outputs(linearized.adapter_state_dict(), **batch)
    if attention != "flex_attention":  # which has no backward pass on a CPU
        linearized(**batch).loss.backward()
        linearized.load_dual_coefficients(torch.ones(3, 3), [batch])
    assert_same(before, snapshot(model))
    for broken in ({"input_ids": batch["input_ids"] + 10_000}, {"nonsense": 1}):
        with pytest.raises((IndexError, TypeError, ValueError)):
            linearized(**broken)
        assert_same(before, snapshot(model))


def test_fused_attention_gives_the_same_numbers():
    outputs = []
    for attention in ("sdpa", "eager", "flex_attention"):
        model = with_adapter(bert)
        model.base_model.model.config._attn_implementation = attention
        with torch.no_grad():
            outputs.append(moved(linearize(model))(**text_batches()[0]).logits)
    for output in outputs[1:]:
        assert_close(output, outputs[0], rtol=1e-12, atol=1e-12)


def test_dropout_is_off_in_training_mode():
    model = with_adapter(bert).train()
    assert not torch.equal(model(**text_batches()[0]).logits, model(**text_batches()[0]).logits)
    linearized = moved(linearize(model)).train()
    first, second = (linearized(**text_batches()[0]).logits for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_inference_mode_keeps_the_tangents(name):
    _, linearized, batch = build(name)
    with torch.no_grad():
        expected = linearized(**batch).logits
    with torch.inference_mode():
        inputs = {key: value.clone() for key, value in batch.items()}
        assert_close(linearized(**inputs).logits, expected, rtol=0, atol=0)
        there = {key: value.clone() for key, value in linearized.adapter_state_dict().items()}
        assert_close(linearized.linear_outputs(there, **inputs).logits, expected, rtol=0, atol=0)


def test_autocast_rounds_the_tangents_and_keeps_them():
    model = with_adapter(bert).float()
    linearized, batch = moved(linearize(model), 0.3), text_batches()[0]
    exact, start = linearized(**batch).logits, linearized.start_outputs(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linearized(**batch).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.1 * (exact - start).norm()


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Unusual(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 3)

    def forward(self, inputs, labels=None):
        scores = self.linear(inputs)
        if self.kind == "no forward mode":
            return NoForwardMode.apply(scores)
        loss = None if labels is None else -scores.log_softmax(1).gather(1, labels[:, None]).mean()
        return {"loss": loss, "logits": scores} if self.kind == "dict" else (loss, scores)


def test_an_operation_without_forward_mode_is_named():
    with pytest.raises(OutputError, match="Unusual runs an operation without forward-mode AD"):
        linearize(Unusual("no forward mode"))(torch.randn(2, 4))


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_a_loss_that_cannot_be_linearised_is_named(kind):
    with pytest.raises(OutputError, match="the loss of Unusual cannot be taken of linearised logits"):
        moved(linearize(Unusual(kind)))(torch.randn(2, 4), labels=torch.tensor([0, 1]))


def test_a_model_of_such_a_loss_is_linearised_without_labels():
    assert moved(linearize(Unusual("dict")))(torch.randn(2, 4))["loss"] is None
