# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""compute_ntk against Jacobians taken one example and one output at a time, and its laws."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_linear.capture.adapter_spaces import initial_lora_a
from peft_linear.capture.engine import computation
from peft_linear.functional.outputs import RandomProjection
from tests import reference
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk, sign_kernel


EXACT = {"rtol": 1e-10, "atol": 1e-12}
ARCHITECTURES = {
    "bert": (small.bert, small.text_batches()),
    "bert-eager": (lambda: small.bert(attn_implementation="eager"), small.text_batches()),
    "roberta": (small.roberta, small.text_batches()),
    "distilbert": (small.distilbert, small.text_batches()),
    "gpt2": (small.gpt2, small.text_batches()),
    "llama": (small.llama, small.text_batches()),
    "llama-left": (small.llama, small.text_batches(padding="left")),
    "qwen3": (small.qwen3, small.text_batches()),
    "t5": (small.t5, small.t5_batches()),
    "vit": (small.vit, small.image_batches()),
}


@pytest.fixture(params=ARCHITECTURES)
def case(request):
    factory, batches = ARCHITECTURES[request.param]
    return small.seeded(factory), batches


def test_weight_kernels_and_the_head_are_exact(case):
    model, batches = case
    kernels = ntk(model, batches, space="weight")
    parameters = dict(model.named_parameters())
    for name in kernels.names:
        expected = reference.kernel(model, [parameters[f"{name}.weight"]], batches, reference.logits)
        assert_close(kernels[name], expected, **EXACT)
    head = [p for key, p in parameters.items() if key.split(".")[0] in kernels.provenance["always_trained"]]
    assert head
    assert_close(kernels.base, reference.kernel(model, head, batches, reference.logits), **EXACT)
    expected = torch.cat([reference.logits(model, one) for b in batches for one in reference.example_batches(b)])
    assert_close(kernels.outputs.reshape(-1), expected.detach(), **EXACT)
    assert kernels.labels.tolist() == [int(label) for batch in batches for label in batch["labels"]]


@pytest.mark.parametrize("b_scale", [0.0, 0.3])
def test_lora_kernels_are_exact(case, b_scale):
    model, batches = case
    fresh = ntk(model, batches, rank=3, lora_alpha=5)
    peft_model = reference.with_lora(model, fresh.names, rank=3, lora_alpha=5, b_scale=b_scale)
    carried = ntk(peft_model, batches)
    assert carried.names == fresh.names
    for name in fresh.names:
        parameters = reference.lora_parameters(peft_model, name)
        expected = reference.kernel(peft_model, parameters, batches, reference.logits)
        assert_close(carried[name], expected, **EXACT)
        assert_close(carried[f"base_model.model.{name}"], expected, **EXACT)
        if b_scale == 0.0:
            assert_close(fresh[name], expected, **EXACT)
        assert fresh.num_parameters[name] == carried.num_parameters[name] == sum(p.numel() for p in parameters)


def test_weight_kernels_count_the_parameters_of_the_lora_adapter_that_is_considered():
    model, batches = small.seeded(small.bert), small.text_batches()
    assert ntk(model, batches, space="weight", rank=5).num_parameters == ntk(model, batches, rank=5).num_parameters


@pytest.mark.parametrize("space", ["rows", "columns", "bias"])
def test_other_spaces_are_slices_of_the_weight_and_bias_jacobians(space):
    model, batches = small.seeded(small.bert), small.text_batches()
    kernels = ntk(model, batches, space=space, rank=5)
    parameters = dict(model.named_parameters())
    for name in kernels.names:
        weight = parameters[f"{name}.weight"]
        if space == "bias":
            rows = reference.jacobian(model, [parameters[f"{name}.bias"]], batches, reference.logits)
        else:
            rows = reference.jacobian(model, [weight], batches, reference.logits).view(-1, *weight.shape)
            rows = (rows[:, :5] if space == "rows" else rows[..., :5]).flatten(1)
        assert_close(kernels[name], rows @ rows.T, **EXACT)
        assert kernels.num_parameters[name] == rows.shape[1]


