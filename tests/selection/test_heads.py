# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear import ModuleKernels, Training, compute_ntk, recommend, recommend_modules
from peft_linear.capture.warm_head import warmed_head
from peft_linear.errors import KernelError, OutputError, PeftLinearError
from peft_linear.selection.criteria import CRITERIA, View, score_modules
from peft_linear.selection.heads import loss_kernels, over_heads
from peft_linear.selection.problem import Problem
from tests.helpers.planted import planted_kernels
from tests.helpers.small_models import bert, gpt2, seeded, text_batches
from tests.reference import gradient_shares


ENERGY = CRITERIA["gradient_energy"]


def shares_of(kernels):
    scores = score_modules(View(kernels, Problem.of(kernels, ridge=1.0)), ENERGY)
    start = ENERGY(kernels.base, Problem.of(kernels, ridge=1.0))
    return {name: score - start for name, score in scores.items()}


def random_kernels(seed, scale=1.0, kind="logits", names=("a", "b", "c"), examples=5, classes=3):
    generator = torch.Generator().manual_seed(seed)
    outputs = 1 if kind == "loss" else classes
    rows = [
        scale * torch.randn(examples * outputs, 4, dtype=torch.float64, generator=generator) for _ in (*names, "base")
    ]
    return ModuleKernels(
        blocks={name: row @ row.T for name, row in zip(names, rows, strict=False)},
        base=rows[-1] @ rows[-1].T,
        outputs=torch.randn(examples, outputs, dtype=torch.float64, generator=generator),
        labels=torch.randint(classes, (examples,), generator=generator),
        num_parameters=dict.fromkeys(names, 4),
        shapes=dict.fromkeys(names, (2, 2)),
        output_kind=kind,
    )


