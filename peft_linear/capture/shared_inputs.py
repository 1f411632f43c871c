# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What terms make of their modules' inputs, once for modules with the same input, as queries, keys and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .recorder import Call, by_example
from .terms import Term


_Place = tuple[str, int, int]  # module, number of its term, number of its call


class SharedInputs:
    """The features (B, T, k) of a batch's inputs; linear ones of one input are one product for all its modules.

    Those that are the input itself are one tensor for all its modules, also where its precision had to be raised.

    `terms` are those of every recorded module. Between `start` and `clear` it knows the calls of one batch.
    """

    def __init__(self, terms: Mapping[str, Sequence[Term]]) -> None:
        self._terms = terms
        self._calls: Mapping[str, Sequence[Call]] = {}
        self._by_input: dict[tuple, list[_Place]] = {}
        self._uses: Counter[tuple] = Counter()  # calls with one input
        self._examples: dict[tuple, Tensor] = {}  # of inputs with several uses
        self._features: dict[_Place, Tensor] = {}
        self._stacks: dict[tuple, Tensor] = {}  # the matrices of the places of one input, one above the other

    def start(self, calls: Mapping[str, Sequence[Call]]) -> None:
        self.clear()
        self._calls = calls
        self._uses.update(identity(call.inputs) for of_module in calls.values() for call in of_module)
        for name, of_module in calls.items():
            for number, call in enumerate(of_module):
                for term_number, term in enumerate(self._terms[name]):
                    if term.matrix is not None:
                        place = (name, term_number, number)
                        self._by_input.setdefault(identity(call.inputs), []).append(place)

    def clear(self) -> None:
        self._calls, self._features, self._by_input = {}, {}, {}
        self._uses, self._examples = Counter(), {}

    def num_calls(self, name: str) -> int:
        return len(self._calls[name])

    def features(self, name: str, term_number: int, call_number: int, size: int) -> Tensor:
        """(B, T, k) of a call, B being `size`; float32 or float64."""
        inputs = self._calls[name][call_number].inputs
        term = self._terms[name][term_number]
        if term.matrix is None:
            return term.inputs(self._by_example(inputs, size, name))
        place = (name, term_number, call_number)
        if place not in self._features:
            places = self._by_input[identity(inputs)]
            examples = workable(by_example(inputs, size, name))
            product = examples @ self._stack(places, examples)
            widths = [self._terms[other][number].features for other, number, _ in places]
            self._features |= dict(zip(places, product.split(widths, dim=-1), strict=True))
        return self._features[place]

    def _by_example(self, inputs: Tensor, size: int, name: str) -> Tensor:
        key = identity(inputs)
        if self._uses[key] == 1:
            return workable(by_example(inputs, size, name))
        if key not in self._examples:
            self._examples[key] = workable(by_example(inputs, size, name))
        return self._examples[key]

    def _stack(self, places: Sequence[_Place], like: Tensor) -> Tensor:
        key = (tuple((name, number) for name, number, _ in places), like.dtype, like.device)
        if key not in self._stacks:
            matrices = [self._terms[name][number].matrix for name, number, _ in places]
            stack = torch.cat([matrix for matrix in matrices if matrix is not None])
            self._stacks[key] = stack.to(device=like.device, dtype=like.dtype).T
        return self._stacks[key]


def workable(tensor: Tensor) -> Tensor:
    """float32 and float64 stay; half precision is summed in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def identity(tensor: Tensor) -> tuple:
    """The same for two tensors that are alive if and only if they are one piece of memory read in one way."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
