# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the term keeps in the optimizer's state so that a resumed run continues: step counts, remainders.

The counts of an adapter are in the parameter group of the first of its factors that the optimizer holds, as a dict
under the key `"proximal_lora"`. Parameter groups are part of every optimizer's `state_dict()`: a run that is resumed
with its optimizer keeps its position in the schedule of λ and its firing rate, in any training loop, and a loaded
adapter that is trained by a new optimizer starts from zero.

The gain by which a budget of KL steers λ is there under `"proximal_lora_gain"`.

The remainders are there too, under `"proximal_lora_remainders"`: of each bfloat16 or float16 factor, what its dtype
cannot hold, in float32. The state of the parameters would not do: `load_state_dict` rounds it to their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


GROUP_KEY = "proximal_lora"
REMAINDERS_KEY = "proximal_lora_remainders"
GAIN_KEY = "proximal_lora_gain"
RATE_KEY = "proximal_lora_rate"  # that the group began with, where no scheduler says it


class Counts(NamedTuple):
    """Optimizer steps of one adapter in one optimizer; tensors where the outcome was computed on a device."""

    steps: float | Tensor = 0  # taken: the position in a schedule
    active: float | Tensor = 0  # of these, with λ > 0
    fired: float | Tensor = 0  # of these, at which the term acted (the fraction of tensors, for projection decay)
    exponent: float | Tensor = 0  # Σ λ·η over the steps at which a decoupled term acted


@dataclass
class Statistics:
    """The counts of one adapter, by the name of the first of its factors that each optimizer holds."""

    by_optimizer: dict[str, Counts] = field(default_factory=dict)

    def total(self) -> Counts:
        """The sum over optimizers."""
        counts = self.by_optimizer.values()
        return Counts(*(sum(float(value) for value in column) for column in zip(*counts, strict=True)))

    @property
    def position(self) -> int:
        """The optimizer steps taken, of the optimizer that took most."""
        return max((int(counts.steps) for counts in self.by_optimizer.values()), default=0)

    @property
    def exponent(self) -> float:
        """Σ λ·η so far, of the optimizer in which it is largest."""
        return max((float(counts.exponent) for counts in self.by_optimizer.values()), default=0.0)


@dataclass(frozen=True)
class StepCounter:
    """Counts the steps of one adapter in one optimizer."""

    statistics: Statistics  # the adapter's
    factor: str  # the first factor of the adapter that the optimizer holds
    group: dict[str, Any]  # the parameter group of that factor
    label: str  # the adapter's name, made unique within the group

    def read(self) -> Counts:
        """The counts so far, from the optimizer's state."""
        return Counts(**self.group.get(GROUP_KEY, {}).get(self.label, {}))

    def add(self, taken: float | Tensor, active: bool, fired: float | Tensor, exponent: float | Tensor = 0.0) -> None:
        """Counts one step; `taken` (0 or 1, a number or a tensor) says whether the optimizer took it.

        The dicts are replaced, not changed, so that a `state_dict()` taken before keeps its values.
        """
        before = self.read()
        after = Counts(
            _sum(before.steps, taken),
            _sum(before.active, taken) if active else before.active,
            _sum(before.fired, fired) if active else before.fired,
            _sum(before.exponent, exponent),
        )
        self.group[GROUP_KEY] = {**self.group.get(GROUP_KEY, {}), self.label: after._asdict()}
        self.statistics.by_optimizer[self.factor] = after

    @property
    def gain(self) -> float:
        """What a budget of KL multiplies every λ by, from the optimizer's state."""
        return float(self.group.get(GAIN_KEY, {}).get(self.label, {}).get("gain", 1.0))

    @property
    def response(self) -> dict[str, float]:
        """What the budget knows of the run; empty before the first measurement."""
        kept = self.group.get(GAIN_KEY, {}).get(self.label, {})
        return {name: value for name, value in kept.items() if name != "gain"}

    def steer(self, gain: float, response: dict[str, float]) -> None:
        """Replaces both, in the optimizer's state."""
        self.group[GAIN_KEY] = {**self.group.get(GAIN_KEY, {}), self.label: {"gain": gain, **response}}

    def take_remainder(self, name: str) -> Tensor | None:
        """The remainder that was kept of a factor whose dtype has changed since, once."""
        kept = self.group.get(REMAINDERS_KEY, {}).get(self.label, {})
        return kept.pop(name, None)

    def remainder(self, name: str, like: Tensor) -> Tensor:
        """The float32 remainder of the low-precision tensor `like`: what was kept, or zeros. Changed in place."""
        kept = self.group.setdefault(REMAINDERS_KEY, {}).setdefault(self.label, {})
        found = kept.get(name)
        kind = Tensor if type(like) is torch.nn.Parameter else type(like)  # DTensor where factors are sharded
        if type(found) is not kind or found.shape != like.shape:
            found = torch.zeros_like(like, dtype=torch.float32, requires_grad=False)
        kept[name] = found = found.to(like.device)
        return found


def _sum(total: float | Tensor, addend: float | Tensor) -> float | Tensor:
    if isinstance(total, Tensor) and isinstance(addend, Tensor):  # a loaded state may be on another device
        total = total.to(addend.device)
    return total + addend
