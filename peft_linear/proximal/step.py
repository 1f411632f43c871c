# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The proximal term in one optimizer step, whatever the optimizer.

`before` is called when the gradient of the training loss is complete (unscaled and clipped, as the optimizer gets
it), `after` when the parameters have moved. `before` finds the factors that the optimizer is about to update
(`updates.find_updates`) and evaluates the selective rule; then, by `proximal_mode`,

- `"coupled"`: `before` adds the penalty's gradient to `.grad`, `after` puts the loss gradient back;
- `"decoupled"`: `after` applies the proximal operator, with the learning rate of each factor's parameter group;
- `"projection"`: `before` records each tensor's distance and whether it fires, `after` projects.

So nothing depends on the optimizer's rule: it needs `param_groups` with `"params"` and `"lr"`, and must update the
model's own parameters from `.grad`. Weights that it keeps elsewhere are pulled too, or refused (`elsewhere`);
low-precision factors are pulled in float32 (`precision`). The selective rule's inner product is over all factors of
an adapter that the optimizer holds, in all its groups; where several optimizers share an adapter, each decides for its
own factors.

- An optimizer that calls another one's `step` (Lookahead and other wrappers): the term acts once, in the inner step.
- An optimizer that evaluates the gradient several times in one step (L-BFGS): the first one decides; `"coupled"` is
  refused.
- `GradScaler` with a fused optimizer, which unscales and skips steps by itself: the added gradient is scaled, and a
  step that was skipped changes and counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftLinearError
from .elsewhere import find_places, note_weights, refuse_other_weights
from .operators import (
    apply_projection,
    apply_proximal_operator,
    penalty_gradients,
    prepare_projection,
    risk_inner_product,
)
from .precision import Float32Step, check_remainders
from .shards import added, is_sharded
from .updates import AdapterUpdate, FactorUpdate, ModuleUpdate, find_updates


class AddedGradient:
    """The penalty's gradient, added to a parameter's `.grad` until `restore`."""

    def __init__(self, parameter: nn.Parameter, penalty: Tensor) -> None:
        assert parameter.grad is not None
        self.parameter, self.original, self._penalty = parameter, parameter.grad, penalty
        parameter.grad = self._sum = added(self.original, penalty)
        self._version = self._sum._version

    def restore(self, after_error: bool = False) -> None:
        """Puts the loss gradient back, unless the optimizer has replaced or deleted the gradient.

        After a step that raised, backward passes may have added to the sum: then the penalty's gradient is subtracted.
        """
        if self.parameter.grad is self._sum:
            grown = after_error and self._sum._version != self._version
            self.parameter.grad = added(self._sum, -self._penalty) if grown else self.original


