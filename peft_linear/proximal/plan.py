# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The sum of the learning rates of a run, before the run: what `proximal_lambda="auto"` is computed from.

The scheduler is simulated, and neither it nor the optimizer changes. The sum is of the whole run also where the run is
resumed from its middle: `LambdaLR`, which all schedules of transformers but two are, gives the rate of every step
directly; of other schedulers a copy is set back to its start, and compared with the original's present rates. Where
that fails, and for schedulers whose rates depend on the run (`ReduceLROnPlateau`), the rate of the start is taken for
all steps, with a warning where λ depends on it.
"""

from __future__ import annotations

import copy
import math
import numbers
import warnings
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from ..errors import PeftLinearError
from ..tuners.proximal_lora.counts import RATE_KEY
from ..tuners.proximal_lora.tracked import TrackedAdapter


LEAST, MOST = 0.05, 20.0  # of λ·Ση: outside, the pull removes next to nothing, or holds the adapter where it started


class PlannedSums(NamedTuple):
    """Ση of a run by parameter group; None where the group's rate is no number."""

    sums: tuple[float | None, ...]
    guess: str = ""  # why the sums are those of constant rates, where they may not be


def given_sums(optimizer: Any, total: float | None, num_steps: int | None, scheduler: Any) -> PlannedSums | None:
    """The plan that the arguments of `attach_proximal` describe; None: there is none.

    Raises:
        PeftLinearError: they are invalid, or do not go together.
    """
    if total is not None:
        if num_steps is not None or scheduler is not None:
            raise PeftLinearError("give the sum of the learning rates (total) or num_steps with a scheduler, not both")
        proper = isinstance(total, numbers.Real) and not isinstance(total, bool)
        if not proper or not 0 < total < math.inf:
            raise PeftLinearError(f"total, the sum of the learning rates, must be a finite number > 0, got {total!r}")
        return PlannedSums((float(total),) * len(optimizer.param_groups))
    if num_steps is None:
        if scheduler is not None:
            raise PeftLinearError("scheduler needs num_steps, the number of optimizer steps of the whole run")
        return None
    if isinstance(num_steps, bool) or not isinstance(num_steps, numbers.Integral) or num_steps <= 0:
        raise PeftLinearError(f"num_steps must be a positive number of optimizer steps, got {num_steps!r}")
    return planned_sums(optimizer, scheduler, int(num_steps))


def planned_sums(optimizer: Any, scheduler: Any, num_steps: int) -> PlannedSums:
    """Σ of the learning rates over the steps 0 to `num_steps` − 1 of a run, by parameter group.

    O(steps) evaluations of the scheduler, about a microsecond each.
    """
    groups = optimizer.param_groups
    if scheduler is None:
        return PlannedSums(tuple(_times(_start(group), num_steps) for group in groups))
    inner, stride = _unwrapped(scheduler)
    try:
        if isinstance(inner, LambdaLR):
            sums = _lambda_sums(inner, num_steps, stride)
        else:
            sums = _simulated_sums(inner, num_steps, stride)
        if len(sums) != len(groups) or not all(map(math.isfinite, sums)):
            raise ValueError("it has other parameter groups, or rates that are not finite")
        return PlannedSums(tuple(sums))
    except Exception as error:  # a scheduler is code of other people, and may raise anything
        why = f"{type(inner).__name__} cannot be simulated ({error})"
        return PlannedSums(tuple(_times(_start(group), num_steps) for group in groups), why)


def plan_adapters(adapters: Collection[TrackedAdapter], optimizer: Any, planned: PlannedSums) -> None:
    """Sets λ of the adapters that have "auto", and warns of a λ that is far too weak or too strong for this run.

    Of the parameter groups that hold an adapter's factors, the one with the largest sum counts.
    """
    for adapter in adapters:
        factors = {id(p) for _, _, *pair in adapter.layers() for p in pair if p.requires_grad}
        held = [any(id(p) in factors for p in group["params"]) for group in optimizer.param_groups]
        sums = [total for total, holds in zip(planned.sums, held, strict=True) if holds and total is not None]
        total = max(sums, default=0.0)
        if not total > 0:
            continue  # the first step says what is wrong
        automatic = adapter.strengths.automatic
        adapter.strengths.plan(total)
        if planned.guess and not automatic:
            continue  # the plan is not known, and λ does not depend on it
        if planned.guess:
            _keep_start(optimizer)
            warnings.warn(
                f"{planned.guess}: proximal_lambda='auto' of adapter {adapter.name!r} counts with constant learning "
                f"rates, that is λ = {adapter.strengths.common:.4g} for Ση = {total:.4g}. If they will fall, set "
                "proximal_lambda to a larger number"
            )
        _warn_of_strength(adapter, total)


