# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_linear.errors import KernelError
from peft_linear.functional import _cholesky
from peft_linear.functional._checks import checked_gram
from peft_linear.functional._cholesky import inverse_factor
from peft_linear.functional.regression import leave_one_out_residuals
from tests.helpers.reference_linear import refit_without_each_example


EXACT = {"rtol": 1e-10, "atol": 1e-10}


def positive(n, seed=0, ridge=0.5):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, n + 3, generator=generator, dtype=torch.float64)
    return factor @ factor.T / n + ridge * torch.eye(n, dtype=torch.float64)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_by_halves_it_is_the_inverse_of_the_factor(n, leaf, seed):
    matrix = positive(n, seed)
    unused = matrix + 7.0 * torch.ones(n, n, dtype=torch.float64).triu(1)
    before, _cholesky.LEAF = _cholesky.LEAF, leaf
    try:
        inverse, failed = inverse_factor(unused)
    finally:
        _cholesky.LEAF = before
    assert failed == 0
    assert_close(inverse, torch.linalg.inv(torch.linalg.cholesky(matrix)), **EXACT)
    assert_close(inverse.triu(1), torch.zeros_like(inverse), rtol=0, atol=0)


@given(st.integers(2, 30), st.integers(1, 8), st.data())
@settings(max_examples=40, deadline=None)
def test_it_names_the_leading_minor_that_is_not_positive(n, leaf, data):
    matrix = positive(n)
    place = data.draw(st.integers(0, n - 1))
    matrix[place, place] = -1.0
    before, _cholesky.LEAF = _cholesky.LEAF, leaf
    try:
        assert inverse_factor(matrix)[1] == place + 1 == int(torch.linalg.cholesky_ex(matrix).info)
    finally:
        _cholesky.LEAF = before


def test_leave_one_out_above_the_leaf_is_refitting():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(300, 40, generator=generator, dtype=torch.float64)
    residual = torch.randn(300, generator=generator, dtype=torch.float64)
    slow = refit_without_each_example(features, residual, 0.7, 5)
    assert_close(leave_one_out_residuals(features @ features.T, residual, 0.7, 5), slow, **EXACT)
    with pytest.raises(KernelError, match="is not positive definite"):
        leave_one_out_residuals(-features @ features.T, residual, 0.7, 5)


@given(st.integers(2, 60), st.floats(2e-6, 1e3), st.data())
@settings(max_examples=60, deadline=None)
def test_the_probe_sees_every_asymmetric_entry_and_no_other(n, by, data):
    gram = positive(n)
    rows = torch.zeros(n, dtype=torch.float64)
    checked_gram(gram, rows)
    checked_gram(1e-3 * gram, rows)
    i = data.draw(st.integers(0, n - 2))
    gram[i, data.draw(st.integers(i + 1, n - 1))] += by * float(gram.abs().max()) * 1.01
    with pytest.raises(KernelError, match="gram is not symmetric"):
        checked_gram(gram, rows)


def test_what_is_finite_may_be_huge():
    huge = 1e308 * torch.eye(40, dtype=torch.float64)
    checked_gram(huge, torch.zeros(40))
    for bad in (torch.nan, torch.inf, -torch.inf):
        huge[3, 3] = bad
        with pytest.raises(KernelError, match="gram: 1 entries are NaN or infinite"):
            checked_gram(huge, torch.zeros(40))