def test_kernels_of_losses_from_those_of_logits_are_those_that_compute_ntk_gives(tmp_path):
    model, batches = seeded(bert), text_batches()
    direct = compute_ntk(model, batches, outputs="loss", progress=False)
    of_logits = compute_ntk(model, batches, progress=False)
    contracted = loss_kernels(of_logits)
    assert contracted.names == direct.names and contracted.output_kind == "loss"
    for name in direct.names:
        torch.testing.assert_close(contracted[name], direct[name], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(contracted.base, direct.base, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(contracted.outputs, direct.outputs, rtol=1e-10, atol=1e-14)
    of_logits.save(tmp_path / "kernels.safetensors")
    lazy = loss_kernels(ModuleKernels.load(tmp_path / "kernels.safetensors", lazy=True))
    assert not lazy.lazy and torch.equal(lazy[lazy.names[0]], contracted[lazy.names[0]])
    assert loss_kernels(direct) is direct


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_scores_are_the_least_shares_of_the_gradient_through_both_heads(optimizer):
    """Against autograd: the gradient of the mean loss, through the head as it is and the warmed one."""
    model, batches = seeded(bert), text_batches()
    rec = recommend_modules(
        model, batches, 2, "gradient_energy", training=Training(optimizer, 99), head_steps=3, progress=False
    )
    assert [head.get("head_steps", 0) for head in rec.settings.heads] == [0, 3]
    assert [head["draws"] for head in rec.settings.heads] == [8, 8] and rec.settings.kernels["draws"] == 1
    warm = copy.deepcopy(model)
    with warmed_head(model, batches, 3):
        warm.classifier.load_state_dict(copy.deepcopy(model.classifier.state_dict()))
    names = [row.name for row in rec.scores]
    expected = gradient_shares([model, warm], batches, names, 8, 16.0, draws=8, by_adam=optimizer == "adamw")
    start = rec.settings.start_score
    found = {row.name: row.score - start for row in rec.scores}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert 0.5 < sum(found.values()) < 1.0
    assert "head_steps" not in rec.settings.kernels
    assert "share of the gradient energy" in rec.to_markdown() and "over heads" in rec.settings.formula
    alone = recommend_modules(
        model, batches, 2, "gradient_energy", training=Training(optimizer, 99), head_steps=0, progress=False
    )
    for of in ("before_training", "always_trained_only", "all_candidates"):
        assert rec.predicted[of] == alone.predicted[of], "predictions are those of the head as it is"
    assert not alone.settings.heads


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_no_head_outweighs_another_and_least_shares_add_up(seed, scale):
    one, other = random_kernels(seed), random_kernels(seed + 1, kind="loss")
    judged = over_heads([one, other])
    shares = shares_of(judged)
    through_one, through_other = (shares_of(over_heads([head])) for head in (one, other))
    for through in (through_one, through_other):
        assert sum(through.values()) == pytest.approx(1.0) and min(through.values()) >= 0
    assert shares == pytest.approx({n: min(through_one[n], through_other[n]) for n in shares}, rel=1e-10, abs=1e-14)
    scaled = replace(
        other, blocks={name: scale * block for name, block in other.blocks.items()}, base=scale * other.base
    )
    assert shares_of(over_heads([scaled, one])) == pytest.approx(shares, rel=1e-10)
    assert shares_of(over_heads([one, one])) == pytest.approx(through_one, rel=1e-10)
    start = ENERGY(judged.base, Problem.of(judged, ridge=1.0))
    both = ENERGY(judged.base + judged["a"] + judged["b"], Problem.of(judged, ridge=1.0))
    assert both - start == pytest.approx(shares["a"] + shares["b"], rel=1e-9)


@pytest.mark.parametrize("order", [1, -1])
def test_a_module_that_matters_through_one_head_only_is_not_chosen(order):
    kernels = planted_kernels()
    of_losses = loss_kernels(kernels)
    best = recommend(kernels, 1, "gradient_energy").modules[0]
    without = {name: of_losses[name] * (1e-6 if name == best else 1.0) for name in kernels.names}
    heads = [kernels, replace(of_losses, blocks=without)][::order]
    rec = recommend(kernels, 1, "gradient_energy", heads=heads)
    assert rec.modules != (best,) and rec.scores[-1].name == best
    assert recommend(kernels, 1, "gradient_energy", heads=[kernels, of_losses]).modules == (best,)


def test_the_default_takes_both_heads_where_there_are_two():
    model, batches = seeded(bert), text_batches()
    default = recommend_modules(model, batches, 2, progress=False)
    assert default.settings.heads[1]["head_steps"] == 20 and default.settings.optimizer == "adamw"
    assert not recommend_modules(model, batches, 2, head_steps=0, progress=False).settings.heads
    assert not recommend_modules(model, batches, 2, always_trained=(), progress=False).settings.heads
    assert not recommend_modules(model, batches, 2, "leave_one_out", progress=False).settings.heads
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    rec = recommend_modules(model, unlabelled, 2, progress=False)
    assert rec.criterion == "trace" and not rec.settings.heads
    causal = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    assert not recommend_modules(seeded(gpt2, causal=True), causal, 2, progress=False).settings.heads


def test_draws_that_are_passed_are_taken_everywhere():
    model, batches = seeded(bert), text_batches()
    rec = recommend_modules(model, batches, 2, draws=4, head_steps=2, progress=False)
    assert [head["draws"] for head in rec.settings.heads] == [4, 4] and rec.settings.kernels["draws"] == 4


def test_refusals():
    kernels = random_kernels(0)
    with pytest.raises(PeftLinearError, match="`heads` requires criterion='gradient_energy', got 'leave_one_out'"):
        recommend(kernels, 1, "leave_one_out", heads=[kernels])
    with pytest.raises(KernelError, match="`heads` must be of the modules and examples that `kernels` are of"):
        recommend(kernels, 1, "gradient_energy", heads=[kernels, random_kernels(0, examples=4)])
    with pytest.raises(KernelError, match="must be of the same modules and examples, got 3 modules and 4 examples"):
        over_heads([kernels, random_kernels(0, examples=4)])
    with pytest.raises(KernelError, match="got 2 modules and 5 examples beside 3 and 5"):
        over_heads([kernels, random_kernels(0, names=("a", "b"))])
    with pytest.raises(OutputError, match="logits without labels have no cross-entropy"):
        loss_kernels(replace(kernels, labels=None))
    with pytest.raises(KernelError, match="`heads` is empty"):
        over_heads([])
    nothing = replace(kernels, blocks={name: torch.zeros_like(block) for name, block in kernels.blocks.items()})
    with pytest.raises(KernelError, match="no gradient in any candidate"):
        over_heads([kernels, nothing])
