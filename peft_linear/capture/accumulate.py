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
"""From the cotangents of one backward pass after another to a term's part of a batch, and from parts to its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.gram import DEFAULT_MAX_BYTES, Part, cheapest, nonzero_positions, weight_gram
from .recorder import Call, by_example
from .terms import Term


class TermAccumulator:
    """Collects one term of one module over a batch, as Jacobian rows or as (inputs, cotangents): what is smaller.

    A part depends on its own batch alone, so that batches can be taken in any order, and by different processes.
    """

    def __init__(self, name: str, term: Term) -> None:
        self.name = name
        self.term = term
        self._keeps_rows = False
        self._inputs: dict[int, Tensor] = {}
        self._rows: dict[int, Tensor] = {}  # by output: (B, k, l)
        self._cotangents: dict[tuple[int, int], Tensor] = {}  # by (call, output): (B, T, l)

    def add(self, calls: Sequence[Call], number: int, cotangent: Tensor, output: int, size: int, outputs: int) -> None:
        """Takes the cotangent of call `number` for output `output` of a batch of `size` examples."""
        first = not self._inputs
        if number not in self._inputs:
            self._inputs[number] = self.term.inputs(_workable(by_example(calls[number].inputs, size, self.name)))
        inputs = self._inputs[number]
        cotangent = self.term.cotangents(_workable(by_example(cotangent, size, self.name)).to(inputs.dtype))
        if first:
            length = inputs.shape[1] * len(calls)
            pair_size = length * (self.term.channels + self.term.features / outputs)
            self._keeps_rows = self.term.features * self.term.channels <= pair_size
        if self._keeps_rows:
            rows = inputs.mT @ cotangent
            self._rows[output] = self._rows[output].add_(rows) if output in self._rows else rows
        else:
            self._cotangents[number, output] = cotangent

    def end_batch(self, outputs: int) -> Part | None:
        """The batch's part, or None where the module had no share in it; ready for the next batch."""
        part: Part | None = None
        if self._rows:
            zero = torch.zeros_like(next(iter(self._rows.values())))
            part = torch.stack([self._rows.get(output, zero) for output in range(outputs)], dim=1).flatten(0, 1)
        elif self._cotangents:
            numbers = sorted({number for number, _ in self._cotangents})
            inputs = torch.cat([self._inputs[number] for number in numbers], dim=1)
            cotangents = torch.stack(
                [
                    torch.cat([self._cotangent(number, output) for number in numbers], dim=1)
                    for output in range(outputs)
                ],
                dim=1,
            )
            part = nonzero_positions(inputs, cotangents)
        self._inputs, self._rows, self._cotangents = {}, {}, {}
        return part

    def _cotangent(self, number: int, output: int) -> Tensor:
        found = self._cotangents.get((number, output))
        if found is None:  # this call has no part in this output
            found = torch.zeros_like(next(c for (other, _), c in self._cotangents.items() if other == number))
        return found


class TermKernel(NamedTuple):
    gram: Tensor  # (n, n) float64, on the CPU
    spread: float | None  # relative deviation between draws of A, where there are several
    way: str  # "rows", "explicit" or "ghost"


def term_kernel(
    parts: Sequence[Part],
    term: Term,
    max_bytes: int = DEFAULT_MAX_BYTES,
    signed: bool = False,
) -> TermKernel:
    """The kernel of a term from its parts, which may be lazy; the mean over its draws, one of them at a time.

    The spread is the standard deviation of the draws about their mean in Frobenius norm, over the mean's norm. Mean
    and sum of squares are updated draw by draw (Welford), so that two kernels are held, however many draws there are.
    """
    width = term.features // term.draws
    mean, squares = torch.empty(0), 0.0
    are_rows = [isinstance(part, Tensor) for part in parts]
    way = "rows" if all(are_rows) else "explicit"
    for draw in range(term.draws):
        drawn: Sequence[Part] = parts
        if term.draws > 1:
            drawn = _Features(parts, slice(draw * width, (draw + 1) * width))
        if not any(are_rows) and not signed:
            way = cheapest(drawn)
        gram = weight_gram(drawn, "ghost" if way == "ghost" else "explicit", max_bytes, signed).cpu()
        if draw == 0:
            mean = gram
        else:
            gram -= mean
            squares += float(gram.norm()) ** 2 * draw / (draw + 1)
            mean += gram.div_(draw + 1)
    norm = float(mean.norm())
    spread = ((squares / (term.draws - 1)) ** 0.5 / norm if norm > 0 else 0.0) if term.draws > 1 else None
    return TermKernel(mean, spread, way)


class _Features(Sequence[Part]):
    """The same parts with a slice of their features (one draw of A)."""

    def __init__(self, parts: Sequence[Part], features: slice) -> None:
        self._parts, self._features = parts, features

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        part = self._parts[index]
        if isinstance(part, Tensor):
            return part[:, self._features]
        return part[0][..., self._features], part[1]


def _workable(tensor: Tensor) -> Tensor:
    """float32 and float64 stay; half precision is summed in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
