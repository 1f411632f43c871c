# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Laws of the spectrum, against scipy's generalised eigenvalues, singular values and closed forms."""

import dataclasses
import math

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear.errors import KernelError
from peft_linear.functional.spectrum import Spectrum


def factor_of(n, rank, seed):
    return torch.randn(n, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(n, rank, seed, scale=1.0):
    factor = factor_of(n, rank, seed)
    return scale * factor @ factor.T


kernels = st.builds(
    gram,
    n=st.just(7),
    rank=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-8, 1.0, 1e6]),
)
ridges = st.floats(1e-6, 1e6)


@given(kernels)
@settings(max_examples=40, deadline=None)
def test_eigenvalues_are_squared_singular_values_of_a_factor(k):
    spectrum = Spectrum.from_gram(k)
    twin = scipy.linalg.svdvals(k.numpy())
    np.testing.assert_allclose(spectrum.eigenvalues.numpy(), twin, rtol=1e-10, atol=1e-12 * twin[0])
    assert spectrum.eigenvalues.dtype == torch.float64
    assert bool((spectrum.eigenvalues.diff() <= 0).all())
    assert spectrum.trace == pytest.approx(float(k.trace()), rel=1e-12)


@given(st.integers(1, 12), st.integers(0, 10_000), st.sampled_from([1e-8, 1.0, 1e6]), ridges)
@settings(max_examples=40, deadline=None)
def test_effective_dimension_is_the_trace_of_the_hat_matrix(rank, seed, scale, ridge):
    """In fifty digits, from the factor: a kernel in float64 is not quite of its rank, which a small ridge shows."""
    with mpmath.workdps(50):
        factor = mpmath.matrix(factor_of(7, rank, seed).tolist())
        k = mpmath.mpf(scale) * factor * factor.T
        hat = k * (k + ridge * mpmath.eye(7)) ** -1
        twin = float(sum(hat[i, i] for i in range(7)))
    assert Spectrum.from_gram(gram(7, rank, seed, scale)).effective_dimension(ridge) == pytest.approx(
        twin, rel=1e-6, abs=1e-9
    )


@given(st.integers(1, 7), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_effective_dimension_tends_to_the_rank_and_to_zero(rank, seed):
    spectrum = Spectrum.from_gram(gram(7, rank, seed))
    assert spectrum.numerical_rank == rank
    assert spectrum.effective_dimension(0.0) == rank
    assert spectrum.effective_dimension(1e-30) == pytest.approx(rank, rel=1e-9)
    assert spectrum.effective_dimension(1e30) == pytest.approx(0, abs=1e-20)
    dims = [spectrum.effective_dimension(r) for r in (1e-3, 1.0, 1e3)]
    assert dims == sorted(dims, reverse=True)


@given(kernels, ridges)
@settings(max_examples=40, deadline=None)
def test_condition_number_is_numpys_where_that_is_not_noise(k, ridge):
    shifted = k.numpy() + ridge * np.eye(7)
    twin = np.linalg.cond(shifted, 2)
    if twin < 1e8:
        assert Spectrum.from_gram(k).condition_number(ridge) == pytest.approx(twin, rel=1e-5)
    assert Spectrum.from_gram(k).condition_number(ridge) >= 1


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_condition_number_of_a_singular_kernel_is_infinite_not_noise(rank):
    spectrum = Spectrum.from_gram(gram(7, rank, 0))
    assert spectrum.condition_number() == math.inf
    assert spectrum.numerical_rank == rank
    largest = float(spectrum.eigenvalues[0])
    assert spectrum.condition_number(1e-25) == pytest.approx((largest + 1e-25) / 1e-25, rel=1e-12)


def test_condition_number_of_a_full_rank_kernel_needs_no_ridge():
    assert Spectrum(torch.tensor([8.0, 2.0])).condition_number() == 4.0
    assert Spectrum(torch.tensor([8.0, 2.0])).condition_number(2.0) == 2.5


def test_eps_of_the_computation_moves_the_noise_floor():
    values = torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64)
    assert Spectrum(values).numerical_rank == 3
    half = Spectrum(values, eps=torch.finfo(torch.bfloat16).eps)
    assert half.noise_floor == 3 * torch.finfo(torch.bfloat16).eps
    assert (half.numerical_rank, half.condition_number(), half.effective_rank) == (1, math.inf, 1.0)
    assert Spectrum.from_gram(torch.eye(3)).eps == torch.finfo(torch.float32).eps


@given(kernels, kernels)
@settings(max_examples=60, deadline=None)
def test_weyl_bounds_hold(k, s):
    lower, upper = Spectrum.from_gram(k).bounds_after_adding(Spectrum.from_gram(s))
    added = Spectrum.from_gram(k + s).eigenvalues
    slack = 1e-10 * added[0]
    assert bool((lower - slack <= added).all())
    assert bool((added <= upper + slack).all())


