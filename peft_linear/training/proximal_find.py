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
"""Which factors of which ProximalLoRA adapters an optimizer is about to step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import PeftLinearError
from ..tuners.proximal_lora.config import check_strength
from ..tuners.proximal_lora.state import live_records
from ..tuners.proximal_lora.tracked import TrackedAdapter
from .proximal_stack import ModuleStep, Stepped


@dataclass
class AdapterStep:
    """The part of one optimizer step that concerns one adapter."""

    adapter: TrackedAdapter
    modules: list[ModuleStep] = field(default_factory=list)
    gate: Tensor | None = None  # 0 or 1, on the factors' device; None: always acts

    def stepped(self) -> list[Stepped]:
        """The factors that the optimizer steps, A before B, in module order."""
        return [step for module in self.modules for step in module.stepped()]


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
            part = AdapterStep(adapter)
            seen: set[int] = set()  # tied adapters are two parameters of one memory
            for factors in adapter.factors():
                a = _stepped(factors.a, factors.anchor.a, strength, groups, adapter, seen)
                b = _stepped(factors.b, factors.anchor.b, strength, groups, adapter, seen)
                if a is not None or b is not None:
                    part.modules.append(ModuleStep(factors, a, b))
            if part.modules:
                yield part


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
        "or sharded (DeepSpeed ZeRO, FSDP, tensor parallelism), where the proximal term cannot be applied: train with "
        "DDP, or with proximal_lambda=0, which is plain LoRA"
    )
