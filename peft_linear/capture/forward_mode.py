# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What forward-mode AD through an unmodified model needs: attention that supports it, eval mode, losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..errors import OutputError
from .conditions import as_in_training, configs


# Losses whose first argument models obtain from their logits by linear operations only (cast, view, shift, slice).
LOSSES: frozenset[Callable] = frozenset(
    {
        F.cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
    }
)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """As in training inside, but without dropout, and no `problem_type` written into the config by a loss.

    Everything is restored after.
    """
    with_problem = [config for config in configs(model) if hasattr(config, "problem_type")]
    problems = [config.problem_type for config in with_problem]
    try:
        with as_in_training(model):
            yield
    finally:
        for config, problem in zip(with_problem, problems, strict=True):
            config.problem_type = problem


@contextmanager
def differentiable_attention(model: nn.Module) -> Iterator[None]:
    """Inside, attention that supports forward-mode AD; after it the model's own.

    `sdpa` keeps its name and runs its mathematical kernel; other fused kinds (flash, flex) become "eager".
    """
    fused = [c for c in configs(model) if getattr(c, "_attn_implementation", None) not in (None, "eager", "sdpa")]
    kinds = [config._attn_implementation for config in fused]
    try:
        for config in fused:
            config._attn_implementation = {"": "eager"}  # a dict leaves the sub-configs alone
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for config, kind in zip(fused, kinds, strict=True):
            config._attn_implementation = {"": kind}


@contextmanager
def forward_mode_errors(what: str) -> Iterator[None]:
    """Names the model where an operation in it has no forward-mode AD."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if "forward AD" not in str(error) and "forward mode AD" not in str(error):
            raise
        raise OutputError(
            f"{what} runs an operation without forward-mode AD, so it cannot be linearised ({error}); use another "
            "implementation of it (attn_implementation='eager', no quantised or custom kernels in the path)"
        ) from error


class LinearLosses(TorchFunctionMode):
    """Inside, every loss function of LOSSES gets linearised logits; `inputs` keeps those of each call.

    With `inputs` of an earlier pass (`replay`), the calls get those values, with the gradient of what they were given.
    """

    def __init__(self, replay: list[Tensor] | None = None) -> None:
        super().__init__()
        self.inputs: list[Tensor] = [] if replay is None else list(replay)
        self._replays = replay is not None
        self._next = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in LOSSES:
            first, rest, kwargs = (args[0], args[1:], kwargs) if args else (kwargs["input"], (), dict(kwargs))
            kwargs.pop("input", None)
            args = (self._linearised(first), *rest)
        return func(*args, **kwargs)

    def _linearised(self, logits: Tensor) -> Tensor:
        if self._replays:
            self._next += 1
            return with_gradient_of(self.inputs[self._next - 1], logits)
        self.inputs.append(first_order(logits))
        return self.inputs[-1]


def first_order(value: Tensor) -> Tensor:
    """primal + tangent of a dual tensor, inside its dual level; other tensors as they are."""
    primal, tangent = forward_ad.unpack_dual(value)
    return primal if tangent is None else primal + tangent


def has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def with_gradient_of(value: Tensor, carrier: Tensor) -> Tensor:
    """`value` in the forward pass, `carrier` in the backward pass; once differentiable."""
    return _WithGradientOf.apply(value, carrier)  # type: ignore[no-any-return]


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def map_tensors(function: Callable[..., Tensor], output: Any, *others: Any) -> Any:
    """`function` of every floating-point tensor in what a model returned, in the same classes.

    Integer tensors stay; things that hold no plain tensors (caches) become None.
    """
    if isinstance(output, Tensor):
        return function(output, *others) if output.is_floating_point() else output
    if isinstance(output, Mapping):
        values = {key: map_tensors(function, value, *(o[key] for o in others)) for key, value in output.items()}
        return type(output)(**values) if type(output) is not dict else values
    if isinstance(output, (tuple, list)):
        items = [map_tensors(function, *parts) for parts in zip(output, *others, strict=True)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return None
