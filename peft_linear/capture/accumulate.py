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
from .recorder import by_example
from .shared_inputs import SharedInputs, workable
from .terms import Term


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
    way: str  # "rows", "explicit" or "ghost"


def term_kernel(
    parts: Sequence[Part],
    term: Term,
    max_bytes: int = DEFAULT_MAX_BYTES,
    signed: bool = False,
    product_dtype: torch.dtype | None = None,
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
        gram = weight_gram(drawn, "ghost" if way == "ghost" else "explicit", max_bytes, signed, product_dtype).cpu()
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
        self.in_files = getattr(parts, "in_files", False)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        part = self._parts[index]
        if isinstance(part, Tensor):
            return part[:, self._features]
        return part[0][..., self._features], part[1]
