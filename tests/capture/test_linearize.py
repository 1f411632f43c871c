# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_linear.capture.linearize import LinearizedModel, linearize
from peft_linear.capture.ntk import compute_ntk
from peft_linear.errors import OutputError, TargetError
from peft_linear.functional.regression import dual_distance, solve_ridge
from peft_linear.kernels.regression import fit_kernel_regression
from tests.small_models import (
    ENCODER,
    VOCABULARY,
    Recurrent,
    bert,
    causal_batches,
    gpt2,
    image_batches,
    llama,
    seeded,
    text_batches,
    vit,
)


def t5_lm():
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def seq2seq_batches():
    batches = text_batches()
    for batch in batches:
        batch["labels"] = batch["input_ids"][:, :4].clone()
        batch["labels"][1:, 3] = -100
    return batches


def plain(batches):
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


MODELS = {
    "bert": (bert, {}, text_batches),
    "gpt2": (gpt2, {}, text_batches),
    "gpt2 lm": (gpt2, {"causal": True}, causal_batches),
    "llama": (llama, {}, text_batches),
    "llama lm": (llama, {"causal": True}, causal_batches),
    "t5 lm": (t5_lm, {}, seq2seq_batches),
    "vit": (vit, {}, image_batches),
    "custom": (Recurrent, {}, lambda: plain(text_batches())),
}
FLOAT32_INSIDE = ("llama", "llama lm", "t5 lm")  # their norms compute in float32 whatever the model's type


def with_adapter(factory, rank=2, **kwargs):
    """A float64 model with an adapter whose B is not 0, and the task head trained where there is one."""
    model = seeded(factory, **kwargs)
    heads = [name for name in ("classifier", "score") if hasattr(model, name)]
    targets = ["step", "gate"] if isinstance(model, Recurrent) else "all-linear"
    config = LoraConfig(target_modules=targets, r=rank, init_lora_weights=False, modules_to_save=heads or None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, config).double().eval()