class OptimizerStep:
    """The proximal term in one call of `optimizer.step`."""

    def __init__(self, enclosing: Iterable[OptimizerStep] = ()) -> None:
        self.prepared = False
        self._enclosing = list(enclosing)  # open steps of optimizers whose `step` has called this optimizer's
        self._adapters: list[AdapterUpdate] = []
        self._substitutes: list[AddedGradient | Float32Step] = []

    @torch.no_grad()
    def before(self, optimizer: Any) -> None:
        """Finds the adapters in this step, decides whether the term acts, adds the coupled gradient."""
        if self.prepared:
            self._refuse_coupled(optimizer)
            return
        self.prepared = True
        self._adapters = find_updates(optimizer)
        taken = {factor for outer in self._enclosing for update in outer._adapters for factor in _ids(update.modules)}
        for update in self._adapters:
            refuse_other_weights(optimizer, update)
            with _uncast(update):
                self._decide(update)
            if update.mode == "coupled":  # the outer optimizer has added the gradient already
                update.modules = _without(update.modules, taken)
                with _uncast(update):
                    self._add_gradient(update, optimizer)
            else:  # an outer optimizer leaves the term to this one, which uses the gradient itself
                for outer in self._enclosing:
                    outer._release(update)
                note_weights(optimizer, update)
            update.adapter.step_begins(update.parameters())

    @torch.no_grad()
    def after(self, optimizer: Any) -> None:
        """Puts the gradients back, applies the decoupled term or the projection, counts the step."""
        self.restore_gradients()
        taken = _step_taken(optimizer)
        for update in self._adapters:
            if update.modules:
                refuse_other_weights(optimizer, update)
                find_places(optimizer, update)
                with _uncast(update):
                    _finish(update, taken)
                update.adapter.step_ended(update.parameters())

    def abandon(self) -> None:
        """To be called in place of `after` when the step has raised."""
        self.restore_gradients(after_error=True)
        for update in self._adapters:
            update.adapter.step_begins(update.parameters(), begins=False)

    @torch.no_grad()
    def restore_gradients(self, after_error: bool = False) -> None:
        """Puts back the loss gradients, so that one that is kept for the next step does not contain the penalty's."""
        for substitute in self._substitutes:
            substitute.restore(after_error)
        self._substitutes = []

    def _refuse_coupled(self, optimizer: Any) -> None:
        if any(update.mode == "coupled" for update in self._adapters):
            raise PeftLinearError(
                f"{type(optimizer).__name__} evaluates the gradient several times in one step, for which "
                "proximal_mode='coupled' is not defined; use proximal_mode='decoupled'"
            )

    def _decide(self, update: AdapterUpdate) -> None:
        """Evaluates the selection at the point before the step, by tensor (projection) or for the whole adapter."""
        factors = update.factors()
        if not factors:
            return  # the schedule has λ = 0 at this step
        check_remainders(factors)
        if update.mode == "projection":
            prepare_projection(factors, [self._risk_gradient(factor.parameter) for factor in factors])
        elif update.adapter.config.proximal_selective:
            product = risk_inner_product(factors, [self._risk_gradient(factor.parameter) for factor in factors])
            update.gate = (product >= 0).to(product.dtype)

    def _risk_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient of the training loss alone, also where an enclosing step has added the penalty's."""
        for outer in self._enclosing:
            for substitute in outer._substitutes:
                if substitute.parameter is parameter:
                    return substitute.original
        assert parameter.grad is not None
        return parameter.grad

    def _add_gradient(self, update: AdapterUpdate, optimizer: Any) -> None:
        weight: float | Tensor = 1.0 if update.gate is None else update.gate
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:  # a fused optimizer under GradScaler unscales the gradient by itself
            weight = scale.to(torch.float64).reshape(()) * weight
        for factor, penalty in list(penalty_gradients(update, weight)):
            if factor.is_low:
                self._substitutes.append(_stepped_in_float32(optimizer, factor, penalty))
            else:
                self._substitutes.append(AddedGradient(factor.parameter, penalty))

    def _release(self, inner: AdapterUpdate) -> None:
        """Leaves the modules of an inner optimizer's update to it."""
        for update in self._adapters:
            if update.adapter is inner.adapter:
                update.modules = _without(update.modules, set(_ids(inner.modules)))


def _stepped_in_float32(optimizer: Any, factor: FactorUpdate, penalty: Tensor) -> Float32Step:
    assert factor.parameter.grad is not None
    if is_sharded(factor.parameter):
        raise PeftLinearError(
            f"{factor.name} is sharded (FSDP2) and in {factor.parameter.dtype}, in which the steps of "
            "proximal_mode='coupled' would be rounded away: keep the adapter in float32 (autocast_adapter_dtype=True, "
            "and MixedPrecisionPolicy for the forward pass), or use proximal_mode='decoupled'"
        )
    return Float32Step(optimizer, factor, penalty)


def _finish(update: AdapterUpdate, taken: Tensor | None) -> None:
    """Applies the term after the step, unless the gate or `taken` is 0, and counts."""
    gate = update.gate if taken is None else (taken if update.gate is None else update.gate * taken.to(update.gate))
    fired: float | Tensor = 1 if gate is None else gate
    exponent: float | Tensor = 0.0
    active = bool(update.active_modules)
    if not active:
        fired = 0
    elif update.mode == "decoupled":
        apply_proximal_operator(update, gate)
        exponent = update.exponent() * fired
    elif update.mode == "projection":
        fired = apply_projection(update.factors(), gate)
    update.counter.add(1 if taken is None else taken, active, fired, exponent)


def _uncast(update: AdapterUpdate) -> AbstractContextManager:
    """Switches autocast off for what is done inside, where a step is taken under it."""
    device = update.modules[0].lora.a.device.type if update.modules else "cpu"
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _step_taken(optimizer: Any) -> Tensor | None:
    """1 if a fused optimizer under GradScaler took the step, 0 if it found infinities; None for other optimizers."""
    found = getattr(optimizer, "found_inf", None)
    return None if found is None else (found == 0).to(torch.float64).reshape(())


def _ids(modules: list[ModuleUpdate]) -> Iterable[int]:
    return (id(factor.parameter) for module in modules for factor in module.factors())


def _without(modules: list[ModuleUpdate], parameters: set[int]) -> list[ModuleUpdate]:
    """The modules of which no factor is among `parameters`, given by id."""
    return [module for module in modules if not any(id(f.parameter) in parameters for f in module.factors())]
