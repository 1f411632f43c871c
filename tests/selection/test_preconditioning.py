# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear import ModuleKernels, compute_ntk, recommend, recommend_modules
from peft_linear.errors import KernelError, OutputError, PeftLinearError
from peft_linear.selection import AdamScales, Training, adam_preconditioned, default_ridge
from peft_linear.selection.criteria import CRITERIA
from peft_linear.selection.problem import Problem
from tests.helpers.planted import planted_kernels
from tests.helpers.small_models import bert, seeded, text_batches


EXAMPLES, CLASSES, SIZES = 6, 3, {"a": 7, "b": 20}
SHAPES = {"a": (1, 7), "b": (4, 5)}


def jacobians(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {**SIZES, "base": 4}
    return {
        name: torch.randn(EXAMPLES * CLASSES, size, dtype=torch.float64, generator=generator)
        for name, size in sizes.items()
    }


def kernels_of(rows, seed=0, kind="logits", base_parameters=4):
    generator = torch.Generator().manual_seed(100 + seed)
    outputs = torch.randn(EXAMPLES, CLASSES, dtype=torch.float64, generator=generator)
    return ModuleKernels(
        blocks={name: rows[name] @ rows[name].T for name in SIZES},
        base=rows["base"] @ rows["base"].T,
        outputs=outputs,
        labels=torch.randint(CLASSES, (EXAMPLES,), generator=generator),
        num_parameters=SIZES,
        shapes=SHAPES,
        output_kind=kind,
        base_parameters=base_parameters,
    )


def reference_scale(rows, kernels, batch_size):
    """Root mean square of a parameter's gradient over every batch of that size, from the Jacobian."""
    logits = kernels.outputs.clone().requires_grad_(True)
    squares = []
    for batch in combinations(range(EXAMPLES), batch_size):
        index = torch.tensor(batch)
        loss = torch.nn.functional.cross_entropy(logits[index], kernels.labels[index])
        (error,) = torch.autograd.grad(loss, logits)
        squares.append((rows.T @ error.reshape(-1)).square().mean())
    return float(torch.stack(squares).mean().sqrt())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch_size=st.integers(1, EXAMPLES))
def test_scales_are_the_gradients_root_mean_square_over_all_batches(seed, batch_size):
    rows = jacobians(seed)
    kernels = kernels_of(rows, seed)
    scales = AdamScales.of(kernels, batch_size)
    for name in SIZES:
        assert scales.modules[name] == pytest.approx(reference_scale(rows[name], kernels, batch_size), rel=1e-10)
    assert scales.base == pytest.approx(reference_scale(rows["base"], kernels, batch_size), rel=1e-10)


def test_a_batch_is_at_most_all_examples():
    kernels = kernels_of(jacobians())
    assert AdamScales.of(kernels, 10_000) == AdamScales.of(kernels, EXAMPLES)


def test_blocks_are_divided_and_nothing_else_changes(tmp_path):
    kernels = kernels_of(jacobians())
    scales, seen = AdamScales.of(kernels), adam_preconditioned(kernels)
    for name in SIZES:
        torch.testing.assert_close(seen[name], kernels[name] / scales.modules[name])
    torch.testing.assert_close(seen.base, kernels.base / scales.base)
    assert torch.equal(seen.outputs, kernels.outputs) and seen.num_parameters == kernels.num_parameters
    assert seen.provenance["optimizer"] == "adamw" and "optimizer" not in kernels.provenance
    kernels.save(tmp_path / "kernels.safetensors")
    lazy = adam_preconditioned(ModuleKernels.load(tmp_path / "kernels.safetensors", lazy=True))
    assert lazy.lazy and torch.equal(lazy["b"], seen["b"])
    assert torch.equal(lazy.select_examples([3, 1])["b"], seen.select_examples([3, 1])["b"])


