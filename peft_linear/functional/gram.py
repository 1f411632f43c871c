# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of the Jacobian of one linear layer, from its inputs and the cotangents of its outputs.

Shapes, everywhere in this module: `inputs` h (N, T, d_in) and `cotangents` δ (N, C, T, d_out), δ = ∂f_a(x_i)/∂(output
of the layer); T counts the positions (tokens, patches, repeated calls) of one example. The Jacobian row of example i
and output a with respect to the layer's matrix is `Σ_t h_it ⊗ δ_iat` (d_in · d_out numbers), and every Gram matrix
here is

    K[(i,a), (j,b)] = Σ_{t,s} (h_it · h_js) (δ_iat · δ_jbs),        rows example-major, i·C + a.

LoRA, bias, row and column kernels are the same sum with other h and δ:

    LoRA's B at any B   h → s·A h,   δ             ∂f/∂B = s Σ_t δ_t (A h_t)ᵀ
    LoRA's A            h → s·h,     δ → Bᵀδ       ∂f/∂A = s Σ_t (Bᵀδ_t) h_tᵀ, zero at B = 0
    bias                h → 1,       δ
    rows of W           h,           δ restricted  (RoCoFT, Kowsher et al. 2024)
    columns of W        h restricted, δ

Two methods for the same number: *explicit* forms Jacobian rows (N·C·T·d_in·d_out multiplications, then
N²C²·d_in·d_out), *ghost* never does (N²T²·d_in + N²C²T²·d_out). `cheapest` compares the counts.

The Jacobian comes batch by batch: as its *factors* (h, δ), or as rows that are formed already, (N·C, d_in, d_out). The
sequence may be lazy, one that reads a batch from a file when it is asked for it: no function here holds more of them
than `max_bytes` lets it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import KernelError


Method = Literal["auto", "explicit", "ghost"]
Factors = tuple[Tensor, Tensor]  # inputs (N, T, d_in), cotangents (N, C, T, d_out)
BatchJacobian = Tensor | Factors  # rows (N·C, d_in, d_out), or what they are made of

DEFAULT_MAX_BYTES = 256 * 2**20  # of temporary memory for one product
_STRIPS, _STRIP = 4, 32  # in which the upper triangle of a product is taken: their number, and rows of one at least
_PIECE = 256  # rows of a table of the ghost method
_PER_ENTRY = 8  # work on an entry of that table beside the product, in multiplications
_CACHED_NUMBERS = 48 * 2**10  # of a row in one slice, so that its product finds it in a processor's cache
_LONGEST_SUM = 4096  # products of rows in one sum that is not float64


def jacobian_rows(
    inputs: Tensor,  # (N, T, d_in)
    cotangents: Tensor,  # (N, C, T, d_out)
) -> Tensor:  # (N, C, d_in, d_out)
    """`J[i, a] = Σ_t h_it ⊗ δ_iat`, in the dtype of the arguments; N·C·T·d_in·d_out multiplications."""
    return inputs.transpose(1, 2).unsqueeze(1) @ cotangents


def rows_gram(rows: Tensor, max_bytes: int = DEFAULT_MAX_BYTES) -> Tensor:
    """`K = R Rᵀ` of rows (n, P) in float64, (n, n), symmetric to the last bit, whatever the dtype of the rows."""
    return _explicit([rows[:, :, None]], max_bytes, product_dtype=torch.float64)


