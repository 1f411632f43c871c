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
"""Gram matrices of one linear map, from its inputs and the cotangents of its outputs.

Shapes, everywhere in this module: `inputs` h (N, T, d_in) and `cotangents` δ (N, C, T, d_out), δ = ∂f_a(x_i)/∂(output
of the map); T counts the positions (tokens, patches, repeated calls) of one example. The Jacobian row of example i and
output a with respect to the map's matrix is `Σ_t h_it ⊗ δ_iat` (d_in · d_out numbers), and every Gram matrix here is

    K[(i,a), (j,b)] = Σ_{t,s} (h_it · h_js) (δ_iat · δ_jbs),        rows example-major, i·C + a.

LoRA, bias, row and column kernels are the same sum with other h and δ:

    LoRA's B at any B   h → s·A h,   δ             ∂f/∂B = s Σ_t δ_t (A h_t)ᵀ
    LoRA's A            h → s·h,     δ → Bᵀδ       ∂f/∂A = s Σ_t (Bᵀδ_t) h_tᵀ, zero at B = 0
    bias                h → 1,       δ
    rows of W           h,           δ restricted  (RoCoFT, Kowsher et al. 2024)
    columns of W        h restricted, δ

Two ways to the same number: *explicit* forms Jacobian rows (N·C·T·d_in·d_out multiplications, then N²C²·d_in·d_out),
*ghost* never does (N²T²·d_in + N²C²T²·d_out). `cheapest` compares the counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import KernelError


Method = Literal["auto", "explicit", "ghost"]
Pair = tuple[Tensor, Tensor]  # inputs (N, T, d_in), cotangents (N, C, T, d_out)

DEFAULT_MAX_BYTES = 256 * 2**20  # of temporary memory for one product


def jacobian_rows(
    inputs: Tensor,  # (N, T, d_in)
    cotangents: Tensor,  # (N, C, T, d_out)
) -> Tensor:  # (N, C, d_in, d_out)
    """`J[i, a] = Σ_t h_it ⊗ δ_iat`, in the dtype of the arguments; N·C·T·d_in·d_out multiplications."""
    return inputs.transpose(1, 2).unsqueeze(1) @ cotangents


def rows_gram(rows: Tensor, max_bytes: int = DEFAULT_MAX_BYTES) -> Tensor:
    """`K = R Rᵀ` of rows (n, P) in float64, (n, n), symmetric to the last bit.

    Products and sums are taken in float64 whatever the dtype of the rows: rounding in K would spoil its small
    eigenvalues by eps·λ1, rounding in the rows only by about eps·sqrt(λ1·λi).
    """
    n, width = rows.shape
    total = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
    step = max(1, max_bytes // (8 * max(n, 1)))
    for start in range(0, width, step):
        _add_product(total, rows[:, start : start + step].to(torch.float64))
    return _mirrored(total)


def weight_gram(
    pairs: Sequence[Pair],
    method: Method = "auto",
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Tensor:
    """The Gram matrix of one map over all examples of `pairs`, (n, n) float64, n = Σ N·C.

    Args:
        pairs: batches of (inputs, cotangents); T may differ between batches.
        method: "explicit" forms Jacobian rows for a slice of output channels at a time, so that memory stays below
            `max_bytes` without work done twice; "ghost" contracts pairs of batches; "auto" takes the one with fewer
            multiplications.
        max_bytes: bound on the temporary memory of one slice.
    """
    if not pairs:
        raise KernelError("no batches to take a Gram matrix of; pass at least one (inputs, cotangents) pair")
    if method == "auto":
        method = cheapest(pairs)
    return _ghost(pairs, max_bytes) if method == "ghost" else _explicit(pairs, max_bytes)


def cheapest(pairs: Sequence[Pair]) -> Literal["explicit", "ghost"]:
    """The way with fewer multiplications, counted with the longest T."""
    length = max(inputs.shape[1] for inputs, _ in pairs)
    examples = sum(len(inputs) for inputs, _ in pairs)
    d_in, d_out = pairs[0][0].shape[-1], pairs[0][1].shape[-1]
    rows = examples * pairs[0][1].shape[1]
    explicit = rows * d_in * d_out * (length + rows)
    ghost = examples**2 * length**2 * d_in + rows**2 * length**2 * (d_out + 1)
    return "ghost" if ghost < explicit else "explicit"


def nonzero_positions(inputs: Tensor, cotangents: Tensor) -> Pair:
    """The pair without the positions at which every cotangent of the example is zero; the Gram matrix stays the same.

    A classifier that reads one token leaves one position in its last layer; padding leaves none of itself. Positions
    are gathered to the front, up to the largest count in the batch (at least one).
    """
    alive = (cotangents != 0).any(-1).any(1)  # (N, T)
    count = max(1, int(alive.sum(1).max()))
    if count == alive.shape[1]:
        return inputs, cotangents
    order = torch.argsort(alive.to(torch.uint8), dim=1, descending=True, stable=True)[:, :count]
    inputs = inputs.gather(1, order[..., None].expand(-1, -1, inputs.shape[-1]))
    index = order[:, None, :, None].expand(-1, cotangents.shape[1], -1, cotangents.shape[-1])
    return inputs, cotangents.gather(2, index)


def _add_product(total: Tensor, rows: Tensor, strips: int = 4) -> None:
    """Adds R Rᵀ to the upper triangle of `total`, in blocks: (strips+1)/(2·strips) of the full product's work."""
    edge = max(64, -(-len(rows) // strips))
    for top in range(0, len(rows), edge):
        strip = slice(top, top + edge)
        total[strip, top:].addmm_(rows[strip], rows[top:].T)


def _mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle: symmetric to the last bit, which a product is not."""
    return upper.triu() + upper.triu(1).T


def _explicit(pairs: Sequence[Pair], max_bytes: int) -> Tensor:
    d_in, d_out = pairs[0][0].shape[-1], pairs[0][1].shape[-1]
    n = sum(cotangents.shape[0] * cotangents.shape[1] for _, cotangents in pairs)
    total = torch.zeros(n, n, dtype=torch.float64, device=pairs[0][0].device)
    step = max(1, min(d_out, max_bytes // (8 * n * d_in)))
    for start in range(0, d_out, step):
        rows = torch.cat(
            [
                jacobian_rows(inputs, cotangents[..., start : start + step]).flatten(2).flatten(0, 1)
                for inputs, cotangents in pairs
            ]
        ).to(torch.float64)
        _add_product(total, rows)
    return _mirrored(total)


def _ghost(pairs: Sequence[Pair], max_bytes: int) -> Tensor:
    n = sum(cotangents.shape[0] * cotangents.shape[1] for _, cotangents in pairs)
    total = torch.empty(n, n, dtype=torch.float64, device=pairs[0][0].device)
    pieces = [piece for pair in pairs for piece in _pieces(*pair, max_bytes=max_bytes)]
    row = 0
    for i, left in enumerate(pieces):
        column = row
        for right in pieces[i:]:
            block = _ghost_block(left, right)
            total[row : row + block.shape[0], column : column + block.shape[1]] = block
            column += block.shape[1]
        row += left[1].shape[0] * left[1].shape[1]
    return _mirrored(total)


def _pieces(inputs: Tensor, cotangents: Tensor, max_bytes: int) -> list[Pair]:
    """The pair in runs of examples, short enough that the table of two runs (C·T by C·T each) fits `max_bytes`."""
    edge = cotangents.shape[1] * inputs.shape[1]
    count = max(1, int((max_bytes / 16) ** 0.5) // edge)
    return [(inputs[k : k + count], cotangents[k : k + count]) for k in range(0, len(inputs), count)]


def _ghost_block(left: Pair, right: Pair) -> Tensor:
    """Σ_{t,s} (h_it·h_js)(δ_iat·δ_jbs) for two runs of examples, ((i,a), (j,b)) float64."""
    (h1, d1), (h2, d2) = ([part.to(torch.float64) for part in pair] for pair in (left, right))
    (n1, c1, t1, _), (n2, c2, t2, _) = d1.shape, d2.shape
    table = (d1.reshape(n1 * c1 * t1, -1) @ d2.reshape(n2 * c2 * t2, -1).T).view(n1, c1, t1, n2, c2, t2)
    table *= (h1.reshape(n1 * t1, -1) @ h2.reshape(n2 * t2, -1).T).view(n1, 1, t1, n2, 1, t2)
    return table.sum(dim=(2, 5)).reshape(n1 * c1, n2 * c2)
