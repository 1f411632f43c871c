# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""From the cotangents of one backward pass after another to a term's part of a batch, and from parts to its kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional.gram import DEFAULT_MAX_BYTES, Part, cheapest, nonzero_positions, weight_gram
from ..recorder import by_example
from ..shared_inputs import SharedInputs, workable
from ..terms import Term


class TermAccumulator:
    """Collects one term of one module over a batch, as Jacobian rows or as (inputs, cotangents): what is smaller.

    A part depends on its own batch alone, so that batches can be taken in any order, and by different processes.
    """

    def __init__(self, name: str, number: int, term: Term, shared: SharedInputs) -> None:
        self.name = name
        self.number = number  # of the term, among those of its module
        self.term = term
        self._shared = shared
        self._keeps_rows = False
        self._inputs: dict[int, Tensor] = {}  # by call: (B, T, k)
        self._rows: dict[int, Tensor] = {}  # by output: (B, k, l)
        self._cotangents: dict[int, Tensor] = {}  # by call: (B, C, T, l)
        self._given: set[tuple[int, int]] = set()  # (call, output) for which there was a cotangent

    def add(self, call: int, cotangent: Tensor, output: int, size: int, outputs: int) -> None:
        """Takes the cotangent of a call for output `output` of a batch of `size` examples."""
        first = not self._inputs
        if call not in self._inputs:
            self._inputs[call] = self._shared.features(self.name, self.number, call, size)
        inputs = self._inputs[call]
        cotangent = self.term.cotangents(workable(by_example(cotangent, size, self.name)).to(inputs.dtype))
        if first:
            length = inputs.shape[1] * self._shared.num_calls(self.name)
            pair_size = length * (self.term.channels + self.term.features / outputs)
            self._keeps_rows = self.term.features * self.term.channels <= pair_size
        if self._keeps_rows:
            rows = inputs.mT @ cotangent
            self._rows[output] = self._rows[output].add_(rows) if output in self._rows else rows
            return
        if call not in self._cotangents:
            self._cotangents[call] = cotangent.new_empty(size, outputs, *cotangent.shape[1:])
        self._cotangents[call][:, output] = cotangent
        self._given.add((call, output))

    def end_batch(self, outputs: int) -> Part | None:
        """The batch's part, or None where the module had no share in it; ready for the next batch."""
        part: Part | None = None
        if self._rows:
            zero = torch.zeros_like(next(iter(self._rows.values())))
            part = torch.stack([self._rows.get(output, zero) for output in range(outputs)], dim=1).flatten(0, 1)
        elif self._cotangents:
            for call, cotangents in self._cotangents.items():
                for output in range(outputs):
                    if (call, output) not in self._given:  # this call has no part in this output
                        cotangents[:, output] = 0
            calls = sorted(self._cotangents)
            inputs, cotangents = self._inputs[calls[0]], self._cotangents[calls[0]]
            if len(calls) > 1:
                inputs = torch.cat([self._inputs[call] for call in calls], dim=1)
                cotangents = torch.cat([self._cotangents[call] for call in calls], dim=2)
            part = nonzero_positions(inputs, cotangents)
        self._inputs, self._rows, self._cotangents, self._given = {}, {}, {}, set()
        return part


class TermKernel(NamedTuple):
    gram: Tensor  # (n, n) float64, on the CPU
    spread: float | None  # relative deviation between draws of A, where there are several
    way: str  # "rows", "explicit" or "ghost"; joined by "+" where slices of the features went different ways


def term_kernel(
    parts: Sequence[Part],
    term: Term,
    max_bytes: int = DEFAULT_MAX_BYTES,
    signed: bool = False,
    precision: torch.dtype | None = None,
) -> TermKernel:
    """The kernel of a term from its parts, which may be lazy; the mean over its draws, one of them at a time.

    The spread is the standard deviation of the draws about their mean in Frobenius norm, over the mean's norm.
    """
    width = term.features // term.draws
    return next(nested_kernels(parts, term, [width], max_bytes, signed, precision))[1]


