# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Detects training that bypasses the proximal term: factors that move, although no step that pulls them was taken.

At the first gradient of every backward pass (also of `torch.autograd.grad`) a sample of each factor is compared with
that of the last pass or of the last hooked step. What moved in between moved without a pull:

- three times in a row against its gradient: it is trained by something that peft_linear does not see. An error.
- Otherwise nothing, so long as it is not twice the same average with its own earlier values: perturbations (sharpness-
  aware methods, gradient checks) go up the gradient or anywhere; loading, merging, initialisation, a cast, averaging
  with other weights happen once or between hooked steps, each of which starts the count again.
- That average (Lookahead in a wrapper that has no hooks): the pull counts in part, as the steps do. A warning, once.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeftLinearError
from .strength import Strengths


_SAMPLE = 1024  # elements of a factor
_DESCENTS = 3  # moves against the gradient, in a row and without a hooked step
_COSINE = -0.1  # of move and gradient: of noise it has a standard deviation of 1/√1024


@dataclass
class _Factor:
    """One factor that is watched."""

    name: str
    parameter: weakref.ref[nn.Parameter]
    handle: Any
    view: Tensor | None = None  # the sample, in the factor's own memory
    gradient: Tensor | None = None  # sampled, summed over the passes at the present point
    descents: int = 0
    stepped: bool = False  # not moved since the last hooked step
    inside: bool = False  # a hooked step has begun and not ended: it may evaluate the gradient at several points
    synced: Tensor | None = None  # the sample after the last move from outside a step
    averages: list[float] = field(default_factory=list)  # weights of the present values in them