def test_the_scale_of_the_parametrisation_counts_half():
    """Adam's steps do not depend on the size of gradients: a module with c times the Jacobian moves c times as far."""
    rows = jacobians()
    seen = adam_preconditioned(kernels_of(rows))
    larger = adam_preconditioned(kernels_of({**rows, "a": 5 * rows["a"]}))
    torch.testing.assert_close(larger["a"], 5 * seen["a"])
    torch.testing.assert_close(larger["b"], seen["b"])


def test_a_zero_block_stays_zero_and_an_unknown_base_counts_as_a_module():
    kernels = kernels_of(jacobians())
    zero = replace(kernels, blocks={**kernels.blocks, "a": torch.zeros_like(kernels["a"])})
    assert not adam_preconditioned(zero)["a"].any()
    unknown = replace(kernels, base_parameters=0)
    assert AdamScales.of(unknown).base == pytest.approx(AdamScales.of(kernels).base * (4 / 13.5) ** 0.5)


def test_refusals():
    kernels = kernels_of(jacobians())
    with pytest.raises(PeftLinearError, match="batch_size must be at least 1, got 0"):
        adam_preconditioned(kernels, 0)
    with pytest.raises(OutputError, match="do not determine a loss"):
        adam_preconditioned(replace(kernels, labels=None))
    negative = replace(kernels, blocks={**kernels.blocks, "a": -kernels["a"]})
    with pytest.raises(KernelError, match="the kernel of a has gradient energy .* not of compute_sign_kernel"):
        adam_preconditioned(negative)
    infinite = replace(kernels, blocks={**kernels.blocks, "b": kernels["b"] / 0.0})
    with pytest.raises(KernelError, match="the kernel of b is not finite"):
        adam_preconditioned(infinite)
    with pytest.raises(OutputError, match="optimizer='adamw' cannot be used with logits without labels"):
        recommend(replace(kernels, labels=None), 1, "trace", training=Training("adamw"))


def test_recommendations_say_what_they_scored_by():
    kernels = planted_kernels()
    by_name, default = recommend(kernels, 2, "predicted_loss"), recommend(kernels, 2)
    assert by_name.settings.optimizer == "sgd" and default.settings.optimizer == "adamw"
    assert "Adam-preconditioned" in default.settings.formula and "Adam" not in by_name.settings.formula
    assert default.settings.train_batch_size == 8 and by_name.settings.train_batch_size is None
    # what is not the criterion's is the same
    assert default.ridge == by_name.ridge and default.spectra["chosen"] is not None
    rows = {row.name: row.condition_number for row in by_name.scores}
    assert {row.name: row.condition_number for row in default.scores} == rows


def test_criteria_by_adam_are_those_of_preconditioned_kernels():
    kernels = planted_kernels()
    seen = adam_preconditioned(kernels, 4)
    for name in ("gradient_energy", "leave_one_out", "effective_rank"):
        rec = recommend(kernels, 2, name, training=Training("adamw", 4))
        problem = Problem.of(seen, rec.settings.criterion_ridge)
        for row in rec.scores:
            assert row.score == pytest.approx(CRITERIA[name](seen.subset([row.name]), problem), rel=1e-10)
    assert rec.settings.criterion_ridge == default_ridge(seen)
    doubled = recommend(kernels, 2, "leave_one_out", 2 * rec.ridge, training=Training("adamw", 4))
    assert doubled.settings.criterion_ridge == pytest.approx(2 * default_ridge(seen))


def test_the_head_is_counted(tmp_path):
    model, batches = seeded(bert), text_batches()
    kernels = compute_ntk(model, batches, progress=False)
    assert kernels.base_parameters == sum(p.numel() for p in model.classifier.parameters())
    kernels.save(tmp_path / "kernels.safetensors")
    assert ModuleKernels.load(tmp_path / "kernels.safetensors").base_parameters == kernels.base_parameters
    assert compute_ntk(model, batches, always_trained=(), progress=False).base_parameters == 0
    rec = recommend_modules(model, batches, 2, training=Training("sgd", 2), progress=False)
    assert rec.settings.optimizer == "sgd"
