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
"""From the cotangents of one backward pass after another to a module's Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional.gram import DEFAULT_MAX_BYTES, Pair, cheapest, nonzero_positions, rows_gram, weight_gram
from .recorder import Call, by_example
from .terms import Term


class TermAccumulator:
    """Collects one term of one module, batch by batch, as Jacobian rows or as (inputs, cotangents)."""

    def __init__(self, name: str, term: Term) -> None:
        self.name = name
        self.term = term
        self.keeps_rows: bool | None = None  # decided by the first batch in which the module is called
        self.parts: list[Tensor | Pair | int] = []  # an int stands for that many rows of zeros
        self.received = False
        self._inputs: dict[int, Tensor] = {}
        self._rows: dict[int, Tensor] = {}  # by output: (B, k, l)
        self._cotangents: dict[tuple[int, int], Tensor] = {}  # by (call, output): (B, T, l)

    def add(self, calls: Sequence[Call], number: int, cotangent: Tensor, output: int, size: int, outputs: int) -> None:
        """Takes the cotangent of call `number` for output `output` of a batch of `size` examples."""
        if number not in self._inputs:
            self._inputs[number] = self.term.inputs(_workable(by_example(calls[number].inputs, size, self.name)))
        inputs = self._inputs[number]
        cotangent = self.term.cotangents(_workable(by_example(cotangent, size, self.name)).to(inputs.dtype))
        if self.keeps_rows is None:
            length = inputs.shape[1] * len(calls)
            pair_size = length * (self.term.channels + self.term.features / outputs)
            self.keeps_rows = self.term.features * self.term.channels <= pair_size
        if self.keeps_rows:
            rows = inputs.mT @ cotangent
            self._rows[output] = self._rows[output].add_(rows) if output in self._rows else rows
        else:
            self._cotangents[number, output] = cotangent

    def end_batch(self, size: int, outputs: int) -> None:
        if self._rows:
            zero = torch.zeros_like(next(iter(self._rows.values())))
            rows = torch.stack([self._rows.get(output, zero) for output in range(outputs)], dim=1)
            self._append(rows.flatten(0, 1))
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
            self._append(nonzero_positions(inputs, cotangents))
        else:
            self.parts.append(size * outputs)
        self._inputs, self._rows, self._cotangents = {}, {}, {}

    def gram(self, max_bytes: int = DEFAULT_MAX_BYTES) -> tuple[Tensor, Tensor | None, str]:
        """The term's (n, n) float64 kernel; those of its draws (draws, n, n) if there are several; the way taken."""
        n = sum(part if isinstance(part, int) else _num_rows(part) for part in self.parts)
        if not self.received:
            return torch.zeros(n, n, dtype=torch.float64), None, "zero"
        grams, way = [], ""
        width = self.term.features // self.term.draws
        for draw in range(self.term.draws):
            features = slice(draw * width, (draw + 1) * width)
            if self.keeps_rows:
                rows = torch.cat([self._dense(part)[:, features].flatten(1) for part in self.parts])
                grams.append(rows_gram(rows, max_bytes))
                way = "rows"
            else:
                pairs = [(inputs[..., features], cotangents) for inputs, cotangents in self._pairs()]
                way = cheapest(pairs)
                grams.append(weight_gram(pairs, way, max_bytes))  # type: ignore[arg-type]
        if len(grams) == 1:
            return grams[0].cpu(), None, way
        stacked = torch.stack(grams).cpu()
        return stacked.mean(0), stacked, way

    def _append(self, part: Tensor | Pair) -> None:
        self.received = True
        self.parts.append(part)

    def _cotangent(self, number: int, output: int) -> Tensor:
        found = self._cotangents.get((number, output))
        return torch.zeros_like(next(iter(self._cotangents.values()))) if found is None else found

    def _dense(self, part: Tensor | Pair | int) -> Tensor:
        if isinstance(part, int):
            example = next(other for other in self.parts if isinstance(other, Tensor))
            return example.new_zeros(part, *example.shape[1:])
        assert isinstance(part, Tensor)
        return part

    def _pairs(self) -> list[Pair]:
        example = next(part for part in self.parts if isinstance(part, tuple))
        outputs = example[1].shape[1]
        pairs: list[Pair] = []
        for part in self.parts:
            if isinstance(part, int):
                size = part // outputs
                inputs = example[0].new_zeros(size, 1, example[0].shape[-1])
                pairs.append((inputs, example[1].new_zeros(size, outputs, 1, example[1].shape[-1])))
            else:
                assert isinstance(part, tuple)
                pairs.append(part)
        return pairs


def relative_spread(grams: Tensor) -> float:
    """Standard deviation of kernels (draws, n, n) about their mean, in Frobenius norm, over the mean's norm."""
    mean = grams.mean(0)
    norm = float(mean.norm())
    variance = float((grams - mean).square().sum()) / (len(grams) - 1)
    return variance**0.5 / norm if norm > 0 else 0.0


def _num_rows(part: Tensor | Pair) -> int:
    return part.shape[0] if isinstance(part, Tensor) else part[1].shape[0] * part[1].shape[1]


def _workable(tensor: Tensor) -> Tensor:
    """float32 and float64 stay; half precision is summed in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
