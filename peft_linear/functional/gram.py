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

Examples come in *parts*, one a batch: a pair (h, δ), or rows that are formed already, (N·C, d_in, d_out). The sequence
of parts may be lazy, one that reads a part from a file when it is asked for it: no function here holds more parts than
`max_bytes` lets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import KernelError


Method = Literal["auto", "explicit", "ghost"]
Pair = tuple[Tensor, Tensor]  # inputs (N, T, d_in), cotangents (N, C, T, d_out)
Part = Tensor | Pair  # Jacobian rows (N·C, d_in, d_out), or what they are made of

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
    return _explicit([rows[:, :, None]], max_bytes)


def weight_gram(
    parts: Sequence[Part],
    method: Method = "auto",
    max_bytes: int = DEFAULT_MAX_BYTES,
    signed: bool = False,
) -> Tensor:
    """The Gram matrix of one map over all examples of `parts`, (n, n) float64, n = Σ N·C.

    Args:
        parts: batches of (inputs, cotangents) or of rows; T may differ between batches.
        method: "explicit" forms Jacobian rows for a slice of the matrix at a time, so that memory stays below
            `max_bytes` without work done twice; "ghost" contracts pairs of batches (and takes no rows); "auto" takes
            the one with fewer multiplications.
        max_bytes: bound on the temporary memory of one slice, beside the result and one part.
        signed: take `(J sign(J)ᵀ + sign(J) Jᵀ)/2` instead, the symmetrised kernel of sign descent, which Adam is near
            to at its first steps (Malladi et al., arXiv 2210.05643). Needs rows, so it is always explicit; it is not
            positive semidefinite in general.
    """
    if not parts:
        raise KernelError("no batches to take a Gram matrix of; pass at least one (inputs, cotangents) pair")
    if method == "auto":
        method = "explicit" if signed else cheapest(parts)
    if method == "ghost":
        if signed:
            raise KernelError("the sign kernel needs Jacobian rows; pass method='explicit' or 'auto'")
        return _ghost(parts, max_bytes)  # type: ignore[arg-type]
    return _explicit(parts, max_bytes, signed)


def cheapest(parts: Sequence[Part]) -> Literal["explicit", "ghost"]:
    """The way with fewer multiplications, counted with the longest T; where there are rows already, "explicit"."""
    length = examples = rows = d_in = d_out = 0
    for part in parts:
        if isinstance(part, Tensor):
            return "explicit"
        inputs, cotangents = part
        length = max(length, inputs.shape[1])
        examples += len(inputs)
        rows += len(inputs) * cotangents.shape[1]
        d_in, d_out = inputs.shape[-1], cotangents.shape[-1]
    explicit = rows * d_in * d_out * (length + rows)
    ghost = examples**2 * length**2 * d_in + rows**2 * length**2 * (d_out + 1)
    return "ghost" if ghost < explicit else "explicit"


def count_rows(part: Part) -> int:
    return len(part) if isinstance(part, Tensor) else part[1].shape[0] * part[1].shape[1]


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


def _mirror_(upper: Tensor, edge: int = 1024) -> Tensor:
    """Makes it the symmetric matrix with this upper triangle, in place: to the last bit, which a product is not."""
    for top in range(0, len(upper), edge):
        end = top + edge
        corner = upper[top:end, top:end]
        corner.copy_(corner.triu() + corner.triu(1).T)
        upper[end:, top:end] = upper[top:end, end:].T
    return upper