def moved(linearized, size=0.05, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in linearized.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return linearized


def build(name):
    factory, kwargs, batches = MODELS[name]
    model = with_adapter(factory, **kwargs)
    return model, moved(linearize(model)), batches()[0]


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def function_of(model, batch):
    return lambda parameters: logits(functional_call(model, parameters, (), batch))


def flat(values):
    return torch.cat([value.reshape(-1) for value in values.values()])


def dense_jacobian(model, linearized, batch):  # (n, P)
    rows = torch.func.jacrev(function_of(model, batch), chunk_size=1)(linearized.anchor_state_dict())
    n = logits(model(**batch)).numel()
    return torch.cat([rows[name].reshape(n, -1) for name in linearized.names], dim=1).detach()


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


def snapshot(model):
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "grad": [parameter.grad for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key in before["state"]:
        assert_close(before["state"][key], after["state"][key], rtol=0, atol=0)
    for key in before.keys() - {"state"}:
        assert before[key] == after[key], key


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
        with pytest.raises((IndexError, ValueError)):
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


def test_training_the_linear_model_trains_only_its_own_parameters():
    model, linearized, batch = build("bert")
    names = [name.replace("/", ".").removeprefix("theta.") for name, _ in linearized.named_parameters()]
    assert tuple(names) == linearized.names == tuple(n for n, p in model.named_parameters() if p.requires_grad)
    assert any("modules_to_save" in name for name in names)
    before = snapshot(model)
    optimizer = torch.optim.SGD(linearized.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = linearized(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_same(before, snapshot(model))


def test_the_start_is_kept_when_the_wrapped_model_is_fine_tuned():
    model, linearized, batch = build("bert")
    before = linearized(**batch).logits.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3
    assert_close(linearized(**batch).logits, before, rtol=0, atol=0)


def test_gradients_of_gradients_are_refused():
    _, linearized, batch = build("custom")
    (gradient, *_) = torch.autograd.grad(
        linearized(**batch).square().sum(), list(linearized.parameters()), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_frozen_parameter_gets_no_gradient_and_single_precision_works():
    model = with_adapter(bert).float()
    linearized = moved(linearize(model))
    frozen, *rest = linearized.parameters()
    frozen.requires_grad_(False)
    linearized(**text_batches()[0]).loss.backward()
    assert frozen.grad is None and all(parameter.grad is not None for parameter in rest)
    assert linearized(**text_batches()[0]).logits.dtype == torch.float32


def test_parameters_go_to_a_file_a_real_model_and_back(tmp_path):
    model, linearized, batch = build("bert")
    other = linearize(model)
    assert other.distance() == 0 and linearized.distance() > 0
    other.load_state_dict(linearized.state_dict())
    assert_close(other(**batch).logits, linearized(**batch).logits, rtol=0, atol=0)

    twin = with_adapter(bert)
    assert linearized.to_adapter(twin) is twin
    for name, value in linearized.adapter_state_dict().items():
        assert torch.equal(twin.get_parameter(name), value)
    again = linearize(model).load_parameters_from(twin)
    assert again.distance() == linearized.distance()
    expected = functional_call(model, linearized.adapter_state_dict(), (), batch).logits
    assert linearized.to_adapter() is model
    assert_close(model(**batch).logits, expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_copy_is_independent():
    _, linearized, batch = build("bert")
    before = linearized(**batch).logits.detach()
    copied = copy.deepcopy(linearized)
    moved(copied, 1.0)
    assert_close(linearized(**batch).logits, before, rtol=0, atol=0)
    assert not torch.allclose(copied(**batch).logits, before)
    assert copied.wrapped is not linearized.wrapped


def test_it_says_what_it_is_and_moves_with_its_model():
    model, linearized, batch = build("bert")
    assert repr(linearized).startswith("LinearizedModel(BertForSequenceClassification, ")
    assert linearized.config is model.config
    linearized.float()
    assert linearized(**batch).logits.dtype == torch.float32
    assert all(not key.startswith("wrapped") for key in linearized.state_dict())


def dense_problem(ridge_over_largest=0.2):
    """A model, its whole batch, the Jacobian, the residual of one-hot targets and a ridge that converges quickly."""
    model = with_adapter(bert)
    linearized = linearize(model)
    batch = text_batches(sizes=(4,))[0]
    jacobian = dense_jacobian(model, linearized, plain([batch])[0])
    targets = F.one_hot(batch["labels"], 3).double()
    residual = (targets - model(**batch).logits.detach()).reshape(-1)
    gram = jacobian @ jacobian.T
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    return model, linearized, batch, jacobian, targets, residual, gram, largest, ridge_over_largest * largest


def test_gradient_descent_with_the_proximal_term_converges_to_the_closed_form():
    # Σ_i ½‖f̄(x_i) − y_i‖² + (λ/2)‖θ−θ0‖², the loss scale of solve_ridge.
    _, linearized, batch, jacobian, targets, residual, gram, largest, ridge = dense_problem()
    alpha = solve_ridge(gram, residual, ridge)
    start = linearized.anchor_state_dict()
    optimizer = torch.optim.SGD(linearized.parameters(), lr=2 / (largest + 2 * ridge))
    for _ in range(60):
        optimizer.zero_grad()
        outputs = linearized(**plain([batch])[0]).logits
        moves = zip(linearized.parameters(), start.values(), strict=True)
        penalty = sum((parameter - anchor).square().sum() for parameter, anchor in moves)
        (0.5 * (outputs - targets).square().sum() + 0.5 * ridge * penalty).backward()
        optimizer.step()
    outputs = linearized(**plain([batch])[0]).logits.detach()
    assert_close(outputs, targets - ridge * alpha.view_as(targets), rtol=1e-6, atol=1e-7)
    expected = jacobian.T @ alpha
    error = (flat(linearized.displacement()) - expected).norm() / expected.norm()
    assert error < 1e-6
    assert linearized.distance() == pytest.approx(dual_distance(gram, alpha), rel=1e-6)


def test_dual_coefficients_become_an_adapter():
    model, linearized, batch, jacobian, targets, residual, gram, _, ridge = dense_problem()
    alpha = solve_ridge(gram, residual, ridge).view_as(targets)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 4))]
    assert linearized.load_dual_coefficients(alpha, halves) is linearized
    assert_close(flat(linearized.displacement()), jacobian.T @ alpha.reshape(-1), rtol=1e-9, atol=1e-10)
    assert_close(linearized(**batch).logits, targets - ridge * alpha, rtol=1e-9, atol=1e-10)

    # The real model at θ0 + tJᵀα is the linear one up to O(t²).
    origin = model(**batch).logits.detach()
    gaps = []
    for t in (1e-2, 5e-3):
        real = linearize(model).load_dual_coefficients(t * alpha, [batch]).to_adapter(with_adapter(bert))
        gaps.append((real(**batch).logits - origin - t * (gram @ alpha.reshape(-1)).view_as(origin)).norm().item())
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


def test_kernels_of_an_adapter_are_solved_into_that_adapter():
    model = with_adapter(bert)
    batches = text_batches(sizes=(3, 2))
    kernels = compute_ntk(model, batches, progress=False)
    fit = fit_kernel_regression(kernels, ridge=float(kernels.spectrum().eigenvalues[0]) / 10)
    solved = linearize(model).load_dual_coefficients(fit.alpha, batches)
    with torch.no_grad():
        outputs = torch.cat([solved(**batch).logits for batch in batches])
    assert_close(outputs, fit.predictions, rtol=1e-8, atol=1e-8)
    assert solved.distance() == pytest.approx(fit.distance, rel=1e-8)


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


def test_what_cannot_be_linearised_is_named():
    inputs, labels = torch.randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(OutputError, match="Unusual runs an operation without forward-mode AD"):
        linearize(Unusual("no forward mode"))(inputs)
    for kind in ("dict", "tuple"):
        with pytest.raises(OutputError, match="the loss of Unusual is none that can be taken"):
            moved(linearize(Unusual(kind)))(inputs, labels=labels)
    assert moved(linearize(Unusual("dict")))(inputs)["loss"] is None


def test_bad_input_is_named():
    model, linearized, batch = build("bert")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TargetError, match="no parameter of PeftModel requires a gradient"):
        linearize(model)
    with pytest.raises(TargetError, match="parameters are missing, first 'base_model"):
        linearized.load_parameters_from({})
    with pytest.raises(TargetError, match="parameters are missing"):
        linearized.to_adapter(nn.Linear(2, 2))
    with pytest.raises(TargetError, match=r"has shape \(4, 16\), expected \(2, 16\)"):
        linearized.load_parameters_from(with_adapter(bert, rank=4))
    with pytest.raises(OutputError, match="N=3 examples, got shape .4, 3."):
        linearized.load_dual_coefficients(torch.ones(4, 3), [batch])
    with pytest.raises(OutputError, match="alpha has 2 columns for 3 outputs"):
        linearized.load_dual_coefficients(torch.ones(3, 2), [batch])


def test_linearize_is_the_class():
    assert isinstance(linearize(with_adapter(bert)), LinearizedModel)
