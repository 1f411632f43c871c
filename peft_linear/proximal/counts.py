# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The count of optimizer steps, kept where it is saved with the optimizer and comes back with it.

The counts of an adapter lie in the parameter group of the first of its factors that the optimizer holds, as a dict
under the key `"proximal_lora"`. Parameter groups are part of every optimizer's `state_dict()`: a run that is resumed
with its optimizer goes on at its position in the schedule of λ and with its firing rate, in any training loop, and a
loaded adapter that is trained by a new optimizer starts anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..tuners.proximal_lora.tracked import Counts, TrackedAdapter


GROUP_KEY = "proximal_lora"


@dataclass(frozen=True)
class Counter:
    """The counts of one adapter in one optimizer."""

    adapter: TrackedAdapter
    factor: str  # the first factor of the adapter that the optimizer holds
    group: dict[str, Any]  # the parameter group that has it
    label: str  # the adapter's name, made unique within the group

    def read(self) -> Counts:
        """The counts so far, from the optimizer's state."""
        return Counts(**self.group.get(GROUP_KEY, {}).get(self.label, {}))

    def add(self, taken: float | Tensor, active: bool, fired: float | Tensor) -> None:
        """Counts one step, of which `taken` (0 or 1, or a tensor of that) says whether the optimizer took it.

        New dicts take the place of the old ones, so that a `state_dict()` taken before stays as it was.
        """
        before = self.read()
        after = Counts(
            _sum(before.steps, taken),
            _sum(before.active, taken) if active else before.active,
            _sum(before.fired, fired) if active else before.fired,
        )
        self.group[GROUP_KEY] = {**self.group.get(GROUP_KEY, {}), self.label: after._asdict()}
        self.adapter.statistics.by_optimizer[self.factor] = after


def _sum(total: float | Tensor, addend: float | Tensor) -> float | Tensor:
    if isinstance(total, Tensor) and isinstance(addend, Tensor):  # a loaded state may lie on another device
        total = total.to(addend.device)
    return total + addend