def _explicit(parts: Sequence[Part], max_bytes: int, signed: bool = False) -> Tensor:
    """Sums R Rᵀ over slices of the map's matrix; a slice of all rows is gathered in float64, part by part."""
    example, (features, channels) = _example_and_widths(parts[0])
    n = sum(count_rows(part) for part in parts)
    total = torch.zeros(n, n, dtype=torch.float64, device=example.device)
    wide = max(1, min(features, max_bytes // (8 * max(n, 1))))
    step = max(1, min(channels, max_bytes // (8 * max(n, 1) * wide)))
    buffer = torch.empty(n * wide * step, dtype=torch.float64, device=example.device)
    for left in range(0, features, wide):
        for start in range(0, channels, step):
            width = min(wide, features - left), min(step, channels - start)
            rows = buffer[: n * width[0] * width[1]].view(n, *width)
            row = 0
            for part in parts:
                piece = _rows_of(part, slice(left, left + wide), slice(start, start + step))
                rows[row : row + len(piece)] = piece
                row += len(piece)
            if signed:
                total.addmm_(rows.flatten(1), rows.flatten(1).sign().T)
            else:
                _add_product(total, rows.flatten(1))
    return (total + total.T).mul_(0.5) if signed else _mirror_(total)


def _example_and_widths(part: Part) -> tuple[Tensor, tuple[int, int]]:
    if isinstance(part, Tensor):
        return part, (part.shape[1], part.shape[2])
    return part[0], (part[0].shape[-1], part[1].shape[-1])


def _rows_of(part: Part, features: slice, channels: slice) -> Tensor:
    if isinstance(part, Tensor):
        return part[:, features, channels]
    return jacobian_rows(part[0][..., features], part[1][..., channels]).flatten(0, 1)


def _ghost(pairs: Sequence[Pair], max_bytes: int) -> Tensor:
    counts = [count_rows(pair) for pair in pairs]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    total = torch.empty(sum(counts), sum(counts), dtype=torch.float64, device=pairs[0][0].device)
    for group in _groups(pairs, max_bytes // 4):
        held = {i: list(_pieces(*pairs[i], max_bytes=max_bytes)) for i in group}
        for j in range(group.start, len(pairs)):
            right = held[j] if j in held else list(_pieces(*pairs[j], max_bytes=max_bytes))
            for i in range(group.start, min(group.stop, j + 1)):
                _fill(total, starts[i], starts[j], held[i], right)
    return _mirror_(total)


def _groups(pairs: Sequence[Pair], max_bytes: int) -> Iterator[range]:
    """Runs of pairs that fit `max_bytes` in float64 (or single ones): what is held while the others pass by."""
    start = held = 0
    for number, (inputs, cotangents) in enumerate(pairs):
        size = 8 * (inputs.numel() + cotangents.numel())
        if number > start and held + size > max_bytes:
            yield range(start, number)
            start, held = number, 0
        held += size
    yield range(start, len(pairs))


def _pieces(inputs: Tensor, cotangents: Tensor, max_bytes: int) -> Iterator[Pair]:
    """The pair in float64 and in runs of examples, so short that the table of two runs (C·T by C·T each) fits."""
    inputs, cotangents = inputs.to(torch.float64), cotangents.to(torch.float64)
    edge = cotangents.shape[1] * inputs.shape[1]
    count = max(1, int((max_bytes / 16) ** 0.5) // edge)
    for k in range(0, len(inputs), count):
        yield inputs[k : k + count], cotangents[k : k + count]


def _fill(total: Tensor, row: int, start: int, left: Sequence[Pair], right: Sequence[Pair]) -> None:
    """Writes the block of two pairs, given in pieces; of a pair with itself only what lies above the diagonal."""
    for i, one in enumerate(left):
        column = start
        for j, other in enumerate(right):
            width = count_rows(other)
            if left is not right or j >= i:
                total[row : row + count_rows(one), column : column + width] = _ghost_block(one, other)
            column += width
        row += count_rows(one)


def _ghost_block(left: Pair, right: Pair) -> Tensor:
    """Σ_{t,s} (h_it·h_js)(δ_iat·δ_jbs) for two runs of examples in float64, ((i,a), (j,b))."""
    (h1, d1), (h2, d2) = left, right
    (n1, c1, t1, _), (n2, c2, t2, _) = d1.shape, d2.shape
    table = (d1.reshape(n1 * c1 * t1, -1) @ d2.reshape(n2 * c2 * t2, -1).T).view(n1, c1, t1, n2, c2, t2)
    table *= (h1.reshape(n1 * t1, -1) @ h2.reshape(n2 * t2, -1).T).view(n1, 1, t1, n2, 1, t2)
    return table.sum(dim=(2, 5)).reshape(n1 * c1, n2 * c2)