def _warn_of_strength(adapter: TrackedAdapter, total: float) -> None:
    config = adapter.config
    if config.proximal_mode != "decoupled" or not adapter.strengths.active():
        return
    strength = max(adapter.strengths.base(name) for name, *_ in adapter.layers())
    exponent = strength * total
    partial = config.proximal_selective or adapter.strengths.scheduled  # less than λ·Ση acts, nobody knows how much
    if exponent >= LEAST and (partial or exponent <= MOST):
        return
    share = -math.expm1(-exponent)
    effect = (
        f"the pull removes {share:.1%} of what no gradient opposes, and is next to plain LoRA"
        if exponent < LEAST
        else "the pull holds the adapter at the pretrained model, and next to nothing is learned"
    )
    warnings.warn(
        f"adapter {adapter.name!r} has λ = {strength:.4g}, and the learning rates of this run add up to Ση = "
        f"{total:.4g}: λ·Ση = {exponent:.3g} is {'below' if exponent < LEAST else 'above'} "
        f"{LEAST if exponent < LEAST else MOST}, so {effect}. Set proximal_lambda='auto', or a λ of the order of "
        f"1/Ση = {1 / total:.3g}"
    )


def _unwrapped(scheduler: Any) -> tuple[Any, int]:
    """The scheduler inside accelerate's wrapper, and its steps for one step of the wrapper."""
    inner = getattr(scheduler, "scheduler", None)
    if inner is None or not hasattr(scheduler, "split_batches"):
        return scheduler, 1
    if scheduler.split_batches or not getattr(scheduler, "step_with_optimizer", True):
        return inner, 1
    from accelerate.state import AcceleratorState

    return inner, AcceleratorState().num_processes


def _lambda_sums(scheduler: LambdaLR, num_steps: int, stride: int) -> list[float]:
    sums: dict[int, float] = {}
    for function in scheduler.lr_lambdas:
        if id(function) not in sums:
            sums[id(function)] = math.fsum(float(function(step * stride)) for step in range(num_steps))
    return [
        float(rate) * sums[id(function)]
        for rate, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]


def _simulated_sums(scheduler: Any, num_steps: int, stride: int) -> list[float]:
    """Steps a copy of the scheduler, with a copy of what it changes: the settings of the parameter groups."""
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError("its rates depend on the run")
    done = _position(scheduler)
    stand_in = _StandIn(scheduler.optimizer)
    copied = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
    now = _rates(scheduler.optimizer.param_groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps of the scheduler without steps of the optimizer
        if done > 0:
            for group in stand_in.param_groups:
                _set_rate(group, group["initial_lr"])
            _restart(copied)
        steps, last = [_rates(stand_in.param_groups)], max((num_steps - 1) * stride, done)
        for _ in range(last):
            copied.step()
            steps.append(_rates(stand_in.param_groups))
    if not all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) for a, b in zip(steps[done], now, strict=True)):
        raise ValueError("a copy that is set back to its start does not come to the present learning rates")
    chosen = steps[: (num_steps - 1) * stride + 1 : stride]
    return [math.fsum(column) for column in zip(*chosen, strict=True)]


class _StandIn(Optimizer):
    """Parameter groups with the settings of another optimizer's, and no parameters of a model."""

    def __init__(self, other: Any) -> None:
        kept = (numbers.Number, tuple, Tensor, type(None))
        settings = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params" and isinstance(value, kept)}
            for group in other.param_groups
        ]
        super().__init__([{**each, "params": [torch.zeros(())]} for each in settings], {})


def _restart(scheduler: Any) -> None:
    """Sets a scheduler to the state in which its constructor leaves it."""
    parts = getattr(scheduler, "_schedulers", None)
    if parts is None:
        scheduler.last_epoch = -1
        scheduler._initial_step()
    elif isinstance(scheduler, SequentialLR):
        _undo(scheduler)
        _restart(parts[0])
        scheduler.last_epoch = 0
    else:  # ChainedScheduler
        for part in parts:
            _restart(part)


def _undo(scheduler: Any) -> None:
    scheduler.last_epoch = -1
    for part in getattr(scheduler, "_schedulers", ()):
        _undo(part)


def _position(scheduler: Any) -> int:
    parts = getattr(scheduler, "_schedulers", None)
    return int(scheduler.last_epoch) if parts is None or hasattr(scheduler, "last_epoch") else _position(parts[0])


def _rates(groups: Sequence[dict[str, Any]]) -> list[float]:
    return [float(group["lr"]) for group in groups]


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(float(rate))
    else:
        group["lr"] = rate


def _start(group: dict[str, Any]) -> float | None:
    """The rate that a group began with, as far as the group says it."""
    rate = group.get(RATE_KEY, group.get("initial_lr", group.get("lr")))
    try:
        return float(rate)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def _keep_start(optimizer: Any) -> None:
    """Notes the rate of each group, which is then in the optimizer's state: a resumed run finds it."""
    for group in optimizer.param_groups:
        rate = _start(group)
        if rate is not None:
            group.setdefault(RATE_KEY, rate)


def _times(rate: float | None, steps: int) -> float | None:
    return None if rate is None else rate * steps
