# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""One optimizer step of ProximalLoRA adapters: what is decided before it, and what is done after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftLinearError
from .apply import apply_decoupled, apply_projection, penalty_gradients, prepare_projection, risk_product
from .find import AdapterStep, find_steps
from .shards import added
from .stack import ModuleStep


class ProximalStep:
    """The proximal term in one call of `optimizer.step`.

    `before` runs when the gradient of the risk is complete (unscaled and clipped, as the optimizer gets it), `after`
    when the parameters have moved.
    """

    def __init__(self, others: Iterable[ProximalStep] = ()) -> None:
        self.prepared = False
        self._others = list(others)  # of optimizers whose step is under way, which this one's is part of
        self._parts: list[AdapterStep] = []
        self._substitutes: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, our gradient, the risk's

    @torch.no_grad()
    def before(self, optimizer: Any) -> None:
        """Finds the adapters in this step, decides whether the term acts, adds the coupled gradient."""
        again = self.prepared
        self.prepared = True
        if again and any(part.adapter.config.proximal_mode == "coupled" for part in self._parts):
            raise PeftLinearError(
                f"{type(optimizer).__name__} evaluates the gradient several times in one step, for which "
                "proximal_mode='coupled' is not defined; use proximal_mode='decoupled'"
            )
        if again:
            return
        self._parts = list(find_steps(optimizer))
        taken = {id(s.value) for o in self._others for part in o._parts for m in part.modules for s in m.stepped()}
        for part in self._parts:
            mode, steps = part.adapter.config.proximal_mode, part.stepped()
            if not steps:
                pass  # the schedule has λ = 0 at this step
            elif mode == "projection":
                prepare_projection(part, [self._risk_gradient(s.value) for s in steps])
            elif part.adapter.config.proximal_selective:
                product = risk_product(steps, [self._risk_gradient(s.value) for s in steps])
                part.gate = (product >= 0).to(product.dtype)
            if mode == "coupled":
                part.modules = [module for module in part.modules if not _any_in(module, taken)]
                self._add_gradient(part, getattr(optimizer, "grad_scale", None))
            else:
                # an optimizer that wraps another leaves the term to the inner one, which sees the real gradient
                for other in self._others:
                    other._release(part)

    @torch.no_grad()
    def after(self, optimizer: Any) -> None:
        """Applies the decoupled term, puts the gradients back, counts."""
        self.restore_gradients()
        valid = _not_skipped(optimizer)
        for part in self._parts:
            if not part.modules:
                continue
            gate = part.gate if valid is None else (valid if part.gate is None else part.gate * valid.to(part.gate))
            fired: float | Tensor = 1 if gate is None else gate
            if not part.pulled:
                fired = 0
            elif part.adapter.config.proximal_mode == "decoupled":
                apply_decoupled(part, gate)
            elif part.adapter.config.proximal_mode == "projection":
                fired = apply_projection(part, gate)
            part.counter.add(1 if valid is None else valid, bool(part.pulled), fired)

    def restore_gradients(self) -> None:
        """The gradients become the risk's again, so that one that is kept does not take the term in twice."""
        for parameter, ours, original in self._substitutes:
            if parameter.grad is ours:
                parameter.grad = original
        self._substitutes = []

    def _risk_gradient(self, parameter: nn.Parameter) -> Tensor:
        for step in self._others:
            for substituted, _, original in step._substitutes:
                if substituted is parameter:
                    return original
        assert parameter.grad is not None
        return parameter.grad

    def _add_gradient(self, part: AdapterStep, scale: Tensor | None) -> None:
        factor: float | Tensor = 1.0 if part.gate is None else part.gate
        if scale is not None:  # a fused optimizer under GradScaler unscales the gradient by itself
            factor = scale.to(torch.float64).reshape(()) * factor
        for step, gradient in penalty_gradients(part, factor):
            original = step.value.grad
            assert original is not None
            step.value.grad = ours = added(original, gradient)
            self._substitutes.append((step.value, ours, original))

    def _release(self, part: AdapterStep) -> None:
        inner = {id(step.value) for module in part.modules for step in module.stepped()}
        for mine in self._parts:
            if mine.adapter is part.adapter:
                mine.modules = [module for module in mine.modules if not _any_in(module, inner)]


def _not_skipped(optimizer: Any) -> Tensor | None:
    """1 if a fused optimizer under GradScaler took the step, 0 if it found infinities; None where that cannot be."""
    found = getattr(optimizer, "found_inf", None)
    return None if found is None else (found == 0).to(torch.float64).reshape(())


def _any_in(module: ModuleStep, ids: set[int]) -> bool:
    return any(id(step.value) in ids for step in module.stepped())
