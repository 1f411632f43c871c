# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Rival selectors against their formulas, written out slowly, and against answers that were planted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from peft_linear.errors import CriterionError, OutputError, TargetError
from peft_linear.selection.baselines.by_model import MODEL_BASELINES, model_order, model_scores
from tests.helpers import small_models as small


NAMES = [f"bert.encoder.layer.{layer}.{kind}" for layer in (0, 1) for kind in ("attention.self.query", "output.dense")]


@pytest.fixture(scope="module")
def case():
    model, batches = small.seeded(small.bert), small.text_batches()
    generator = torch.Generator().manual_seed(3)
    for batch in batches:
        batch["labels"] = torch.randint(0, 3, (len(batch["input_ids"]),), generator=generator)
    return model, batches


def slow_gradients(model, batches):
    """Gradient of the cross-entropy of each example, (N, d_out, d_in) by module."""
    weights = {name: model.get_submodule(name).weight for name in NAMES}
    rows = {name: [] for name in NAMES}
    for batch in batches:
        for i in range(len(batch["labels"])):
            single = {key: value[i : i + 1] for key, value in batch.items()}
            logits = model.eval()(**{k: v for k, v in single.items() if k != "labels"}).logits
            loss = nn.functional.cross_entropy(logits, single["labels"])
            for name, gradient in zip(NAMES, torch.autograd.grad(loss, list(weights.values())), strict=True):
                rows[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def scores(name, case, **kwargs):
    model, batches = case
    return model_scores(name, model, batches, targets=NAMES, **kwargs)


def test_those_of_the_gradient(case):
    gradients = slow_gradients(*case)
    weights = {name: case[0].get_submodule(name).weight.detach() for name in NAMES}
    mean = {name: gradient.mean(0) for name, gradient in gradients.items()}
    expected = {
        "weight_gradient_norm": lambda n: mean[n].norm(),
        "page": lambda n: 2.0**2 * 8 / (3 * mean[n].shape[1]) * mean[n].square().sum(),
        "relative_gradient_norm": lambda n: mean[n].norm() / weights[n].norm(),
        "gora": lambda n: (weights[n] * mean[n]).abs().mean(),
        "fisher": lambda n: gradients[n].square().sum(),
    }
    for name, formula in expected.items():
        for module, score in scores(name, case).items():
            assert score == pytest.approx(float(formula(module)), rel=1e-9), (name, module)


def test_fisher_takes_one_pass_a_batch_and_its_examples_need_not_be_equally_long(case):
    model, batches = case
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = scores("fisher", case)
    handle.remove()
    assert len(calls) == 3 * len(batches)  # its own, and two of the self-check
    gradients = slow_gradients(*case)
    assert {name: float(gradients[name].square().sum()) for name in NAMES} == pytest.approx(found, rel=1e-9)


class Mixing(nn.Module):
    """Examples of a batch are mixed, and nothing goes back through `cut`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.cut, self.last = (nn.Linear(3, 3).double() for _ in range(3))

    def forward(self, x):
        h = self.first(x)
        return {"logits": self.last(h + 0.5 * h.sum(0)) + self.cut(x).detach()}


def test_fisher_of_a_model_that_mixes_the_examples_of_a_batch_and_of_a_module_without_a_gradient():
    model, names = Mixing(), ["first", "cut", "last"]
    x, labels = torch.randn(3, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    expected = dict.fromkeys(names, 0.0)
    for i in range(3):
        loss = nn.functional.cross_entropy(model(x[i : i + 1])["logits"], labels[i : i + 1])
        weights = [model.get_submodule(name).weight for name in names]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        for name, gradient in zip(names, gradients, strict=True):
            expected[name] += float(gradient.square().sum())
    found = model_scores("fisher", model, [{"x": x, "labels": labels}], targets=names)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found["cut"] == 0 < found["first"]
    for name in ("fisher", "gora"):
        with pytest.raises(TargetError, match="no target takes a gradient from outputs='loss': cut"):
            model_scores(name, model, [{"x": x, "labels": labels}], targets=["cut"])


def test_page_is_the_expected_gradient_of_lora(case):
    gradients = {name: g.mean(0) for name, g in slow_gradients(*case).items()}
    generator = torch.Generator().manual_seed(0)
    for name, score in scores("page", case).items():
        d_in = gradients[name].shape[1]
        a = (torch.rand(4000, 8, d_in, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(d_in)
        sampled = (2.0 * torch.einsum("oi,sri->sor", gradients[name], a)).square().sum((1, 2)).mean()
        assert float(sampled) == pytest.approx(score, rel=0.1)


def test_plop_is_large_for_a_module_that_is_aligned_with_its_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            direction = nn.functional.normalize(torch.randn(20, dtype=torch.float64), dim=0)
            self.aligned, self.blind = nn.Linear(20, 20).double(), nn.Linear(20, 20).double()
            self.register_buffer("direction", direction)
            self.aligned.weight.data = torch.outer(direction, direction)
            self.blind.weight.data = torch.eye(20).double() - torch.outer(direction, direction)

        def forward(self, x):
            z = x * self.direction
            return {"logits": self.aligned(z) + self.blind(z)}

    torch.manual_seed(0)
    model, batches = Two(), [{"x": torch.rand(5, 1, dtype=torch.float64) + 0.1}]
    found = model_scores("plop", model, batches, targets=["aligned", "blind"])
    assert found["aligned"] > 3 and found["blind"] == pytest.approx(0, abs=1e-6)
    assert model_order("plop", model, batches, targets=["aligned", "blind"]) == ("aligned", "blind")
    assert model_order("plop_low", model, batches, targets=["aligned", "blind"]) == ("blind", "aligned")


def test_signal_to_noise_finds_the_planted_signal(case):
    model, batches = small.seeded(small.bert, hidden_size=64, num_attention_heads=2), case[1]
    generator = torch.Generator().manual_seed(1)
    for number, name in enumerate(NAMES):
        weight = model.get_submodule(name).weight
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        u, v = (torch.randn(size, generator=generator, dtype=torch.float64) for size in weight.shape)
        signal = 30.0 * torch.outer(u / u.norm(), v / v.norm()) * (number == 2)
        weight.data = noise + signal
    found = model_scores("signal_to_noise", model, batches, targets=NAMES)
    values = {name: torch.linalg.svdvals(model.get_submodule(name).weight.detach()).sort().values for name in NAMES}
    for name, score in found.items():
        one = values[name].tolist()
        low, high = (one[int(q * (len(one) - 1))] * (1 - q * (len(one) - 1) % 1) for q in (0.25, 0.75))
        if (len(one) - 1) % 4 == 0:  # quartiles that need no interpolation
            rows, columns = model.get_submodule(name).weight.shape
            limit = (high - low) / 1.3489795 * (1 + (min(rows, columns) / max(rows, columns)) ** 0.5)
            slow = sum(v for v in one if v > limit) / sum(v for v in one if v <= limit) / one[-1]
            assert score == pytest.approx(slow, rel=1e-6)
    # a direction above the noise is signal, and lowers the quotient by the largest singular value it is
    assert all(score > 0 for score in found.values())


def test_eva_distributes_the_ranks_and_prefers_varied_inputs(case):
    model, batches = case
    big = [{key: value.repeat(8, 1) for key, value in batch.items() if key != "labels"} for batch in batches[:1]]
    for batch in big:
        batch["input_ids"] = torch.randint(2, 50, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    found = model_scores("eva", model, big, targets=NAMES, rank=4)
    assert sum(found.values()) == 4 * len(NAMES) and max(found.values()) <= 8


@pytest.mark.parametrize("name", MODEL_BASELINES)
def test_the_model_is_left_as_it_was(name, case):
    model, batches = case
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random, frozen = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    model_scores(name, model, batches, targets=NAMES, rank=2)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_errors(case):
    model, batches = case
    with pytest.raises(CriterionError, match="unknown selector 'best'; there are: weight_gradient_norm, page"):
        model_scores("best", model, batches)
    with pytest.raises(OutputError, match="has no labels, which the selector 'gora' needs"):
        model_scores("gora", model, [{k: v for k, v in batches[0].items() if k != "labels"}])
    quantised = small.seeded(small.bert)
    layer = quantised.bert.encoder.layer[0].attention.self.query
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"query .Linear. has no weight matrix of floating-point numbers"):
        model_scores("signal_to_noise", quantised, batches, targets=NAMES)


def test_conv1d_weights_are_turned():
    model, batches = small.seeded(small.gpt2), small.text_batches()
    for batch in batches:
        batch["labels"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    found = model_scores("page", model, batches, targets=["transformer.h.0.mlp.c_proj"])
    norm = model_scores("weight_gradient_norm", model, batches, targets=["transformer.h.0.mlp.c_proj"])
    (name,) = found
    d_in = model.get_submodule(name).weight.shape[0]
    assert found[name] == pytest.approx(4.0 * 8 / (3 * d_in) * norm[name] ** 2, rel=1e-9)


@pytest.mark.parametrize("name", MODEL_BASELINES)
def test_every_selector_scores_a_causal_language_model(name):
    model = small.seeded(small.llama, causal=True, dtype=torch.float32)
    found = model_scores(name, model, small.causal_batches(), rank=2)
    assert found and all(math.isfinite(score) for score in found.values())


def test_eva_takes_the_pooler_whose_input_is_a_slice():
    model = small.seeded(small.bert, dtype=torch.float32)
    found = model_scores("eva", model, small.text_batches(sizes=(4, 4)), rank=2)
    assert "bert.pooler.dense" in found and all(math.isfinite(score) for score in found.values())
