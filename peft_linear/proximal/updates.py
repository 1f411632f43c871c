# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which factors of which ProximalLoRA adapters an optimizer is about to update, and what the proximal term needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import PeftLinearError
from ..tuners.proximal_lora.counts import StepCounter
from ..tuners.proximal_lora.state import live_records
from ..tuners.proximal_lora.tracked import Factors, TrackedAdapter
from .shards import is_supported, local_part, part_of


@dataclass
class FactorUpdate:
    """The update of one factor (A or B of a module) by the optimizer."""

    parameter: nn.Parameter
    anchor: Tensor | None  # θ0 of the whole factor; None: zeros
    learning_rate: float | Tensor
    strength: float  # λ at this step
    fires: Tensor | None = None  # projection only: 0 or 1
    squared_distance: Tensor | None = None  # projection only: ‖θ−θ0‖² before the step

    @property
    def local(self) -> Tensor:
        """The factor, or the shard of it on this process."""
        return local_part(self.parameter)

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

    def factors(self) -> list[FactorUpdate]:
        """The factors with λ > 0 that the optimizer updates, A before B, in module order."""
        return [factor for module in self.active_modules for factor in module.factors()]


def find_updates(optimizer: Any) -> list[AdapterUpdate]:
    """The adapters with some λ > 0 of which `optimizer` is about to update a factor: trainable, with a gradient.

    Raises:
        PeftLinearError: the factors are sharded or flattened in an unsupported way, or their parameter group has no
            learning rate.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    held = []
    for record in list(live_records):
        for adapter in list(record.adapters.values()):
            active = adapter.strengths.active()
            if not active and adapter.stepped:
                continue
            if any(p.requires_grad and id(p) in groups for _, _, *pair in adapter.layers() for p in pair):
                adapter.before_step()
                if active:
                    held.append(adapter)
            elif active:
                _refuse_flattened(adapter)
    updates = (_adapter_update(adapter, counter, groups) for adapter, counter in _with_counters(held, groups))
    return [update for update in updates if update.modules]


def _with_counters(
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
    update = AdapterUpdate(adapter, counter)
    memory: set[int] = set()  # tied adapters are two parameters of one memory: only the first is updated
    for lora in adapter.factors():
        strength = strengths.base(lora.name) * schedule
        a = _factor_update(lora.a, lora.anchor.a, strength, groups, adapter, memory)
        b = _factor_update(lora.b, lora.anchor.b, strength, groups, adapter, memory)
        if a is not None or b is not None:
            update.modules.append(ModuleUpdate(lora, a, b))
    return update


def _factor_update(
    parameter: nn.Parameter,
    anchor: Tensor | None,
    strength: float,
    groups: dict[int, dict],
    adapter: TrackedAdapter,
    memory: set[int],
) -> FactorUpdate | None:
    group = groups.get(id(parameter))
    if group is None or parameter.grad is None or not parameter.requires_grad:
        return None
    if not is_supported(parameter) or parameter.dim() < 2:
        raise _unsupported_layout(adapter)
    local = local_part(parameter)
    if local.numel() and local.data_ptr() in memory:
        return None
    memory.add(local.data_ptr())
    rate = group.get("lr")
    if rate is None:
        raise PeftLinearError(
            f"the parameter group of adapter {adapter.name!r} has no learning rate ('lr' is None or missing), which "
            "the proximal term needs: give it one (Adafactor: relative_step=False), or set proximal_lambda=0"
        )
    return FactorUpdate(parameter, anchor, rate, strength)


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
