# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
import peft.helpers
import pytest
import torch
from torch import nn

from peft_linear.errors import BudgetError, CriterionError, TargetError
from peft_linear.selection import BASELINES, baseline, equal_parameter_rank, kappa_order
from peft_linear.selection.problem import Problem
from tests.helpers.planted import BERT_NAMES, KINDS, planted_kernels


@pytest.fixture(scope="module")
def kernels():
    return planted_kernels(names=BERT_NAMES, examples=12, informative=(7, 30))


def layers_of(names):
    return [BERT_NAMES.index(name) // 6 for name in names]


def test_first_and_last_layers(kernels):
    assert layers_of(baseline("first_layers", kernels, 8)) == [0] * 6 + [1] * 2
    assert layers_of(baseline("last_layers", kernels, 8)) == [5] * 6 + [4] * 2
    assert baseline("last_layers", kernels, 2) == BERT_NAMES[30:32]


def test_by_kind(kernels):
    qv = baseline("qv", kernels, 36)
    assert len(qv) == 12
    assert all(name.endswith(("query", "value")) for name in qv)
    attention, mlp = baseline("attention_only", kernels, 36), baseline("mlp_only", kernels, 36)
    assert {name.split(".", 4)[4] for name in attention} == set(KINDS[:4])
    assert {name.split(".", 4)[4] for name in mlp} == set(KINDS[4:])
    assert set(attention) | set(mlp) == set(BERT_NAMES)
    assert layers_of(baseline("qv", kernels, 3)) == [5, 5, 4]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("transformer.h.3.attn.c_attn", "attention_only qv"),
        ("transformer.h.3.mlp.c_fc", "mlp_only"),
        ("model.layers.0.self_attn.v_proj", "attention_only qv"),
        ("model.layers.0.self_attn.k_proj", "attention_only"),
        ("model.layers.0.mlp.gate_proj", "mlp_only"),
        ("encoder.block.0.layer.0.SelfAttention.q", "attention_only qv"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "mlp_only"),
        ("distilbert.transformer.layer.1.attention.q_lin", "attention_only qv"),
        ("distilbert.transformer.layer.1.ffn.lin1", "mlp_only"),
        ("vit.encoder.layer.0.attention.attention.query", "attention_only qv"),
    ],
)
def test_kinds_in_other_architectures(name, kinds):
    kernels = planted_kernels(names=(name,), informative=(), examples=3)
    for kind in ("attention_only", "mlp_only", "qv"):
        if kind in kinds.split():
            assert baseline(kind, kernels, 1) == (name,)
        else:
            with pytest.raises(TargetError, match="no candidate's name reads like"):
                baseline(kind, kernels, 1)


def test_random_is_random_by_seed(kernels):
    draws = {baseline("random", kernels, 4, seed=seed) for seed in range(10)}
    assert len(draws) == 10
    assert baseline("random", kernels, 4, seed=3) in draws
    assert set(BASELINES["random"](kernels, 0)) == set(BERT_NAMES)


def test_gradient_norm_finds_the_planted_modules_and_ignores_the_head(kernels):
    assert set(baseline("gradient_norm", kernels, 2)) == {BERT_NAMES[7], BERT_NAMES[30]}
    error = Problem.of(kernels, 1.0).error
    norms = [float(error @ kernels[name] @ error) for name in BASELINES["gradient_norm"](kernels, 0)]
    assert norms == sorted(norms, reverse=True)


def test_all_linear_at_equal_parameters(kernels):
    assert baseline("all_linear", kernels, 1.0) == BERT_NAMES
    assert equal_parameter_rank(kernels, 36_000) == 8
    assert equal_parameter_rank(kernels, 18_000) == 4
    assert equal_parameter_rank(kernels, 17_999) == 3
    assert equal_parameter_rank(kernels, 10) == 1


def test_budgets_hold_for_baselines(kernels):
    for name in BASELINES:
        assert 0 < len(baseline(name, kernels, "5k")) <= 5
        with pytest.raises(BudgetError, match="a budget of 0 modules"):
            baseline(name, kernels, 0)


def test_unknown(kernels):
    with pytest.raises(CriterionError, match="unknown baseline 'best'; there are: random, first_layers"):
        baseline("best", kernels, 1)
    unnumbered = planted_kernels(names=("fc", "out"), informative=(), examples=3)
    with pytest.raises(TargetError, match="no candidate's name has a layer number: fc, out"):
        baseline("first_layers", unnumbered, 1)


@pytest.mark.skipif(not hasattr(peft.helpers, "KappaTuneSelector"), reason="this version of peft has no KappaTune")
def test_kappa_is_ascending_condition_number_of_the_weights():
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("a", "b", "c")})
    for (_, module), smallest in zip(model.items(), (0.1, 1.0, 0.01), strict=True):
        module.weight.data = torch.diag(torch.tensor([1.0, 1.0, smallest]))
    kernels = planted_kernels(names=("a", "b", "c"), informative=(), examples=3)
    assert kappa_order(model, kernels) == ("b", "a", "c")
    without = planted_kernels(names=("a", "c"), informative=(), examples=3)
    assert kappa_order(model, without) == ("a", "c")
    other = planted_kernels(names=("x",), informative=(), examples=3)
    with pytest.raises(TargetError, match="none of the 1 candidates is one"):
        kappa_order(model, other)