def test_a_module_called_three_times_and_one_never_called():
    model, batches = small.seeded(small.Recurrent), small.text_batches()
    kernels = ntk(model, batches, space="weight", targets=["step", "gate", "unused"], always_trained=["head"])
    for name in ("step", "gate"):
        expected = reference.kernel(
            model, [getattr(model, name).weight], batches, lambda m, b: m(b["input_ids"], b["attention_mask"])[0]
        )
        assert_close(kernels[name], expected, **EXACT)
    assert not kernels["unused"].any()
    assert kernels.provenance["no_gradient"] == ["unused"]


def test_log_likelihood_of_a_causal_model():
    for padding in ("right", "left"):
        model, batches = small.seeded(small.llama, causal=True), small.causal_batches(padding=padding)
        kernels = ntk(model, batches, space="weight", outputs="log_likelihood")
        parameters = dict(model.named_parameters())
        for name in kernels.names:
            expected = reference.kernel(
                model, [parameters[f"{name}.weight"]], batches, reference.sequence_log_likelihood
            )
            assert_close(kernels[name], expected, **EXACT)
        assert "lm_head" not in kernels
        assert not kernels.base.any()


def test_scalar_outputs_are_exact():
    model, batches = small.seeded(small.bert), small.text_batches()

    def expected(function):
        rows = []
        weight = model.bert.encoder.layer[0].output.dense.weight
        for batch in batches:
            for one in reference.example_batches(batch):
                value = function(reference.logits(model, one), int(one["labels"]))
                rows.append(torch.autograd.grad(value, weight)[0].reshape(-1))
        rows = torch.stack(rows)
        return rows @ rows.T

    functions = {
        "label_logit": lambda f, y: f[y],
        "margin": lambda f, y: f[y] - torch.logsumexp(torch.cat([f[:y], f[y + 1 :]]), 0),
        "log_likelihood": lambda f, y: torch.log_softmax(f, 0)[y],
        "loss": lambda f, y: -torch.log_softmax(f, 0)[y],
    }
    for kind, function in functions.items():
        kernels = ntk(model, batches, space="weight", targets=["layer.0.output.dense"], outputs=kind)
        (name,) = kernels.names
        assert_close(kernels[name], expected(function), **EXACT)


def test_random_projections_are_unbiased_for_the_trace_kernel():
    model, batches = small.seeded(small.bert), small.text_batches()
    options = {"space": "weight", "targets": ["layer.1.output.dense"]}
    full = ntk(model, batches, **options)
    (name,) = full.names
    count = full.num_examples
    trace = full[name].view(count, 3, count, 3).diagonal(dim1=1, dim2=3).sum(-1)
    errors = []
    for k in (16, 1024):
        projected = ntk(model, batches, outputs=RandomProjection(k), **options)
        estimate = projected[name].view(count, k, count, k).diagonal(dim1=1, dim2=3).sum(-1)
        errors.append(float((estimate - trace).norm() / trace.norm()))
    assert errors[1] < 0.12
    assert errors[1] < errors[0]


def test_draws_average_to_the_weight_kernel():
    """E over A of the LoRA kernel is s²·r·Var(A)·K_weight, Var(A) = 1/(3·d_in)."""
    model, batches = small.seeded(small.bert), small.text_batches()
    weight = ntk(model, batches, space="weight")
    one = ntk(model, batches, rank=4, lora_alpha=8, draws=1)
    many = ntk(model, batches, rank=4, lora_alpha=8, draws=400)
    for name in weight.names:
        expected = weight[name] * 4 * (8 / 4) ** 2 / (3 * weight.shapes[name][0])
        assert float((many[name] - expected).norm() / expected.norm()) < 0.1
    assert not one.spread
    assert all(0.05 < many.spread[name] < 2 for name in many.names)


def test_the_mean_and_spread_of_draws_are_those_of_single_draws():
    model, batches = small.seeded(small.bert), small.text_batches()
    three = ntk(model, batches, rank=2, draws=3, targets=["query"])
    for name in three.names:
        singles = []
        for draw in range(3):
            peft_model = reference.with_lora(copy.deepcopy(model), [name], rank=2, lora_alpha=16.0, draw=draw)
            parameters = reference.lora_parameters(peft_model, name)
            singles.append(reference.kernel(peft_model, parameters, batches, reference.logits))
        stacked = torch.stack(singles)
        assert_close(three[name], stacked.mean(0), **EXACT)
        deviation = stacked.std(0, unbiased=True).norm() / stacked.mean(0).norm()
        assert three.spread[name] == pytest.approx(float(deviation), rel=1e-10)


