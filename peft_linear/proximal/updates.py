# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which factors of which ProximalLoRA adapters an optimizer is about to update, and what the proximal term needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import PeftLinearError
from ..tuners.proximal_lora.counts import StepCounter
from ..tuners.proximal_lora.state import live_records
from ..tuners.proximal_lora.tracked import Factors, TrackedAdapter
from .shards import is_supported, local_part, part_of


_LARGEST = 1e38  # a larger λ is this one: a float32 rate of 0 times infinity would be NaN
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Place(Protocol):
    """Where an optimizer keeps the weights that it steps, if not in the factor itself."""

    def read(self) -> Tensor:
        """The weights, of the factor's local shape, in float32 or more."""

    def write(self, value: Tensor) -> None:
        """Replaces them, and the factor by what follows from them."""


@dataclass
class FactorUpdate:
    """The update of one factor (A or B of a module) by the optimizer."""

    name: str  # "<module>.A" or "<module>.B"
    parameter: nn.Parameter
    anchor: Tensor | None  # θ0 of the whole factor; None: zeros
    learning_rate: float | Tensor
    strength: float  # λ at this step
    group: dict[str, Any]  # the factor's parameter group
    counter: StepCounter
    place: Place | None = None
    earlier: Tensor | None = None  # a copy from before the step, in an optimizer's first steps
    fires: Tensor | None = None  # projection only: 0 or 1
    squared_distance: Tensor | None = None  # projection only: ‖θ−θ0‖² before the step

    @property
    def local(self) -> Tensor:
        """The factor, or the shard of it on this process."""
        return local_part(self.parameter)

    @property
    def is_low(self) -> bool:
        """Whether the factor's dtype has too few bits for small steps."""
        return self.parameter.dtype in LOW_PRECISION

    @property
    def remainder(self) -> Tensor:
        """What a low-precision factor cannot hold of the weights, local."""
        return local_part(self.counter.remainder(self.name, self.parameter))

    @property
    def local_anchor(self) -> Tensor | None:
        """The anchor of `local`."""
        return None if self.anchor is None else part_of(self.anchor, self.parameter)


@dataclass
class ModuleUpdate:
    """The updates of one module's factors; None for a factor that the optimizer does not update."""

    lora: Factors
    a: FactorUpdate | None
    b: FactorUpdate | None

    @property
    def strength(self) -> float:
        """λ of the module at this step."""
        return self.factors()[0].strength

    def factors(self) -> list[FactorUpdate]:
        """The factors that the optimizer updates, A before B."""
        return [factor for factor in (self.a, self.b) if factor is not None]


@dataclass
class AdapterUpdate:
    """The updates of one adapter's factors in one optimizer step."""

    adapter: TrackedAdapter
    counter: StepCounter
    modules: list[ModuleUpdate] = field(default_factory=list)  # also those with λ = 0 at this step
    gate: Tensor | None = None  # the selective rule's decision, 0 or 1, on the factors' device; None: always acts

    @property
    def mode(self) -> str:
        """`proximal_mode` of the adapter."""
        return self.adapter.config.proximal_mode

    @property
    def active_modules(self) -> list[ModuleUpdate]:
        """The modules with λ > 0 at this step."""
        return [module for module in self.modules if module.strength > 0]

    def exponent(self) -> float | Tensor:
        """λ·η of this step, the largest of the active modules and their parameter groups."""
        products = {(id(f.group), f.strength): f.learning_rate * f.strength for f in self.factors()}.values()
        on_device = next((p.device for p in products if isinstance(p, Tensor) and p.device.type != "cpu"), None)
        if on_device is None:
            return max((float(product) for product in products), default=0.0)
        rows = [torch.as_tensor(p, dtype=torch.float64, device=on_device).reshape(()) for p in products]
        return torch.stack(rows).max()  # not read: the host would wait for the device

    def parameters(self) -> list[nn.Parameter]:
        """All factors that the optimizer updates."""
        return [factor.parameter for module in self.modules for factor in module.factors()]

    def factors(self) -> list[FactorUpdate]:
        """The factors with λ > 0 that the optimizer updates, A before B, in module order."""
        return [factor for module in self.active_modules for factor in module.factors()]


