# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Features of layer inputs, computed once for layers that share an input, as queries, keys and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .adapter_spaces import ParameterMatrix
from .layers import Layer
from .recorder import Call


_Place = tuple[str, int, int]  # layer, number of its matrix, number of its call


class SharedInputs:
    """The features (B, T, k) of a batch's inputs; linear ones of one input are one product for all its layers.

    Those that are the input itself are one tensor for all its layers, also where its precision had to be raised.

    `layers` are all that are recorded, `matrices` their parameter matrices. Between `start` and `clear` it holds the
    calls of one batch.
    """

    def __init__(self, layers: Mapping[str, Layer], matrices: Mapping[str, Sequence[ParameterMatrix]]) -> None:
        self._layers = layers
        self._matrices = matrices
        self._calls: Mapping[str, Sequence[Call]] = {}
        self._by_input: dict[tuple, list[_Place]] = {}
        self._uses: Counter[tuple] = Counter()  # calls with one input
        self._examples: dict[tuple, Tensor] = {}  # of inputs with several uses
        self._features: dict[_Place, Tensor] = {}
        self._stacks: dict[tuple, Tensor] = {}  # the projections of the places of one input, one above the other

    def start(self, calls: Mapping[str, Sequence[Call]]) -> None:
        self.clear()
        self._calls = calls
        self._uses.update(self._key(name, call.inputs) for name, of_layer in calls.items() for call in of_layer)
        for name, of_layer in calls.items():
            for number, call in enumerate(of_layer):
                for matrix_number, matrix in enumerate(self._matrices[name]):
                    if matrix.projection is not None:
                        place = (name, matrix_number, number)
                        self._by_input.setdefault(self._key(name, call.inputs), []).append(place)

    def clear(self) -> None:
        self._calls, self._features, self._by_input = {}, {}, {}
        self._uses, self._examples = Counter(), {}

    def num_calls(self, name: str) -> int:
        return len(self._calls[name])

    def features(self, name: str, matrix_number: int, call_number: int, size: int) -> Tensor:
        """(B, T, k) of a call, B being `size`; float32 or float64."""
        inputs = self._calls[name][call_number].inputs
        matrix = self._matrices[name][matrix_number]
        if matrix.projection is None:
            return matrix.inputs(self._by_example(inputs, size, name))
        place = (name, matrix_number, call_number)
        if place not in self._features:
            places = self._by_input[self._key(name, inputs)]
            examples = workable(self._layers[name].inputs(inputs, size))
            product = examples @ self._stack(places, examples)
            widths = [self._matrices[other][number].features for other, number, _ in places]
            self._features |= dict(zip(places, product.split(widths, dim=-1), strict=True))
        return self._features[place]

    def _key(self, name: str, inputs: Tensor) -> tuple:
        """Equal for calls whose layers make the same positions and features of the same tensor."""
        return self._layers[name].layout, *identity(inputs)

    def _by_example(self, inputs: Tensor, size: int, name: str) -> Tensor:
        key = self._key(name, inputs)
        if self._uses[key] == 1:
            return workable(self._layers[name].inputs(inputs, size))
        if key not in self._examples:
            self._examples[key] = workable(self._layers[name].inputs(inputs, size))
        return self._examples[key]

    def _stack(self, places: Sequence[_Place], like: Tensor) -> Tensor:
        key = (tuple((name, number) for name, number, _ in places), like.dtype, like.device)
        if key not in self._stacks:
            projections = [self._matrices[name][number].projection for name, number, _ in places]
            stack = torch.cat([projection for projection in projections if projection is not None])
            self._stacks[key] = stack.to(device=like.device, dtype=like.dtype).T
        return self._stacks[key]


def workable(tensor: Tensor) -> Tensor:
    """float32 and float64 stay; half precision is summed in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def identity(tensor: Tensor) -> tuple:
    """Of two tensors in memory: equal if and only if they are the same memory in the same layout."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