def nested_kernels(
    parts: Sequence[Part],
    term: Term,
    ranks: Sequence[int],  # ascending; the last is the number of features of a draw
    max_bytes: int = DEFAULT_MAX_BYTES,
    signed: bool = False,
    precision: torch.dtype | None = None,
) -> Iterator[tuple[int, TermKernel]]:
    """`term_kernel` of adapters of several ranks from the parts of the largest R, in the order of `ranks`.

    A of rank r is the first r rows of A of rank R, and its scaling R/r times as large: its kernel is (R/r)² times that
    of the first r features of each draw (R/r times for the sign kernel, which takes the scaling once). Gram matrices
    add over features, so each rank adds to the one below it, and all take no more products than R alone.
    """
    means = {rank: _Mean() for rank in ranks}
    width = ranks[-1]
    for draw in range(term.draws):
        for rank, gram, way in _growing(parts, term, draw, ranks, max_bytes, signed, precision):
            means[rank].add(gram, may_overwrite=rank == width)
            del gram
            if draw + 1 == term.draws:
                yield rank, means.pop(rank).kernel((width / rank) ** (1 if signed else 2), way)


def kernels_at_work(draws: int, ranks: int) -> int:
    """How many (n, n) matrices `nested_kernels` holds at a time, beside what was taken from it already."""
    return 2 if draws == 1 or ranks == 1 else ranks + 2


def _growing(
    parts: Sequence[Part],
    term: Term,
    draw: int,
    ranks: Sequence[int],
    max_bytes: int,
    signed: bool,
    precision: torch.dtype | None,
) -> Iterator[tuple[int, Tensor, str]]:
    """The Gram matrices (n, n) of the first features of a draw, as many as each rank says, and the way taken.

    They are one tensor that grows; its last state is the receiver's.
    """
    are_rows = [isinstance(part, Tensor) for part in parts]
    ways: dict[str, None] = {}
    gram: Tensor | None = None
    start = draw * ranks[-1]
    for below, rank in zip([0, *ranks], ranks, strict=False):
        taken = parts if rank - below == term.features else _Features(parts, slice(start + below, start + rank))
        way = "rows" if all(are_rows) else "explicit"
        if not any(are_rows) and not signed:
            way = cheapest(taken)
        ways[way] = None
        more = weight_gram(taken, "ghost" if way == "ghost" else "explicit", max_bytes, signed, precision).cpu()
        gram = more if gram is None else gram.add_(more)
        del more
        yield rank, gram, "+".join(ways)


class _Mean:
    """Mean and spread of kernels, updated one by one (Welford)."""

    def __init__(self) -> None:
        self._count = 0
        self._squares = 0.0
        self._mean = torch.empty(0)

    def add(self, gram: Tensor, may_overwrite: bool) -> None:
        self._count += 1
        if self._count == 1:
            self._mean = gram if may_overwrite else gram.clone()
            return
        deviation = gram.sub_(self._mean) if may_overwrite else gram - self._mean
        self._squares += float(deviation.norm()) ** 2 * (self._count - 1) / self._count
        self._mean += deviation.div_(self._count)

    def kernel(self, factor: float, way: str) -> TermKernel:
        """The mean, times `factor`, which the spread does not depend on; at the end, for it takes the place."""
        norm = float(self._mean.norm())
        spread = None
        if self._count > 1:
            spread = (self._squares / (self._count - 1)) ** 0.5 / norm if norm > 0 else 0.0
        return TermKernel(self._mean.mul_(factor), spread, way)


class _Features(Sequence[Part]):
    """The same parts with a slice of their features (of one draw of A)."""

    def __init__(self, parts: Sequence[Part], features: slice) -> None:
        self._parts, self._features = parts, features
        self.in_files = getattr(parts, "in_files", False)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        part = self._parts[index]
        if isinstance(part, Tensor):
            return part[:, self._features]
        return part[0][..., self._features], part[1]