class MovementGuard:
    """Watches the factors of one adapter. Holds no reference to the factors nor to the adapter.

    Cost: a call per factor and backward pass that does nothing, and one copy of at most 1024 elements of each factor
    per pass and per step. On a GPU the comparison is read a pass later, so that the host does not wait.
    """

    def __init__(self, adapter_name: str, strengths: Strengths) -> None:
        self._adapter_name = adapter_name
        self._strengths = weakref.ref(strengths)
        self._factors: list[_Factor] = []
        self._index: dict[int, int] = {}  # id of a factor -> position
        self._seen: set[int] = set()  # that had a gradient in this backward pass
        self._last: Tensor | None = None  # samples of all factors, one after the other
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None  # a comparison on a device, and what it compared
        self._warned = False

    def watch(self, factors: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Watches these factors, by name, and no others."""
        self.remove()
        guard = weakref.ref(self)
        for index, (name, parameter) in enumerate(factors):
            trained = parameter.requires_grad
            parameter.requires_grad_(True)  # torch registers the hook only on tensors that take gradients
            handle = parameter.register_hook(_Hook(guard, index))
            parameter.requires_grad_(trained)
            self._factors.append(_Factor(name, weakref.ref(parameter), handle))
            self._index[id(parameter)] = index

    def remove(self) -> None:
        """Watches nothing."""
        for factor in self._factors:
            factor.handle.remove()
        self._factors, self._index, self._last, self._pending = [], {}, None, None

    def watches(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether it watches all of these factors."""
        return all(id(parameter) in self._index for parameter in parameters)

    def step_begins(self, parameters: Iterable[nn.Parameter], begins: bool = True) -> None:
        """To be called when a hooked step of these factors begins, and with `begins=False` when it has raised."""
        for parameter in parameters:
            index = self._index.get(id(parameter))
            if index is not None:
                self._factors[index].inside = begins

    @torch.no_grad()
    def stepped(self, parameters: Iterable[nn.Parameter]) -> None:
        """To be called after a hooked step of these factors, which may move them."""
        chosen = [self._index[id(parameter)] for parameter in parameters]
        for index in chosen:
            factor = self._factors[index]
            factor.descents, factor.stepped, factor.inside, factor.gradient = 0, True, False, None
        if self._last is None or len(chosen) == len(self._factors):
            self._last = self._sample()
        else:
            self._refresh_views()
            bounds = self._bounds()
            for index in chosen:
                view = self._factors[index].view
                if view is not None:
                    self._last[slice(*bounds[index])] = view.to(self._last)

    def gradient_computed(self, index: int, gradient: Tensor) -> None:
        """Called by the hook of a factor, before its gradient is accumulated."""
        if index in self._seen or not self._seen:
            self._seen = set()
            self._pass_begins()
        self._seen.add(index)
        factor = self._factors[index]
        if not factor.stepped and factor.view is not None:
            local = _local(gradient)
            sample = _sampled(local.to_dense() if local.is_sparse else local).float()
            factor.gradient = sample.clone() if factor.gradient is None else factor.gradient + sample

    @torch.no_grad()
    def _pass_begins(self) -> None:
        strengths = self._strengths()
        if strengths is None or not strengths.active():
            self._last = None
            return
        before, self._last = self._last, self._sample()
        now = self._last
        if before is None or now is None or before.shape != now.shape:
            return
        if not _waits(now) and all(factor.stepped for factor in self._factors):
            pending, flag = self._pending, torch.empty((), dtype=torch.bool, pin_memory=now.is_cuda)
            flag.copy_((before.to(now) != now).any(), non_blocking=True)
            self._pending = (flag, before, now)
            if pending is not None and pending[0]:  # of the pass before this one: done, unless the host is far ahead
                self._moved(*pending[1:])
            return
        if not torch.equal(before.to(now), now):
            self._moved(before, now)

    def _moved(self, before: Tensor, now: Tensor) -> None:
        """Judges each factor's move since the last pass or step."""
        bounds, trained = self._bounds(), []
        for factor, (start, end) in zip(self._factors, bounds, strict=True):
            old, new = before[start:end], now[start:end]
            if factor.inside or torch.equal(old.to(new), new):
                continue
            change = (new - old.to(new)).float()
            if factor.stepped:
                self._judge_average(factor, old.float(), new.float())
            elif factor.gradient is not None:
                cosine = torch.nn.functional.cosine_similarity(change, factor.gradient.to(change), dim=0, eps=0.0)
                factor.descents = factor.descents + 1 if float(cosine) < _COSINE else 0
            factor.stepped, factor.gradient = False, None
            if factor.descents >= _DESCENTS:
                trained.append(factor)
        if trained:
            raise self._error(trained)

    def _judge_average(self, factor: _Factor, old: Tensor, new: Tensor) -> None:
        """Warns if the factor was replaced, twice, by the same average of itself and its value after the last time."""
        synced, factor.synced = factor.synced, new.clone()
        if synced is None or synced.shape != new.shape:
            return
        away, back = old - synced, new - synced
        share = float(torch.dot(away, back) / torch.dot(away, away).clamp_min(1e-30))
        exact = float((back - share * away).norm()) <= 1e-3 * float(back.norm())
        factor.averages = [*factor.averages, share] if exact and 0.02 < share < 0.98 else []
        if len(factor.averages) > 1 and math.isclose(*factor.averages[-2:], rel_tol=1e-2) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{factor.name} of adapter {self._adapter_name!r} is averaged with its own earlier values outside of "
                f"the optimizer's step (with the weight {share:.2g}), as Lookahead does. The pull counts in that part "
                "only, as the optimizer's steps do: unopposed, it shrinks a displacement by less than exp(-λ·Ση). "
                "proximal_mode='coupled' makes the term a part of the gradient"
            )

    def _error(self, factors: list[_Factor]) -> PeftLinearError:
        strengths = self._strengths()
        strength = None if strengths is None else strengths.config.proximal_lambda
        return PeftLinearError(
            f"adapter {self._adapter_name!r} has proximal_lambda={strength}, but {len(factors)} of its factors "
            f"({factors[0].name}, ...) moved against their gradients {factors[0].descents} times in a row without an "
            "optimizer step that peft_linear could intercept, so plain LoRA is being trained. Either the optimizer is "
            "not a torch.optim.Optimizer: call peft_linear.attach_proximal(model, optimizer) before training. Or it "
            "steps copies of the parameters, flattened, sharded (DeepSpeed ZeRO, FSDP1) or in float32 (apex), which "
            "is not supported: give it the model's own parameters, train with DDP, or with proximal_lambda=0"
        )

    def _sample(self) -> Tensor | None:
        self._refresh_views()
        views = [factor.view for factor in self._factors if factor.view is not None]
        if not views:
            return None
        home = views[0].device
        return torch.cat([view if view.device == home else view.to(home) for view in views])

    def _refresh_views(self) -> None:
        """Follows factors whose memory was replaced. Another shape, dtype or device starts the comparison again."""
        for factor in self._factors:
            parameter, old = factor.parameter(), factor.view
            if parameter is not None and old is not None and _begin_alike(old, parameter):
                continue  # the usual case
            factor.view = None if parameter is None or parameter.is_meta else _sampled(_local(parameter))
            if old is not None and (factor.view is None or _kind(old) != _kind(factor.view)):
                self._last, self._pending, factor.synced = None, None, None

    def _bounds(self) -> list[tuple[int, int]]:
        bounds, end = [], 0
        for factor in self._factors:
            start, end = end, end + (0 if factor.view is None else factor.view.numel())
            bounds.append((start, end))
        return bounds


class _Hook:
    """The hook of one factor, which holds the guard weakly."""

    def __init__(self, guard: weakref.ref[MovementGuard], index: int) -> None:
        self._guard, self._index = guard, index

    def __call__(self, gradient: Tensor | None) -> None:
        guard = self._guard()
        if guard is not None and gradient is not None:
            guard.gradient_computed(self._index, gradient)


def _waits(tensor: Tensor) -> bool:
    """Whether a value of it may be read at once: on a GPU that makes the host wait for all that is queued."""
    return tensor.device.type == "cpu"


def _local(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached


def _sampled(tensor: Tensor) -> Tensor:
    """At most 1024 elements, evenly spaced: a view where the tensor is contiguous."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _SAMPLE))]


def _begin_alike(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.dtype == second.dtype


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device