def weight_gram(
    jacobians: Sequence[BatchJacobian],
    method: Method = "auto",
    max_bytes: int = DEFAULT_MAX_BYTES,
    signed: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """The Gram matrix of one layer over all examples of `jacobians`, (n, n) float64, n = Σ N·C.

    Args:
        jacobians: batches of (inputs, cotangents) or of rows; T may differ between batches.
        method: "explicit" forms Jacobian rows for a slice of the matrix at a time, so that memory stays below
            `max_bytes` without work done twice; "ghost" contracts pairs of batches (and takes no rows); "auto" takes
            the one with fewer multiplications.
        max_bytes: bound on the temporary memory of one slice, beside the result and one batch.
        signed: take `(J sign(J)ᵀ + sign(J) Jᵀ)/2` instead, the symmetrised kernel of sign descent, which Adam is near
            to at its first steps (Malladi et al., arXiv 2210.05643). Needs rows, so it is always explicit; it is not
            positive semidefinite in general.
        product_dtype: of the products of rows, of which at most 4,096 are summed in it, all others in float64; default
            that of the Jacobians. In float32 an entry is off by about 4e-8·sqrt(K_ii·K_jj), which hides eigenvalues
            below about 1e-7·max(K_ii)·sqrt(n); in float64 those of float32 rows are right down to about 1e-12·λ1.
    """
    if not jacobians:
        raise KernelError("no batches to take a Gram matrix of; pass at least one pair of (inputs, cotangents)")
    if method == "auto":
        method = "explicit" if signed else cheapest(jacobians)
    if method == "ghost":
        if signed:
            raise KernelError("the sign kernel needs Jacobian rows; pass method='explicit' or 'auto'")
        return _ghost(jacobians, max_bytes, product_dtype)  # type: ignore[arg-type]
    return _explicit(jacobians, max_bytes, signed, product_dtype)


def cheapest(jacobians: Sequence[BatchJacobian]) -> Literal["explicit", "ghost"]:
    """The method with fewer multiplications, counted with the longest T; where there are rows already, "explicit"."""
    length = examples = rows = d_in = d_out = 0
    for jacobian in jacobians:
        if isinstance(jacobian, Tensor):
            return "explicit"
        inputs, cotangents = jacobian
        length = max(length, inputs.shape[1])
        examples += len(inputs)
        rows += len(inputs) * cotangents.shape[1]
        d_in, d_out = inputs.shape[-1], cotangents.shape[-1]
    edge = max(_STRIP, -(-rows // _STRIPS))
    explicit = rows * d_in * d_out * (length + (rows + edge) / 2)  # of the product, what touches the upper triangle
    edge = min(examples, _examples_in_piece(rows // examples * length))
    ghost = (1 + edge / examples) / 2 * length**2 * (examples**2 * d_in + rows**2 * (d_out + _PER_ENTRY))
    return "ghost" if ghost < explicit else "explicit"


def count_rows(jacobian: BatchJacobian) -> int:
    return math.prod(_layout(jacobian))


def nonzero_positions(inputs: Tensor, cotangents: Tensor) -> Factors:
    """The factors without the positions at which all cotangents of the example are zero; the Gram matrix is the same.

    A classifier that reads one token leaves one position in its last layer; padding leaves none. Positions
    are gathered to the front, up to the largest count in the batch (at least one).
    """
    if bool((cotangents[:, 0, :, 0] != 0).all()):
        return inputs, cotangents
    alive = (torch.linalg.vector_norm(cotangents, ord=math.inf, dim=-1) != 0).any(1)  # (N, T); NaN counts as alive
    count = max(1, int(alive.sum(1).max()))
    if count == alive.shape[1]:
        return inputs, cotangents
    order = torch.argsort(alive.to(torch.uint8), dim=1, descending=True, stable=True)[:, :count]  # (N, count)
    inputs = inputs.gather(1, order[..., None].expand(-1, -1, inputs.shape[-1]))
    index = order[:, None, :, None].expand(-1, cotangents.shape[1], -1, cotangents.shape[-1])
    return inputs, cotangents.gather(2, index)


def _add_product(total: Tensor, rows: Tensor) -> None:
    """Adds R Rᵀ to the upper triangle of `total`, in strips: (_STRIPS + 1)/(2·_STRIPS) of the full product's work.

    Products are taken in the dtype of the rows, at most `_LONGEST_SUM` of them are summed in it, the rest in float64.
    """
    edge = max(_STRIP, -(-len(rows) // _STRIPS))
    for some in rows.split(_LONGEST_SUM, dim=1):
        for top in range(0, len(some), edge):
            strip, right = slice(top, top + edge), some[top:].T
            if some.dtype == total.dtype:
                total[strip, top:].addmm_(some[strip], right)
            else:
                total[strip, top:] += some[strip] @ right


def _mirror_(upper: Tensor, edge: int = 1024) -> Tensor:
    """Makes it the symmetric matrix with this upper triangle, in place: to the last bit, which a product is not."""
    for top in range(0, len(upper), edge):
        end = top + edge
        corner = upper[top:end, top:end]
        corner.copy_(corner.triu() + corner.triu(1).T)
        upper[end:, top:end] = upper[top:end, end:].T
    return upper


def _explicit(
    jacobians: Sequence[BatchJacobian],
    max_bytes: int,
    signed: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """Sums R Rᵀ over slices of the layer's matrix; the rows of a slice are formed batch by batch in one buffer."""
    example, (features, channels) = _example_and_widths(jacobians[0])
    dtype = product_dtype or example.dtype
    layouts = [_layout(jacobian) for jacobian in jacobians]
    n = sum(size * outputs for size, outputs in layouts)
    total = torch.zeros(n, n, dtype=torch.float64, device=example.device)
    numbers = max(1, max_bytes // (dtype.itemsize * max(n, 1)))  # of each row, in one slice
    if example.device.type == "cpu" and not getattr(jacobians, "in_files", False):
        numbers = min(numbers, _CACHED_NUMBERS)
    wide = max(1, min(features, math.isqrt(numbers // 3)))  # wider than high: what MKL is quickest at
    step = min(channels, max(1, numbers // wide))
    wide = max(1, min(features, numbers // step))
    buffer = torch.empty(n * wide * step, dtype=dtype, device=example.device)
    for left in range(0, features, wide):
        for start in range(0, channels, step):
            rows = buffer[: n * min(wide, features - left) * min(step, channels - start)].view(n, -1)
            row = 0
            for jacobian, (size, outputs) in zip(jacobians, layouts, strict=True):
                target = rows[row : row + size * outputs]
                _write_rows(target, jacobian, slice(left, left + wide), slice(start, start + step))
                row += len(target)
            if signed:
                total += rows @ rows.sign().T
            else:
                _add_product(total, rows)
    total = (total + total.T).mul_(0.5) if signed else _mirror_(total)
    return _examples_first_(total, layouts)


def _example_and_widths(jacobian: BatchJacobian) -> tuple[Tensor, tuple[int, int]]:
    if isinstance(jacobian, Tensor):
        return jacobian, (jacobian.shape[1], jacobian.shape[2])
    return jacobian[0], (jacobian[0].shape[-1], jacobian[1].shape[-1])


def _write_rows(target: Tensor, jacobian: BatchJacobian, features: slice, channels: slice) -> None:
    """Rows of a slice into `target` (N·C, k·l); of factors they come output by output, (C·N, k·l)."""
    if isinstance(jacobian, Tensor):
        target.view(len(jacobian), -1, jacobian[0, 0, channels].numel()).copy_(jacobian[:, features, channels])
        return
    inputs, cotangents = jacobian[0][..., features].mT, jacobian[1][..., channels]
    by_output = target.view(cotangents.shape[1], len(inputs), inputs.shape[1], -1)
    for output, rows in enumerate(by_output):
        if rows.dtype == inputs.dtype:
            torch.bmm(inputs, cotangents[:, output], out=rows)
        else:
            rows.copy_(inputs @ cotangents[:, output])


def _layout(jacobian: BatchJacobian) -> tuple[int, int]:
    """(N, C) of factors, whose rows are formed output by output; (N·C, 1) of rows, which come as they are."""
    return (len(jacobian), 1) if isinstance(jacobian, Tensor) else (jacobian[1].shape[0], jacobian[1].shape[1])


def _examples_first_(gram: Tensor, layouts: Sequence[tuple[int, int]]) -> Tensor:
    """Reorders, in place, the rows and columns of those batches that came output by output."""
    row = 0
    for size, outputs in layouts:
        here = slice(row, row + size * outputs)
        if size > 1 and outputs > 1:
            order = torch.arange(size * outputs, device=gram.device).view(outputs, size).T.flatten()
            gram[here] = gram[here][order]
            gram[:, here] = gram[:, here][:, order]
        row = here.stop
    return gram


def _ghost(pairs: Sequence[Factors], max_bytes: int, product_dtype: torch.dtype | None = None) -> Tensor:
    counts = [count_rows(pair) for pair in pairs]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    total = torch.empty(sum(counts), sum(counts), dtype=torch.float64, device=pairs[0][0].device)
    dtype = product_dtype or pairs[0][0].dtype
    for group in _groups(pairs, max_bytes // 4, dtype):
        held = {i: list(_pieces(pairs[i], max_bytes, dtype)) for i in group}
        for j in range(group.start, len(pairs)):
            right = held[j] if j in held else list(_pieces(pairs[j], max_bytes, dtype))
            for i in range(group.start, min(group.stop, j + 1)):
                _fill(total, starts[i], starts[j], held[i], right)
    return _mirror_(total)


def _groups(pairs: Sequence[Factors], max_bytes: int, dtype: torch.dtype) -> Iterator[range]:
    """Runs of batches that fit `max_bytes` in `dtype` (or single ones): what is held while the others are read."""
    start = held = 0
    for number, (inputs, cotangents) in enumerate(pairs):
        size = dtype.itemsize * (inputs.numel() + cotangents.numel())
        if number > start and held + size > max_bytes:
            yield range(start, number)
            start, held = number, 0
        held += size
    yield range(start, len(pairs))


def _pieces(pair: Factors, max_bytes: int, dtype: torch.dtype) -> Iterator[Factors]:
    """The factors in runs of examples so short that the table of two runs (C·T by C·T each) fits and stays in cache.

    Many runs are good for another reason: half of a table that lies on the diagonal is not needed.
    """
    inputs, cotangents = (tensor.to(dtype) for tensor in pair)
    edge = cotangents.shape[1] * inputs.shape[1]
    largest = int((max_bytes / (2 * dtype.itemsize)) ** 0.5) // edge
    count = max(1, min(largest, _examples_in_piece(edge)) if inputs.device.type == "cpu" else largest)
    for k in range(0, len(inputs), count):
        yield inputs[k : k + count], cotangents[k : k + count]


def _examples_in_piece(edge: int) -> int:
    """`edge` = C·T."""
    return max(1, _PIECE // max(1, edge))


def _fill(total: Tensor, row: int, start: int, left: Sequence[Factors], right: Sequence[Factors]) -> None:
    """Writes the block of two batches, given in pieces; of a batch with itself only what lies above the diagonal."""
    for i, one in enumerate(left):
        column = start
        for j, other in enumerate(right):
            width = count_rows(other)
            if left is not right or j >= i:
                total[row : row + count_rows(one), column : column + width] = _ghost_block(one, other)
            column += width
        row += count_rows(one)


def _ghost_block(left: Factors, right: Factors) -> Tensor:
    """Σ_{t,s} (h_it·h_js)(δ_iat·δ_jbs) for two runs of examples, ((i,a), (j,b)), summed in float64."""
    (h1, d1), (h2, d2) = left, right
    (n1, c1, t1, _), (n2, c2, t2, _) = d1.shape, d2.shape
    table = (d1.reshape(n1 * c1 * t1, -1) @ d2.reshape(n2 * c2 * t2, -1).T).view(n1, c1, t1, n2, c2, t2)
    table *= (h1.reshape(n1 * t1, -1) @ h2.reshape(n2 * t2, -1).T).view(n1, 1, t1, n2, 1, t2)
    return table.sum(dim=5).sum(dim=2, dtype=torch.float64).reshape(n1 * c1, n2 * c2)
