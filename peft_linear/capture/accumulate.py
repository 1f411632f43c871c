# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""From the cotangents of one backward pass after another to the Jacobian of a batch in one parameter matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.gram import BatchJacobian, nonzero_positions
from .adapter_spaces import ParameterMatrix
from .layers import Layer
from .shared_inputs import SharedInputs, workable


Sizes = dict[str, tuple[Tensor, torch.dtype]]  # Σ ‖h'‖·‖δ'‖ by key of a matrix, and the dtype of its cotangents


class JacobianAccumulator:
    """Collects one parameter matrix of one layer over a batch: Jacobian rows, or their factors if those are smaller.

    The result depends on its own batch alone, so that batches can be taken in any order, and by different processes.
    """

    def __init__(
        self, layer: Layer, number: int, matrix: ParameterMatrix, shared: SharedInputs, sizes: Sizes | None = None
    ) -> None:
        self._layer = layer
        self._number = number  # of the matrix, among those of its layer
        self._matrix = matrix
        self._shared = shared
        self._sizes = sizes
        self._keeps_rows = False
        self._inputs: dict[int, Tensor] = {}  # by call: (B, T, k)
        self._rows: dict[int, Tensor] = {}  # by output: (B, k, l)
        self._cotangents: dict[int, Tensor] = {}  # by call: (B, C, T, l)
        self._given: set[tuple[int, int]] = set()  # (call, output) for which there was a cotangent

    def add(self, call: int, cotangent: Tensor, output: int, size: int, outputs: int) -> None:
        """Takes the cotangent of a call for output `output` of a batch of `size` examples."""
        first = not self._inputs
        if call not in self._inputs:
            self._inputs[call] = self._shared.features(self._layer.name, self._number, call, size)
        inputs, dtype = self._inputs[call], cotangent.dtype
        cotangent = workable(self._layer.cotangents(cotangent, size)).to(inputs.dtype)
        cotangent = self._matrix.cotangents(cotangent)
        if self._sizes is not None:
            key = f"{self._layer.name}#{self._number}"
            before = self._sizes[key][0] if key in self._sizes else 0.0
            self._sizes[key] = before + inputs.norm() * cotangent.norm(), dtype
        if first:
            length = inputs.shape[1] * self._shared.num_calls(self._layer.name)
            size_of_factors = length * (self._matrix.channels + self._matrix.features / outputs)
            self._keeps_rows = self._matrix.features * self._matrix.channels <= size_of_factors
        if self._keeps_rows:
            rows = inputs.mT @ cotangent
            self._rows[output] = self._rows[output].add_(rows) if output in self._rows else rows
            return
        if call not in self._cotangents:
            self._cotangents[call] = cotangent.new_empty(size, outputs, *cotangent.shape[1:])
        self._cotangents[call][:, output] = cotangent
        self._given.add((call, output))

    def end_batch(self, outputs: int) -> BatchJacobian | None:
        """The batch's Jacobian, or None where the layer took no part in it; ready for the next batch."""
        jacobian: BatchJacobian | None = None
        if self._rows:
            zero = torch.zeros_like(next(iter(self._rows.values())))
            jacobian = torch.stack([self._rows.get(output, zero) for output in range(outputs)], dim=1).flatten(0, 1)
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
            jacobian = nonzero_positions(inputs, cotangents)
        self._inputs, self._rows, self._cotangents, self._given = {}, {}, {}, set()
        return jacobian
