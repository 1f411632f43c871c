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
"""One optimizer step of ProximalLoRA adapters: what is decided before it, and what is done after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftLinearError
from ..functional.proximal import (
    delta_gradient,
    delta_proximal_step,
    factor_gradient,
    factor_proximal_step_,
    inner_product,
)
from ..tuners.proximal_lora.config import check_strength
from ..tuners.proximal_lora.state import live_records
from ..tuners.proximal_lora.tracked import TrackedAdapter
from .proximal_stack import ModuleStep, Stepped, stack_modules


@dataclass
class AdapterStep:
    """The part of one optimizer step that concerns one adapter."""

    adapter: TrackedAdapter
    strength: float  # λ
    modules: list[ModuleStep] = field(default_factory=list)
    gate: Tensor | None = None  # 0 or 1, on the factors' device; None: always acts

    def stepped(self) -> list[Stepped]:
        """The factors that the optimizer steps, A before B, in module order."""
        return [step for module in self.modules for step in module.stepped()]


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
        taken = {id(step.value) for other in self._others for part in other._parts for step in part.stepped()}
        for part in self._parts:
            if part.adapter.config.proximal_selective:
                steps = part.stepped()
                product = inner_product(
                    [self._risk_gradient(s.value) for s in steps], [s.value for s in steps], [s.anchor for s in steps]
                )
                part.gate = (product >= 0).to(product.dtype)
            if part.adapter.config.proximal_mode == "coupled":
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
            if part.adapter.config.proximal_mode == "decoupled":
                _apply_decoupled(part, gate)
            statistics = part.adapter.statistics
            statistics.steps = statistics.steps + (1 if valid is None else valid)
            statistics.fired = statistics.fired + (1 if gate is None else gate)

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
        strength: float | Tensor = part.strength if part.gate is None else part.gate * part.strength
        if scale is not None:  # a fused optimizer under GradScaler unscales the gradient by itself
            strength = scale.to(torch.float64).reshape(()) * strength
        for step, gradient in _penalty_gradients(part, strength):
            original = step.value.grad
            assert original is not None
            step.value.grad = ours = original + gradient.to(original)
            self._substitutes.append((step.value, ours, original))

    def _release(self, part: AdapterStep) -> None:
        inner = {id(step.value) for step in part.stepped()}
        for mine in self._parts:
            if mine.adapter is part.adapter:
                mine.modules = [module for module in mine.modules if not _any_in(module, inner)]


def find_steps(optimizer: Any) -> Iterator[AdapterStep]:
    """The live adapters with λ > 0 of which `optimizer` is about to step a factor: trainable, and with a gradient.

    Raises:
        PeftLinearError: the factors are sharded or flattened, or their group has no learning rate.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for record in list(live_records):
        for adapter in list(record.adapters.values()):
            strength = adapter.config.proximal_lambda
            check_strength(strength)
            if strength == 0 and adapter.seen:
                continue
            held = any(p.requires_grad and id(p) in groups for _, _, *pair in adapter.layers() for p in pair)
            if held:
                adapter.see()
            elif strength > 0:
                _refuse_flattened(adapter)
            if not held or strength == 0:
                continue
            part = AdapterStep(adapter, strength)
            seen: set[int] = set()  # tied adapters are two parameters of one memory
            for factors in adapter.factors():
                a = _stepped(factors.a, factors.anchor.a, groups, adapter, seen)
                b = _stepped(factors.b, factors.anchor.b, groups, adapter, seen)
                if a is not None or b is not None:
                    part.modules.append(ModuleStep(factors, a, b))
            if part.modules:
                yield part


def _stepped(
    parameter: nn.Parameter, anchor: Tensor | None, groups: dict[int, dict], adapter: TrackedAdapter, seen: set[int]
) -> Stepped | None:
    group = groups.get(id(parameter))
    if group is None or parameter.grad is None or not parameter.requires_grad:
        return None
    if hasattr(parameter, "device_mesh") or parameter.dim() < 2:
        raise _sharded(adapter)
    address = parameter.data_ptr()
    if address in seen:
        return None
    seen.add(address)
    rate = group.get("lr")
    if rate is None:
        raise PeftLinearError(
            f"the parameter group of adapter {adapter.name!r} has no learning rate ('lr' is None or missing), which "
            "the proximal term needs: give it one (Adafactor: relative_step=False), or set proximal_lambda=0"
        )
    return Stepped(parameter, anchor, rate)


def _refuse_flattened(adapter: TrackedAdapter) -> None:
    """An optimizer without the adapter's factors is none of our business, unless it holds them in another form."""
    for _, _, *pair in adapter.layers():
        for value in pair:
            partitioned = hasattr(value, "ds_id") or hasattr(value, "_hp_mapping") or value.dim() < 2
            if value.requires_grad and (partitioned or not isinstance(value, nn.Parameter)):
                raise _sharded(adapter)
        break


def _sharded(adapter: TrackedAdapter) -> PeftLinearError:
    return PeftLinearError(
        f"the parameters of adapter {adapter.name!r} (proximal_lambda={adapter.config.proximal_lambda}) are flattened "
        "or sharded (DeepSpeed ZeRO, FSDP, tensor parallelism), where the proximal term cannot be applied: train with "
        "DDP, or with proximal_lambda=0, which is plain LoRA"
    )


def _apply_decoupled(part: AdapterStep, gate: Tensor | None) -> None:
    if part.adapter.config.proximal_space == "factors":
        by_rate: dict[Any, list[Stepped]] = {}
        for step in part.stepped():
            key = id(step.learning_rate) if isinstance(step.learning_rate, Tensor) else step.learning_rate
            by_rate.setdefault(key, []).append(step)
        for steps in by_rate.values():
            step_size = steps[0].learning_rate * part.strength
            factor_proximal_step_([s.value for s in steps], [s.anchor for s in steps], step_size, gate)
        return
    for stack in stack_modules(part.modules, part.adapter.name):
        rates_a, rates_b = stack.rates(part.strength, gate)
        new_a, new_b = delta_proximal_step(stack.a, stack.b, stack.a0, stack.b0, rates_a, rates_b)
        stack.store(new_a, new_b)


def _penalty_gradients(part: AdapterStep, strength: float | Tensor) -> Iterator[tuple[Stepped, Tensor]]:
    if part.adapter.config.proximal_space == "factors":
        steps = part.stepped()
        gradients = factor_gradient([s.value for s in steps], [s.anchor for s in steps], strength)
        yield from zip(steps, gradients, strict=True)
        return
    for stack in stack_modules(part.modules, part.adapter.name):
        by_factor = delta_gradient(stack.a, stack.b, stack.a0, stack.b0, stack.squared_scalings * strength)
        yield from stack.unstack(*by_factor)


def _not_skipped(optimizer: Any) -> Tensor | None:
    """1 if a fused optimizer under GradScaler took the step, 0 if it found infinities; None where that cannot be."""
    found = getattr(optimizer, "found_inf", None)
    return None if found is None else (found == 0).to(torch.float64).reshape(())


def _any_in(module: ModuleStep, ids: set[int]) -> bool:
    return any(id(step.value) in ids for step in module.stepped())
