# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear.kernels.module_kernels import ModuleKernels
from peft_linear.selection.criteria import CRITERIA
from peft_linear.selection.problem import Problem
from peft_linear.selection.search.scoring import SubsetScorer


BOUNDED = [name for name, criterion in CRITERIA.items() if criterion.bound is not None]
EXAMPLES, CLASSES = 4, 3
N = EXAMPLES * CLASSES


def kernel(seed, rank, exponent):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(N, rank, generator=generator, dtype=torch.float64) * 10.0 ** (exponent / 2)
    return factor @ factor.T


kernels = st.builds(kernel, st.integers(0, 10_000), st.integers(1, 2 * N), st.floats(-3, 2))


def problem(ridge, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(EXAMPLES, CLASSES, generator=generator, dtype=torch.float64)
    return Problem(outputs, torch.arange(EXAMPLES) % CLASSES, "logits", ridge)


problems = st.builds(problem, st.floats(-2, 2).map(lambda e: 10.0**e), st.integers(0, 100))


@given(st.sampled_from(BOUNDED), kernels, kernels, kernels, problems)
@settings(max_examples=200, deadline=None)
def test_no_change_beats_its_bound(name, present, comes, goes, problem):
    """The set may gain a kernel, lose one, or both; what it loses is part of it."""
    criterion = CRITERIA[name]
    bound = criterion.bound(present + goes, problem)
    come, go = bound.measure(comes), bound.measure(goes)
    for change, gram in (
        (come, present + goes + comes),
        (-go, present),
        (come - go, present + comes),
        (3 * come - go, present + 3 * comes),
    ):
        utility = criterion.utility(criterion(gram, problem))
        assert utility <= bound.ceiling(change) + 1e-7 * max(1.0, abs(utility))


@given(st.sampled_from(BOUNDED), kernels, kernels, problems)
@settings(max_examples=100, deadline=None)
def test_a_bound_is_exact_without_a_change_and_tight_for_a_small_one(name, present, comes, problem):
    criterion, present = CRITERIA[name], present + 0.1 * kernel(7, 2 * N, 0.0)
    bound = criterion.bound(present, problem)
    now = criterion.utility(criterion(present, problem))
    nothing = torch.zeros_like(bound.measure(present))
    assert bound.ceiling(nothing) == pytest.approx(now, rel=1e-8, abs=1e-9)
    if name != "condition_number":  # whose extreme eigenvalues may be close to others
        errors = []
        for size in (1e-3, 1e-4):
            small = size * problem.ridge * comes / comes.trace()
            after = criterion.utility(criterion(present + small, problem))
            errors.append(bound.ceiling(bound.measure(small)) - after)
        assert errors[1] <= 0.02 * errors[0] + 1e-12, "the error is of second order"


@given(st.sampled_from([n for n in BOUNDED if CRITERIA[n].monotone]), kernels, kernels, problems)
@settings(max_examples=60, deadline=None)
def test_monotone_criteria_have_what_branches_need(name, present, comes, problem):
    criterion = CRITERIA[name]
    bound = criterion.bound(present, problem)
    assert bound.measure(comes).shape == (1,)
    assert float(bound.measure(comes)) >= 0
    rising = [bound.ceiling(torch.tensor(x, dtype=torch.float64)) for x in (0.0, 0.1, 1.0, 10.0)]
    assert rising == sorted(rising)
    before, after = (criterion.utility(criterion(gram, problem)) for gram in (present, present + comes))
    assert after >= before - 1e-9 * max(1.0, abs(before))


def test_risk_reduction_bound_beats_the_one_by_the_norm_and_copes_with_nothing_to_reduce():
    present, comes, asked = kernel(1, 8, 0.0), kernel(2, 5, 0.0), problem(0.5)
    shifted = present + 0.5 * torch.eye(N, dtype=torch.float64)
    root = torch.linalg.cholesky(shifted)
    whitened = torch.linalg.solve(root, torch.linalg.solve(root, comes).T)
    rho = float(torch.linalg.eigvalsh(whitened)[-1])
    r0 = asked.residual
    risk = float(r0 @ torch.linalg.solve(shifted, r0))
    by_norm = 1 - 0.5 * risk / (1 + rho) / float(r0.square().sum())
    bound = CRITERIA["risk_reduction"].bound(present, asked)
    assert bound.ceiling(bound.measure(comes)) < by_norm < 1
    fitted = replace(asked, outputs=asked.targets.clone())
    flat = CRITERIA["risk_reduction"].bound(present, fitted)
    assert flat.ceiling(flat.measure(comes)) == 0.0 == CRITERIA["risk_reduction"](present, fitted)
    assert bound.ceiling(torch.tensor([-2 * risk])) == math.inf  # no kernel is left: nothing is claimed


def test_a_ridge_below_rounding_skips_nothing():
    blocks = {f"layer.{i}.a": kernel(i, 2 * N, 0.0) for i in range(3)}
    modules = ModuleKernels(
        blocks=blocks,
        base=torch.zeros(N, N, dtype=torch.float64),
        outputs=torch.zeros(EXAMPLES, CLASSES, dtype=torch.float64),
        labels=torch.zeros(EXAMPLES, dtype=torch.long),
        num_parameters=dict.fromkeys(blocks, 10),
        shapes=dict.fromkeys(blocks, (2, 3)),
    )
    criterion = CRITERIA["risk_reduction"]
    slack = {}
    for ridge in (1.0, 1e-14):
        asked = Problem.of(modules, ridge)
        scorer = SubsetScorer(modules, criterion, asked, dict.fromkeys(blocks, 0.0))
        bound = criterion.bound(modules.subset(), asked)
        slack[ridge] = scorer.limit(bound, torch.zeros(1)) - bound.ceiling(torch.zeros(1))
    assert 0 < slack[1.0] < 1e-9
    assert slack[1e-14] > 1.0