def test_lora_a_has_pefts_distribution_and_depends_on_name_seed_and_draw_only():
    a = initial_lora_a("x", 4096, 64, seed=3)
    assert float(a.abs().max()) <= 1 / 64
    assert float(a.var()) == pytest.approx(1 / (3 * 4096), rel=0.01)
    assert_close(a, initial_lora_a("x", 4096, 64, seed=3))
    for other in (
        initial_lora_a("y", 4096, 64, 3),
        initial_lora_a("x", 4096, 64, 4),
        initial_lora_a("x", 4096, 64, 3, 1),
    ):
        assert float((a - other).abs().max()) > 1e-3


def test_explicit_and_ghost_products_give_the_same_kernels(monkeypatch):
    """Rows kept as they come, explicit and ghost contraction give one number."""
    model, batches = small.seeded(small.bert), small.text_batches()
    expected = ntk(model, batches, space="weight")
    monkeypatch.setattr(computation, "PRODUCT_BYTES", 2**12)
    for way in ("explicit", "ghost"):
        monkeypatch.setattr("peft_linear.capture.engine.products.cheapest", lambda pairs, way=way: way)
        got = ntk(model, batches, space="weight")
        for name in expected.names:
            assert_close(got[name], expected[name], **EXACT)


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(5)), size=st.integers(1, 5), extra=st.integers(0, 4))
def test_order_batch_size_and_padding_change_nothing(order, size, extra):
    model, batches = small.seeded(small.bert), small.text_batches()
    expected = ntk(model, batches).select_examples(order)
    ones = [one for batch in batches for one in reference.example_batches(batch)]
    length = 8 + extra
    padded = [
        {k: torch.nn.functional.pad(v, (0, length - v.shape[1])) if v.ndim > 1 else v for k, v in one.items()}
        for one in ones
    ]
    padded = [padded[i] for i in order]
    regrouped = [
        {key: torch.cat([one[key] for one in padded[i : i + size]]) for key in padded[0]} for i in range(0, 5, size)
    ]
    got = ntk(model, regrouped)
    for name in expected.names:
        assert_close(got[name], expected[name], **EXACT)
    assert_close(got.base, expected.base, **EXACT)
    assert_close(got.outputs, expected.outputs, **EXACT)


def test_kernels_are_symmetric_to_the_bit_positive_semidefinite_and_independent_of_other_modules():
    model, batches = small.seeded(small.bert, dtype=torch.float32), small.text_batches()
    everything = ntk(model, batches)
    alone = ntk(model, batches, targets=["layer.1.output.dense"])
    for name in everything.names:
        block = everything[name]
        assert block.dtype == torch.float64
        assert torch.equal(block, block.T)
        assert float(torch.linalg.eigvalsh(block)[0]) > -1e-12 * float(block.norm())
    assert torch.equal(alone[alone.names[0]], everything[alone.names[0]])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision_is_close_to_float64(dtype, tolerance):
    batches = small.text_batches()
    exact = ntk(small.seeded(small.bert), batches).subset()
    low = ntk(small.seeded(small.bert, dtype=dtype), batches).subset()
    assert float((low - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize("way", ["as it comes", "one output channel at a time"])
def test_the_sign_kernel_is_exact(way, monkeypatch):
    model, batches = small.seeded(small.bert), small.text_batches()
    if way == "one output channel at a time":
        monkeypatch.setattr(computation, "PRODUCT_BYTES", 1)
    kernels = sign_kernel(model, batches, space="weight")
    parameters = dict(model.named_parameters())
    for name in kernels.names:
        rows = reference.jacobian(model, [parameters[f"{name}.weight"]], batches, reference.logits)
        expected = (rows @ rows.sign().T + rows.sign() @ rows.T) / 2
        assert_close(kernels[name], expected, **EXACT)
        assert torch.equal(kernels[name], kernels[name].T)
    assert kernels.provenance["kernel"] == "sign"
