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
from peft.tuners.lora import ParamWrapper
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
from ..tuners.proximal_lora.state import Factors, TrackedAdapter, live_records


@dataclass
class Stepped:
    """One factor that the optimizer is about to step."""

    value: nn.Parameter
    anchor: Tensor | None
    learning_rate: float | Tensor


@dataclass
class AdapterStep:
    """The part of one optimizer step that concerns one adapter."""

    adapter: TrackedAdapter
    strength: float  # λ
    factors: list[tuple[Factors, Stepped | None, Stepped | None]] = field(default_factory=list)  # with A's, B's step
    gate: Tensor | None = None  # 0 or 1, on the factors' device; None: always acts

    def stepped(self) -> list[Stepped]:
        """The factors that the optimizer steps, A before B, in module order."""
        return [step for _, a, b in self.factors for step in (a, b) if step is not None]


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
                part.factors = [entry for entry in part.factors if not _any_in(entry, taken)]
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
            if not part.factors:
                continue
            gate = part.gate if valid is None else (valid if part.gate is None else part.gate * valid.to(part.gate))
            if part.adapter.config.proximal_mode == "decoupled":
                _apply_decoupled(part, gate)
            statistics = part.adapter.statistics
            statistics.steps = statistics.steps + (1 if valid is None else valid)
            statistics.fired = statistics.fired + (1 if gate is None else gate)
            part.adapter.acted = True

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
                mine.factors = [entry for entry in mine.factors if not _any_in(entry, inner)]


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
            if strength == 0:
                continue
            if not any(id(a) in groups or id(b) in groups for _, _, a, b in adapter.layers()):
                _refuse_flattened(adapter)
                continue
            part = AdapterStep(adapter, strength)
            seen: set[int] = set()  # tied adapters are two parameters of one memory
            for factors in adapter.factors():
                a = _stepped(factors.a, factors.anchor.a, groups, adapter, seen)
                b = _stepped(factors.b, factors.anchor.b, groups, adapter, seen)
                if a is not None or b is not None:
                    part.factors.append((factors, a, b))
            if part.factors:
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
            f"the parameter group of adapter {adapter.name!r} has no learning rate ('lr' is None or missing), which the "
            "proximal term needs: give the optimizer one (Adafactor: relative_step=False), or set proximal_lambda=0"
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
        f"the parameters of adapter {adapter.name!r} (proximal_lambda={adapter.config.proximal_lambda}) are flattened or "
        "sharded (DeepSpeed ZeRO, FSDP, tensor parallelism), where the proximal term cannot be applied: train with DDP, "
        "or with proximal_lambda=0, which is plain LoRA"
    )


def _apply_decoupled(part: AdapterStep, gate: Tensor | None) -> None:
    if part.adapter.config.proximal_space == "factors":
        by_rate: dict[Any, list[Stepped]] = {}
        for step in part.stepped():
            key = id(step.learning_rate) if isinstance(step.learning_rate, Tensor) else step.learning_rate
            by_rate.setdefault(key, []).append(step)
        for steps in by_rate.values():
            strength = steps[0].learning_rate * part.strength
            step_size = strength if gate is None else gate * torch.as_tensor(strength).to(gate)
            factor_proximal_step_([s.value for s in steps], [s.anchor for s in steps], step_size)
        return
    for batch in _batches(part):
        rates_a, rates_b = batch.rates(part.strength, gate)
        new_a, new_b = delta_proximal_step(batch.a, batch.b, batch.a0, batch.b0, rates_a, rates_b)
        batch.store(new_a, new_b)


def _penalty_gradients(part: AdapterStep, strength: float | Tensor) -> Iterator[tuple[Stepped, Tensor]]:
    if part.adapter.config.proximal_space == "factors":
        steps = part.stepped()
        gradients = factor_gradient([s.value for s in steps], [s.anchor for s in steps], strength)
        yield from zip(steps, gradients, strict=True)
        return
    for batch in _batches(part):
        gradients = delta_gradient(batch.a, batch.b, batch.a0, batch.b0, batch.squared_scalings * strength)
        yield from batch.unstack(*gradients)


