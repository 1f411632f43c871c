# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`KlBudget`: λ is steered while an adapter trains, so that the run ends at a chosen KL from the pretrained model.

Every few steps the KL is measured on held-out reference texts, and λ becomes the one that leads to the target by the
response of the run so far (`functional.kl_control`).

The gain and the response are kept in the optimizer's parameter groups, with the counts: a resumed run continues.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import nn

from ..errors import PeftLinearError
from ..functional.kl_control import PULLED, KlResponse
from ..tuners.proximal_lora.state import find_adapters
from .kl import checked_model, mean_kl, read_reference
from .monitor import proximal_strength
from .plan import planned_sums
from .updates import step_counters


LARGEST_GAIN = 1e6
MEASUREMENTS = 12  # in a run, by default
TOLERANCE = 0.2  # of the target, at the end


class Measurement(NamedTuple):
    """One measurement of a run."""

    step: int  # optimizer steps taken
    kl: float  # nats a prediction
    strength: float  # λ from the next step on


class KlBudget:
    """Holds a run to KL(pretrained ‖ tuned) = `target_kl` on held-out reference data, by steering λ.

    In a loop of your own; with a Trainer, `ProximalCallback(reference=..., target_kl=...)` does it.

        budget = KlBudget(model, optimizer, reference, 0.05, num_steps=1000, scheduler=scheduler)
        for batch in loader:
            ...
            optimizer.step()
            budget.step()

    It works in every space, decoupled and coupled, at every step (not selective), from any λ > 0;
    `proximal_lambda="auto"` leaves it the least to correct. A run that stays below the target without a pull is left
    alone.

    Args:
        model: A model with an active ProximalLoRA adapter.
        optimizer: What trains it, with its state loaded if the run is resumed.
        reference: Dict batches of tensors, or texts with `tokenizer`, that are in no training data and not among those
            that the reference of function space was collected from. In a run of several processes, each may have its
            own.
        target_kl: In nats a prediction, as `kl_to_base` measures.
        num_steps: The optimizer steps of the whole run, those before a resume included.
        scheduler: Of the learning rates, torch's or accelerate's wrapper; simulated, not changed.
        tokenizer: Of texts.
        every: Optimizer steps between measurements; default: 12 measurements in the run. Each takes two forward passes
            of the reference.

    Attributes:
        history: All `Measurement`s of this object.

    Raises:
        PeftLinearError: an invalid argument, no active ProximalLoRA adapter, none of it in the optimizer, λ = 0,
            `proximal_mode="projection"` or `proximal_selective=True`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        reference: Iterable[Mapping[str, Any]] | Iterable[str],
        target_kl: float,
        *,
        num_steps: int,
        scheduler: Any = None,
        tokenizer: Any = None,
        every: int | None = None,
    ) -> None:
        check_target(target_kl)
        for name, value in (("num_steps", num_steps), ("every", every)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise PeftLinearError(f"{name} must be a positive number of optimizer steps, got {value!r}")
        check_steerable(model)
        self.target = float(target_kl)
        self.num_steps = num_steps
        self.every = every or max(1, num_steps // MEASUREMENTS)
        self.history: list[Measurement] = []
        self._model = checked_model(model)
        self._batches = read_reference(self._model, reference, tokenizer)
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._shares = self._planned_shares(scheduler)
        self._counters()

    def step(self) -> Measurement | None:
        """To be called after every optimizer step; measures when it is due, and at the end of the run.

        Warns at the end if the KL is more than a fifth away from the target.
        """
        counters = self._counters()
        done = max(int(counter.read().steps) for _, counter in counters)
        if not done or (done % self.every and done != self.num_steps):
            return None
        if self.history and self.history[-1].step == done:  # a step that a GradScaler skipped
            return None
        kl = mean_kl(self._model, self._batches)
        share = self._shares.get(done, 1.0)
        for adapter, counter in counters:
            base = max(adapter.strengths.base(name) for name, *_ in adapter.layers())
            strength = base * counter.gain
            response = KlResponse(**counter.response) if counter.response else KlResponse(PULLED / strength)
            change = response.next_strength(kl, share, strength, self.target) / strength
            counter.steer(min(max(counter.gain * change, 1 / LARGEST_GAIN), LARGEST_GAIN), asdict(response))
            adapter.strengths.gain = counter.gain
        self.history.append(Measurement(done, kl, max(proximal_strength(self._model).values())))
        if done == self.num_steps:
            self._conclude()
        return self.history[-1]

    def finish(self) -> Measurement | None:
        """To be called after the last step of a run that stops before its `num_steps`; measures, and warns as `step`.

        None where the planned end was reached, or no step was taken.
        """
        counters = self._counters()
        done = max(int(counter.read().steps) for _, counter in counters)
        if not done or done >= self.num_steps:
            return None
        if not self.history or self.history[-1].step != done:
            strength = max(proximal_strength(self._model).values())
            self.history.append(Measurement(done, mean_kl(self._model, self._batches), strength))
        self._conclude()
        return self.history[-1]

    def _conclude(self) -> None:
        last = self.history[-1]
        if abs(last.kl - self.target) <= TOLERANCE * self.target:
            return
        if last.kl < self.target:
            reason = (
                "the run forgets less than it may; a higher learning rate, a higher rank or more steps would use it up"
            )
        else:
            reason = (
                "the pull came too late or was too weak; train for more steps or at a lower learning rate, or scale "
                f"the adapter by about {math.sqrt(self.target / last.kl):.2f}"
            )
        warnings.warn(f"the run ends at a KL of {last.kl:.3g} nats, the target was {self.target:.3g}: {reason}")

    def _counters(self) -> list:
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        held = [
            adapter
            for adapter in find_adapters(self._model)
            if any(id(p) in groups for _, _, *pair in adapter.layers() for p in pair)
        ]
        if not held:
            raise PeftLinearError(
                "the optimizer holds no factor of an active ProximalLoRA adapter of this model; make it after "
                "get_peft_model, or pass the optimizer that trains the adapter"
            )
        return list(step_counters(held, groups))

    def _planned_shares(self, scheduler: Any) -> dict[int, float]:
        """{steps at which there is a measurement: share of Ση that has passed}."""
        due = sorted({*range(self.every, self.num_steps + 1, self.every), self.num_steps})
        sums = {done: planned_sums(self._optimizer, scheduler, done).sums for done in due}
        totals = {done: max((each for each in found if each is not None), default=0.0) for done, found in sums.items()}
        whole = totals[self.num_steps]
        known = whole > 0 and min(totals.values()) > 0
        return {done: total / whole if known else done / self.num_steps for done, total in totals.items()}


def check_target(target_kl: Any) -> None:
    """Raises `PeftLinearError` unless it is a finite number > 0."""
    proper = isinstance(target_kl, numbers.Real) and not isinstance(target_kl, bool)
    if not proper or not 0 < target_kl < math.inf:
        raise PeftLinearError(f"target_kl must be a finite number of nats > 0, such as 0.05, got {target_kl!r}")


def check_steerable(model: nn.Module) -> None:
    """Raises `PeftLinearError` unless the active adapters have a λ that can be steered."""
    for adapter in find_adapters(model):
        if adapter.config.proximal_mode == "projection":
            raise PeftLinearError(
                f"adapter {adapter.name!r} has proximal_mode='projection', which holds a distance and cannot be "
                "steered to a KL; use proximal_mode='decoupled'"
            )
        if adapter.config.proximal_selective:
            raise PeftLinearError(
                f"adapter {adapter.name!r} has proximal_selective=True: its pull acts at steps that the rule picks, "
                "whatever λ is, and cannot be steered to a KL; set it to False"
            )
        if not adapter.strengths.active():
            raise PeftLinearError(
                f"adapter {adapter.name!r} has λ = 0, which no gain changes; set 'auto' or a number > 0"
            )
