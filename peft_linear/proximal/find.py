# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which factors of which ProximalLoRA adapters an optimizer is about to step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import PeftLinearError
from ..tuners.proximal_lora.state import live_records
from ..tuners.proximal_lora.tracked import TrackedAdapter
from .counts import Counter
from .shards import is_supported, local_part
from .stack import ModuleStep, Stepped


@dataclass
class AdapterStep:
    """The part of one optimizer step that concerns one adapter."""

    adapter: TrackedAdapter
    counter: Counter
    modules: list[ModuleStep] = field(default_factory=list)  # also those with λ = 0 at this step
    gate: Tensor | None = None  # 0 or 1, on the factors' device; None: always acts

    @property
    def pulled(self) -> list[ModuleStep]:
        """The modules with λ > 0 at this step."""
        return [module for module in self.modules if module.strength > 0]

    def stepped(self) -> list[Stepped]:
        """The factors with λ > 0 that the optimizer steps, A before B, in module order."""
        return [step for module in self.pulled for step in module.stepped()]


def find_steps(optimizer: Any) -> Iterator[AdapterStep]:
    """The live adapters with some λ > 0 of which `optimizer` is about to step a factor: trainable, with a gradient.

    Raises:
        PeftLinearError: the factors are sharded or flattened, or their group has no learning rate.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    held = []
    for record in list(live_records):
        for adapter in list(record.adapters.values()):
            pulled = adapter.strengths.pulled()
            if not pulled and adapter.seen:
                continue
            if any(p.requires_grad and id(p) in groups for _, _, *pair in adapter.layers() for p in pair):
                adapter.see()
                if pulled:
                    held.append(adapter)
            elif pulled:
                _refuse_flattened(adapter)
    for counter in _counters(held, groups):
        part = _adapter_step(counter, groups)
        if part.modules:
            yield part


def _counters(adapters: list[TrackedAdapter], groups: dict[int, dict]) -> list[Counter]:
    """Where the adapters' steps are counted. Adapters of one name (of several models) are numbered in the optimizer's
    order, which a resumed run shares."""
    order = {parameter: index for index, parameter in enumerate(groups)}
    firsts = []
    for adapter in adapters:
        factors = ((f"{n}.{x}", id(p)) for n, _, a, b in adapter.layers() for x, p in (("A", a), ("B", b)))
        name, parameter = next((n, p) for n, p in factors if p in groups)
        firsts.append((order[parameter], name, groups[parameter], adapter))
    counters: list[Counter] = []
    for _, name, group, adapter in sorted(firsts, key=lambda first: first[0]):
        earlier = sum(c.group is group and c.adapter.name == adapter.name for c in counters)
        label = f"{adapter.name}#{earlier + 1}" if earlier else adapter.name
        counters.append(Counter(adapter, name, group, label))
    return counters


def _adapter_step(counter: Counter, groups: dict[int, dict]) -> AdapterStep:
    adapter, strengths = counter.adapter, counter.adapter.strengths
    # reading the position may wait for the device: only where it matters
    factor = strengths.factor(int(counter.read().steps)) if strengths.scheduled else 1.0
    part = AdapterStep(adapter, counter)
    seen: set[int] = set()  # tied adapters are two parameters of one memory
    for factors in adapter.factors():
        strength = strengths.base(factors.name) * factor
        a = _stepped(factors.a, factors.anchor.a, strength, groups, adapter, seen)
        b = _stepped(factors.b, factors.anchor.b, strength, groups, adapter, seen)
        if a is not None or b is not None:
            part.modules.append(ModuleStep(factors, a, b))
    return part


def _stepped(
    parameter: nn.Parameter,
    anchor: Tensor | None,
    strength: float,
    groups: dict[int, dict],
    adapter: TrackedAdapter,
    seen: set[int],
) -> Stepped | None:
    group = groups.get(id(parameter))
    if group is None or parameter.grad is None or not parameter.requires_grad:
        return None
    if not is_supported(parameter) or parameter.dim() < 2:
        raise _sharded(adapter)
    memory = local_part(parameter)
    if memory.numel() and memory.data_ptr() in seen:
        return None
    seen.add(memory.data_ptr())
    rate = group.get("lr")
    if rate is None:
        raise PeftLinearError(
            f"the parameter group of adapter {adapter.name!r} has no learning rate ('lr' is None or missing), which "
            "the proximal term needs: give it one (Adafactor: relative_step=False), or set proximal_lambda=0"
        )
    return Stepped(parameter, anchor, rate, strength)


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
        "or sharded (DeepSpeed ZeRO, FSDP1, strided tensor parallelism) in a way in which the proximal term cannot be "
        "applied: train with DDP or FSDP2 (fully_shard), or with proximal_lambda=0, which is plain LoRA"
    )