class _Batch:
    """Modules of equal shapes, stacked, so that their r×r computations are one call."""

    def __init__(self, entries: list[tuple[Factors, Stepped | None, Stepped | None]], name: str) -> None:
        self._entries = entries
        self._views = [matrices(factors.layer, factors.a, factors.b) for factors, _, _ in entries]
        self.a = torch.stack([a for a, _ in self._views])
        self.b = torch.stack([b for _, b in self._views])
        first = entries[0][0].anchor
        self.a0 = self.b0 = None
        if first.a is not None and first.b is not None:
            anchors = [matrices(f.layer, f.anchor.a, f.anchor.b) for f, _, _ in entries]
            self.a0 = torch.stack([a for a, _ in anchors])
            self.b0 = torch.stack([b for _, b in anchors])
        scalings = [float(factors.layer.scaling[name]) for factors, _, _ in entries]
        self.squared_scalings = self._column([s * s for s in scalings])

    def _column(self, values: list[Any]) -> Tensor:
        plain = not any(isinstance(value, Tensor) for value in values)
        dtype = torch.float32 if self.a.device.type == "mps" else torch.float64
        column = (
            torch.tensor(values, dtype=dtype, device=self.a.device)
            if plain
            else torch.stack([torch.as_tensor(v, dtype=dtype, device=self.a.device).reshape(()) for v in values])
        )
        return column.reshape(-1, *[1] * (self.a.dim() - 1))

    def rates(self, strength: float, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """ηλs² for A and for B, per module; 0 for a factor that the optimizer does not step."""
        columns = []
        for position in (1, 2):
            rates = [0.0 if entry[position] is None else entry[position].learning_rate for entry in self._entries]
            column = self._column(rates) * self.squared_scalings * strength
            columns.append(column if gate is None else column * gate.to(column))
        return columns[0], columns[1]

    def store(self, new_a: Tensor, new_b: Tensor) -> None:
        """Writes back into the parameters that the optimizer steps."""
        for index, (_, a, b) in enumerate(self._entries):
            if a is not None:
                self._views[index][0].copy_(new_a[index])
            if b is not None:
                self._views[index][1].copy_(new_b[index])

    def unstack(self, like_a: Tensor, like_b: Tensor) -> Iterator[tuple[Stepped, Tensor]]:
        """The stepped factors with their part of a stacked quantity, shaped as the parameters."""
        for index, (factors, a, b) in enumerate(self._entries):
            if a is not None:
                shaped = torch.empty_like(factors.a)
                matrices(factors.layer, shaped, factors.b)[0].copy_(like_a[index])
                yield a, shaped
            if b is not None:
                shaped = torch.empty_like(factors.b)
                matrices(factors.layer, factors.a, shaped)[1].copy_(like_b[index])
                yield b, shaped


def _batches(part: AdapterStep) -> Iterator[_Batch]:
    groups: dict[tuple, list] = {}
    for entry in part.factors:
        factors = entry[0]
        product = factors.anchor.a is not None and factors.anchor.b is not None
        key = (factors.a.shape, factors.b.shape, factors.a.dtype, factors.a.device, product, type(factors.layer))
        groups.setdefault(key, []).append(entry)
    for entries in groups.values():
        yield _Batch(entries, part.adapter.name)


def matrices(layer: nn.Module, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Views of the factors as matrices (..., r, d_in) and (..., d_out, r) whose product is the change of the weight.

    Convolution kernels are flattened over input and window; adapters of a 3-D expert parameter get a leading dimension
    of experts, those of a grouped convolution one of groups.
    """
    experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    a_matrix = a.flatten(1)
    if experts > 1:
        return a_matrix.reshape(experts, -1, a_matrix.shape[-1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    b_matrix = b.flatten(1)
    groups = a_matrix.shape[0] // b_matrix.shape[1]
    if groups > 1:
        return a_matrix.unflatten(0, (groups, -1)), b_matrix.unflatten(0, (groups, -1))
    return a_matrix, b_matrix


def _not_skipped(optimizer: Any) -> Tensor | None:
    """1 if a fused optimizer under GradScaler took the step, 0 if it found infinities; None where that cannot be."""
    found = getattr(optimizer, "found_inf", None)
    return None if found is None else (found == 0).to(torch.float64).reshape(())


def _any_in(entry: tuple[Factors, Stepped | None, Stepped | None], ids: set[int]) -> bool:
    return any(step is not None and id(step.value) in ids for step in entry[1:])