def find_updates(optimizer: Any) -> list[AdapterUpdate]:
    """The adapters with some λ > 0 of which `optimizer` is about to update a factor: trainable, with a gradient.

    Raises:
        PeftLinearError: λ is "auto" and no run was planned, the factors are sharded or flattened in an unsupported
            way, their gradient is not in `.grad`, or their parameter group has no learning rate, or one that is
            negative or not finite.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    held = []
    for record in list(live_records):
        for adapter in list(record.adapters.values()):
            active = adapter.strengths.active()
            if not active and adapter.stepped:
                continue
            factors = [p for _, _, *pair in adapter.layers() for p in pair if p.requires_grad and id(p) in groups]
            if any(p.grad is not None for p in factors):
                adapter.strengths.check_planned()
                adapter.before_step()
                if active:
                    held.append(adapter)
            elif active and factors:
                _refuse_other_gradients(adapter, factors)
            elif active:
                _refuse_flattened(adapter)
    updates = (_adapter_update(adapter, counter, groups) for adapter, counter in step_counters(held, groups))
    found = [update for update in updates if update.modules]
    for update in found:
        used = {id(factor.group) for module in update.active_modules for factor in module.factors()}
        for index, group in enumerate(optimizer.param_groups):
            if id(group) in used:
                _check_rate(group.get("lr"), index, update.adapter)
    return found


def step_counters(
    adapters: list[TrackedAdapter], groups: dict[int, dict]
) -> Iterator[tuple[TrackedAdapter, StepCounter]]:
    """The adapters in the optimizer's order, each with its step counter.

    Adapters of several models with the same name are numbered in this order, which is the same in a resumed run.
    """
    order = {parameter: index for index, parameter in enumerate(groups)}
    firsts = []
    for adapter in adapters:
        factors = ((f"{n}.{x}", id(p)) for n, _, a, b in adapter.layers() for x, p in (("A", a), ("B", b)))
        name, parameter = next((n, p) for n, p in factors if p in groups)
        firsts.append((order[parameter], name, groups[parameter], adapter))
    earlier: dict[tuple[int, str], int] = {}  # group and adapter name -> adapters so far
    for _, factor, group, adapter in sorted(firsts, key=lambda first: first[0]):
        number = earlier[id(group), adapter.name] = earlier.get((id(group), adapter.name), 0) + 1
        label = adapter.name if number == 1 else f"{adapter.name}#{number}"
        yield adapter, StepCounter(adapter.statistics, factor, group, label)


def _adapter_update(adapter: TrackedAdapter, counter: StepCounter, groups: dict[int, dict]) -> AdapterUpdate:
    strengths = adapter.strengths
    # reading the count may wait for the device, so it is read only for a schedule
    schedule = strengths.factor(int(counter.read().steps)) if strengths.scheduled else 1.0
    strengths.gain = counter.gain
    update = AdapterUpdate(adapter, counter)
    memory: set[int] = set()  # tied adapters are two parameters of one memory: only the first is updated
    for lora in adapter.factors():
        strength = min(strengths.base(lora.name) * schedule * counter.gain, _LARGEST)
        pair: list[FactorUpdate | None] = []
        for letter, value, anchor in (("A", lora.a, lora.anchor.a), ("B", lora.b, lora.anchor.b)):
            group = _group_of(value, groups, adapter, memory)
            if group is None:
                pair.append(None)
                continue
            rate, name = group.get("lr"), f"{lora.name}.{letter}"  # None is refused later
            pair.append(FactorUpdate(name, value, anchor, cast(float, rate), strength, group, counter))
        if pair != [None, None]:
            update.modules.append(ModuleUpdate(lora, *pair))
    return update


def _group_of(
    parameter: nn.Parameter, groups: dict[int, dict], adapter: TrackedAdapter, memory: set[int]
) -> dict[str, Any] | None:
    """The group of a factor that the optimizer is about to update; None if it is not."""
    group = groups.get(id(parameter))
    if group is None or not parameter.requires_grad:
        return None
    if parameter.grad is None:
        _refuse_other_gradients(adapter, [parameter])
        return None
    if not is_supported(parameter) or parameter.dim() < 2:
        raise _unsupported_layout(adapter)
    local = local_part(parameter)
    if local.numel() and local.data_ptr() in memory:
        return None
    memory.add(local.data_ptr())
    return group


def _check_rate(rate: Any, index: int, adapter: TrackedAdapter) -> None:
    """Refuses a learning rate that is no finite number >= 0. The value of a tensor on a device is not looked at.

    To read it would make every step wait for the device. Nothing there depends on its value but the result: a NaN
    gives NaN, as in the optimizer itself.
    """
    where = f"parameter group {index} of the optimizer, which holds factors of adapter {adapter.name!r},"
    if rate is None:
        raise PeftLinearError(
            f"{where} has no learning rate ('lr' is None or missing), which the proximal term needs: give it one "
            "(Adafactor: relative_step=False), or set proximal_lambda=0"
        )
    if isinstance(rate, Tensor) and (rate.device.type != "cpu" or rate.numel() != 1):
        good = rate.numel() == 1
    else:
        try:
            good = not isinstance(rate, str) and 0 <= float(rate) < math.inf
        except (TypeError, ValueError, OverflowError):
            good = False
    if not good:
        raise PeftLinearError(
            f"{where} has the learning rate {rate!r}; the proximal term needs one finite number >= 0: correct the "
            "group's 'lr' or the scheduler that sets it"
        )


def _refuse_other_gradients(adapter: TrackedAdapter, parameters: list[nn.Parameter]) -> None:
    """Factors without `.grad` are not pulled: refuse those whose gradient is known to be in another attribute."""
    for parameter in parameters:
        for name in ("main_grad", "decoupled_grad"):
            if isinstance(getattr(parameter, name, None), Tensor):
                raise PeftLinearError(
                    f"factors of adapter {adapter.name!r} have their gradients in .{name} (Megatron, Transformer "
                    "Engine), not in .grad, where the proximal term reads them: accumulate gradients in .grad, or "
                    "train with proximal_lambda=0, which is plain LoRA"
                )


def _refuse_flattened(adapter: TrackedAdapter) -> None:
    """An optimizer without the adapter's factors is ignored, unless the factors were flattened or partitioned."""
    for _, _, *pair in adapter.layers():
        for value in pair:
            partitioned = hasattr(value, "ds_id") or hasattr(value, "_hp_mapping") or value.dim() < 2
            if value.requires_grad and (partitioned or not isinstance(value, nn.Parameter)):
                raise _unsupported_layout(adapter)
        break


def _unsupported_layout(adapter: TrackedAdapter) -> PeftLinearError:
    return PeftLinearError(
        f"the parameters of adapter {adapter.name!r} (proximal_lambda={adapter.config.proximal_lambda}) are flattened "
        "or sharded (DeepSpeed ZeRO, FSDP1, strided tensor parallelism) in a way in which the proximal term cannot be "
        "applied: train with DDP or FSDP2 (fully_shard), or with proximal_lambda=0, which is plain LoRA"
    )
