# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Gram matrices against dense Jacobian rows, over random shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_linear.errors import KernelError
from peft_linear.functional.gram import cheapest, jacobian_rows, nonzero_positions, rows_gram, weight_gram


EXACT = {"rtol": 1e-10, "atol": 1e-12}
sizes = st.integers(1, 4)


def random_pair(n, c, t, d_in, d_out, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, t, d_in, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(n, c, t, d_out, generator=generator, dtype=torch.float64)


def slow_rows(inputs, cotangents):
    """Autograd's answer: ∂/∂W of Σ_t δ_iat · W h_it, one row at a time."""
    weight = torch.zeros(cotangents.shape[-1], inputs.shape[-1], dtype=torch.float64, requires_grad=True)
    rows = []
    for i in range(len(inputs)):
        for a in range(cotangents.shape[1]):
            value = (cotangents[i, a] * (inputs[i] @ weight.T)).sum()
            rows.append(torch.autograd.grad(value, weight)[0].T.reshape(-1))
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(n=sizes, m=sizes, c=sizes, t=sizes, s=sizes, d_in=sizes, d_out=sizes, budget=st.sampled_from([64, 512, 2**20]))
def test_every_way_is_the_dense_gram_matrix(n, m, c, t, s, d_in, d_out, budget):
    pairs = [random_pair(n, c, t, d_in, d_out, 1), random_pair(m, c, s, d_in, d_out, 2)]
    rows = torch.cat([slow_rows(*pair) for pair in pairs])
    expected = rows @ rows.T
    for method in ("auto", "explicit", "ghost"):
        gram = weight_gram(pairs, method, max_bytes=budget)
        assert_close(gram, expected, **EXACT)
        assert torch.equal(gram, gram.T)
    assert_close(jacobian_rows(*pairs[0]).reshape(n * c, -1), slow_rows(*pairs[0]), **EXACT)
    assert_close(rows_gram(rows, max_bytes=budget), expected, **EXACT)


@settings(max_examples=30, deadline=None)
@given(n=sizes, c=sizes, t=st.integers(1, 6), data=st.data())
def test_positions_without_cotangent_can_go(n, c, t, data):
    inputs, cotangents = random_pair(n, c, t, 3, 2)
    dead = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=n, max_size=n)))
    cotangents = cotangents.masked_fill(dead[:, None, :, None], 0.0)
    kept = nonzero_positions(inputs, cotangents)
    assert kept[0].shape[1] == max(1, int((~dead).sum(1).max()))
    assert_close(weight_gram([kept]), weight_gram([(inputs, cotangents)]), **EXACT)


def test_float32_rows_are_multiplied_in_float64():
    rows = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0))
    exact = rows.double() @ rows.double().T
    assert_close(rows_gram(rows, max_bytes=2**14), exact, rtol=1e-12, atol=1e-12)
    assert float((rows @ rows.T - exact).abs().max()) > 1e-6


def test_one_token_goes_ghost_and_long_sequences_explicit():
    assert cheapest([random_pair(4, 2, 1, 64, 64)]) == "ghost"
    assert cheapest([random_pair(4, 2, 64, 8, 8)]) == "explicit"


def test_the_sign_kernel_has_no_ghost_way():
    with pytest.raises(KernelError, match="needs Jacobian rows"):
        weight_gram([random_pair(2, 1, 2, 3, 3)], "ghost", signed=True)


def test_no_batches_is_an_error():
    with pytest.raises(KernelError, match="no batches to take a Gram matrix of"):
        weight_gram([])