@given(kernels, st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_weyl_bounds_are_attained_by_a_multiple_of_the_identity(k, c):
    c = c * float(k.trace())
    s = Spectrum.from_gram(c * torch.eye(7, dtype=torch.float64))
    lower, upper = Spectrum.from_gram(k).bounds_after_adding(s)
    added = Spectrum.from_gram(k + c * torch.eye(7, dtype=torch.float64)).eigenvalues
    torch.testing.assert_close(lower, added, rtol=1e-9, atol=0)
    torch.testing.assert_close(upper, added, rtol=1e-9, atol=0)


@given(kernels, kernels, ridges)
@settings(max_examples=60, deadline=None)
def test_condition_number_interval_holds_the_condition_number(k, s, ridge):
    low, high = Spectrum.from_gram(k).condition_number_after_adding(Spectrum.from_gram(s), ridge)
    added = Spectrum.from_gram(k + s).condition_number(ridge)
    slack = 1 + 1e-6 + 100 * np.finfo(float).eps * added  # rounding of λn, relative to λn + ridge
    assert low * slack >= 1
    assert low <= added * slack
    assert added <= high * slack


def test_condition_number_interval_closes_when_the_kernels_are_orthogonal_complements():
    k, s = Spectrum(torch.tensor([4.0, 0.0])), Spectrum(torch.tensor([4.0, 0.0]))
    low, high = k.condition_number_after_adding(s, ridge=1.0)
    assert (low, high) == (1.0, 9.0)  # diag(4,0) + diag(0,4) and diag(4,0) + diag(4,0)
    assert k.condition_number_after_adding(s)[1] == math.inf


@given(kernels, st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_scaling_the_kernel(k, c):
    one, scaled = Spectrum.from_gram(k), Spectrum.from_gram(c * k)
    assert scaled.trace == pytest.approx(c * one.trace)
    assert scaled.effective_rank == pytest.approx(one.effective_rank)
    assert scaled.numerical_rank == one.numerical_rank
    assert scaled.condition_number(c) == pytest.approx(one.condition_number(1.0))
    assert scaled.effective_dimension(c) == pytest.approx(one.effective_dimension(1.0))


def test_effective_rank_counts_equal_directions():
    assert Spectrum(torch.tensor([5.0] * 4 + [0.0] * 3)).effective_rank == pytest.approx(4)
    assert Spectrum(torch.zeros(3)).effective_rank == 0
    assert Spectrum(torch.zeros(3)).condition_number() == math.inf
    assert Spectrum(torch.zeros(3)).condition_number(2.0) == 1
    assert Spectrum(torch.zeros(3)).effective_dimension(1.0) == 0


def test_rounding_below_zero_is_clipped_and_order_does_not_matter():
    spectrum = Spectrum(torch.tensor([-1e-17, 1.0, 0.5], dtype=torch.float64))
    assert spectrum.eigenvalues.tolist() == [1.0, 0.5, 0.0]


def test_repr_shows_the_rank_and_the_noise_floor():
    text = repr(Spectrum(torch.tensor([2.0, 1.0, 0.0])))
    assert "numerical_rank=2" in text
    assert "noise_floor=1.3e-15" in text


def test_spectra_of_equal_numbers_are_equal():
    one = Spectrum(torch.tensor([2.0, 1.0]), name="a")
    assert one == Spectrum(torch.tensor([1.0, 2.0]), name="b")
    assert one != Spectrum(torch.tensor([1.0, 2.0]), eps=0.1)
    assert one != Spectrum(torch.tensor([1.0, 3.0]))
    assert one != "spectrum"


def test_a_spectrum_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Spectrum(torch.ones(2)).eps = 1.0


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 3), r"square matrix, got shape \(2, 3\)"),
        (torch.ones(0, 0), "non-empty square matrix"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "not symmetric: entries differ .* by up to 2.00e"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), r"kernel of 'q' has eigenvalue -1.00e\+00 below -"),
        (torch.tensor([[math.nan, 2.0], [2.0, 1.0]]), "entries that are not finite"),
    ],
)
def test_bad_matrices(matrix, message):
    with pytest.raises(KernelError, match=message):
        Spectrum.from_gram(matrix, name="kernel of 'q'")


@pytest.mark.parametrize(
    "values, message",
    [
        (torch.tensor([math.inf]), "eigenvalues that are not finite"),
        (torch.ones(2, 2), r"non-empty vector of eigenvalues, got shape \(2, 2\)"),
    ],
)
def test_bad_eigenvalues_are_refused(values, message):
    with pytest.raises(KernelError, match=message):
        Spectrum(values)


@pytest.mark.parametrize("ridge", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["condition_number", "effective_dimension", "condition_number_after_adding"])
def test_a_ridge_that_is_no_number_above_zero_is_refused(name, ridge):
    one = Spectrum(torch.ones(1))
    arguments = (one, ridge) if name == "condition_number_after_adding" else (ridge,)
    with pytest.raises(KernelError, match="ridge must be a finite number"):
        getattr(one, name)(*arguments)


@pytest.mark.parametrize("name", ["bounds_after_adding", "condition_number_after_adding"])
def test_kernels_of_different_sizes_are_not_added(name):
    with pytest.raises(KernelError, match="size 1 and 2 cannot be added"):
        getattr(Spectrum(torch.ones(1)), name)(Spectrum(torch.ones(2)))
