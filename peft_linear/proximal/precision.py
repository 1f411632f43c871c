# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The weights of factors in float32 at least, also of factors in bfloat16 or float16.

The pull changes a displacement by a part of ηλ in a step, usually 1e-4 to 1e-2, and bfloat16 has 8 bits: added to the
factor, the change would be rounded away at almost every step. So the weights that the term acts on are `factor +
remainder`. After each step the sum is rounded to the factor, and what was lost is the next remainder: nothing that the
term does is lost, only delayed by less than one unit in the last place. Remainders are float32, four bytes a
parameter, and live in the optimizer's state (`tuners.proximal_lora.counts`). float32 and float64 factors have none:
they are changed in place.

A coupled pull passes through the optimizer's own rule, which would round its result to the factor. `Float32Step` lets
the optimizer step the weights in float32 instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..tuners.proximal_lora.counts import REMAINDERS_KEY
from .shards import gathered, local_part, whole
from .updates import LOW_PRECISION, FactorUpdate


def read_weights(factors: list[FactorUpdate]) -> list[Tensor]:
    """The weights that the term acts on, local: the factors' own memory, or new tensors in float32."""
    values = [factor.local if factor.place is None else factor.place.read() for factor in factors]
    low = _low(factors)
    if low:
        wide = _float32([values[i] for i in low])
        torch._foreach_add_(wide, [factors[i].remainder for i in low])
        for i, value in zip(low, wide, strict=True):
            values[i] = value
    return values


def read_anchors(factors: list[FactorUpdate], values: list[Tensor]) -> list[Tensor | None]:
    """The anchors of the local shards, in the dtype of the weights."""
    anchors = [factor.local_anchor for factor in factors]
    low = [i for i, a in enumerate(anchors) if a is not None and a.dtype != values[i].dtype]
    for i, anchor in zip(low, _float32([anchors[i] for i in low]), strict=True):  # type: ignore[misc]
        anchors[i] = anchor.to(values[i].dtype)
    return anchors


def write_weights(factors: list[FactorUpdate], values: list[Tensor]) -> None:
    """Replaces the weights that `read_weights` gave; values that are the factors' own memory are there already."""
    low = _low(factors)
    if low:
        parameters, new = [factors[i].local for i in low], [values[i] for i in low]
        torch._foreach_copy_(parameters, new)  # rounds to nearest
        remainders = [factors[i].remainder for i in low]
        torch._foreach_copy_(remainders, new)
        torch._foreach_sub_(remainders, _float32(parameters))
    for factor, value in zip(factors, values, strict=True):
        if factor.place is not None:
            factor.place.write(value)
        elif not factor.is_low and value.data_ptr() != factor.local.data_ptr():
            factor.local.copy_(value)


def check_remainders(factors: list[FactorUpdate]) -> None:
    """Before a step: makes remainders fit factors that were changed since the last one.

    None may be larger than a unit in the last place of its factor: where the factor was replaced (loaded, set to zero)
    it is of other weights. A factor that is in float32 now, as peft makes it when a Trainer resumes, gets its own.
    """
    for factor in factors:
        if not factor.is_low and REMAINDERS_KEY in factor.counter.group:
            _add_remainder(factor)
    low = [factor for factor in factors if factor.is_low]
    if not low:
        return
    limits = _float32([factor.local for factor in low])
    torch._foreach_abs_(limits)
    for dtype in {factor.parameter.dtype for factor in low}:
        members = [i for i, factor in enumerate(low) if factor.parameter.dtype == dtype]
        info = torch.finfo(dtype)
        chosen = [limits[i] for i in members]
        torch._foreach_mul_(chosen, info.eps)
        torch._foreach_add_(chosen, info.smallest_normal * info.eps)
    remainders = [factor.remainder for factor in low]
    torch._foreach_minimum_(remainders, limits)
    torch._foreach_neg_(limits)
    torch._foreach_maximum_(remainders, limits)


class Float32Step:
    """Makes an optimizer step a low-precision factor in float32, with a penalty's gradient added, until `restore`.

    The factor's data are the weights meanwhile. The optimizer's state for it (moments) is in float32 too, and rounded
    to the factor's dtype by `restore`, as it is kept without this and by `load_state_dict`.
    """

    def __init__(self, optimizer: Any, factor: FactorUpdate, penalty: Tensor) -> None:
        self.parameter: nn.Parameter = factor.parameter
        assert self.parameter.grad is not None
        self.original = self.parameter.grad  # the loss gradient
        self._factor, self._low = factor, self.parameter.data
        states = getattr(optimizer, "state", None)
        self._states: Any = states if isinstance(states, Mapping) else {}
        self._penalty, self._sum = penalty, self.original.float() + penalty
        self._version = self._sum._version
        self._set(read_weights([factor])[0], self._sum)
        state = self._states.get(self.parameter, {})
        self._widened: dict[Any, Tensor] = {}
        self._wide = {key: value for key, value in state.items() if self._is_moment(value)}
        for key, value in self._wide.items():
            if value.dtype in LOW_PRECISION:
                state[key] = self._widened[key] = value.float()

    def restore(self, after_error: bool = False) -> None:
        """Rounds the weights to the factor and the state to its dtype; puts the loss gradient back.

        After a step that raised, backward passes may have added to the sum: then the penalty's gradient is subtracted.
        """
        wide, gradient = self.parameter.data, self.parameter.grad
        if gradient is self._sum and after_error and self._sum._version != self._version:
            gradient = (self._sum - self._penalty).to(self._low.dtype)
        elif gradient is not None:
            gradient = self.original
        self._set(self._low, gradient)
        write_weights([self._factor], [wide])
        state = self._states.get(self.parameter, {})
        for key, value in state.items():
            made = key not in self._wide and self._is_moment(value) and value.dtype == wide.dtype
            if value is self._widened.get(key) or (made and not torch.equal(value, wide)):
                state[key] = value.to(self._low.dtype)  # a copy of the weights keeps its bits

    def _set(self, data: Tensor, gradient: Tensor | None) -> None:
        self.parameter.grad = None  # a gradient has the dtype of its parameter
        self.parameter.data = data
        self.parameter.grad = gradient

    def _is_moment(self, value: Any) -> bool:
        return type(value) is Tensor and value.is_floating_point() and value.shape == self._low.shape


def whole_weights(parameter: nn.Parameter, factor: FactorUpdate | None) -> Tensor:
    """The weights of a whole factor: the parameter itself if it holds them and is not sharded, else a new tensor.

    `factor` is None for a factor that the optimizer does not update.
    """
    if factor is not None and (factor.place is not None or factor.is_low):
        return gathered(read_weights([factor])[0], parameter)
    return whole(parameter).float() if parameter.dtype in LOW_PRECISION else whole(parameter)


def _add_remainder(factor: FactorUpdate) -> None:
    remainder = factor.counter.take_remainder(factor.name)
    if remainder is not None and remainder.shape == factor.parameter.shape:
        limit = local_part(factor.parameter).abs() * torch.finfo(torch.bfloat16).eps
        factor.local.add_(local_part(remainder).to(limit).clamp(-limit, limit))


def _low(factors: list[FactorUpdate]) -> list[int]:
    return [i for i, factor in enumerate(factors) if factor.is_low and factor.place is None]


def _float32(tensors: list[Tensor]) -> list[Tensor]:
    wide = [torch.empty_like(tensor, dtype=torch.float32, requires_grad=False) for tensor in tensors]
    if wide:
        torch._foreach_copy_(wide, tensors)
    return wide
