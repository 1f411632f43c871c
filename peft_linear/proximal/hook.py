# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Intercepts optimizer steps, which every training loop makes, so that the proximal term acts once in each.

Importing this module registers one pre and one post hook with `torch.optim.Optimizer`; every subclass is covered,
accelerate's wrapper too. Other optimizers are covered by `attach_proximal`, which replaces their `step`. Both call
`OptimizerStep.before` when the gradient is complete and `OptimizerStep.after` when the parameters have moved; what
happens there is in `step`. The hooks return at once while no ProximalLoRA adapter exists. Each thread has its own
steps: what other threads step, and steps that raised, are not taken for enclosing ones.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..errors import PeftLinearError
from ..tuners.proximal_lora.state import find_adapters, live_records
from .plan import given_sums, plan_adapters
from .step import OptimizerStep


# A step that the user compiles calls the hooks uncompiled; torch has this decorator on its own methods of optimizers.
_not_compiled: Callable = getattr(torch, "_disable_dynamo", lambda function: function)


class _OpenSteps(threading.local):
    """The steps that have begun in this thread and not ended, by optimizer (or handle), outermost first."""

    def __init__(self) -> None:
        self.steps: weakref.WeakKeyDictionary[Any, OptimizerStep] = weakref.WeakKeyDictionary()


_open = _OpenSteps()


class ProximalHandle:
    """What `attach_proximal` returns; `remove()` undoes it."""

    def __init__(self, undo: Callable[[], None] = lambda: None) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Restores the optimizer's own `step`; does nothing for optimizers that were not changed."""
        self._undo()
        self._undo = lambda: None


def attach_proximal(
    model: nn.Module,
    optimizer: Any,
    total: float | None = None,
    *,
    num_steps: int | None = None,
    scheduler: Any = None,
) -> ProximalHandle:
    """Makes the proximal term act in any optimizer, and says for which run `proximal_lambda="auto"` is.

    `torch.optim.Optimizer`s and their subclasses (also inside accelerate's wrapper) need no call for the term to act:
    for them this only checks that the optimizer steps factors of an adapter of `model`. Any other object is attached
    if it has

    - `param_groups`: a list of dicts with `"params"` (the model's own parameters) and `"lr"`, and
    - `step(...)`: reads `.grad` of these parameters and updates them. It may take a closure, as torch's does.

    Its `step` is replaced on the object, so that the term acts once per call. Attaching twice has no further effect.

    Args:
        model: the model, or a wrapper of it.
        optimizer: what steps the adapter's factors.
        total: Ση, the sum of the learning rates of the whole run (of the largest, where parameter groups differ).
        num_steps: in place of `total`: the optimizer steps of the whole run, those before a resume included.
        scheduler: with `num_steps`: the scheduler of the learning rates, torch's or accelerate's wrapper of it, that
            is stepped once an optimizer step. It is simulated, not changed. Default: the rates stay as they are.

    With a plan, λ of every adapter that has `proximal_lambda="auto"` is set, and a λ is warned of that removes next to
    nothing (λ·Ση < 0.05) or holds the adapter (> 20). Of several calls the last decides.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        PeftLinearError: `model` has no active ProximalLoRA adapter, or the optimizer does not have this form, or it
            holds none of the adapter's factors (but flattened or sharded copies, or another model's parameters); or
            the plan is not one of `total` > 0, `num_steps` >= 1, and `num_steps` with a `scheduler`.
    """
    adapters = find_adapters(model)
    optimizer = _unwrapped(optimizer)
    _check_interface(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(a) in held or id(b) in held for adapter in adapters for _, _, a, b in adapter.layers()):
        raise PeftLinearError(
            f"{type(optimizer).__name__} holds no factor of the adapters {[t.name for t in adapters]} of this model: "
            "it was made for another model, before the adapter, or holds flattened or sharded copies (not supported)"
        )
    sums = given_sums(optimizer, total, num_steps, scheduler)
    if sums is not None:
        plan_adapters(adapters, optimizer, sums)
    if _has_torch_hooks(optimizer) or hasattr(optimizer.step, "_peft_linear_original"):
        return ProximalHandle()
    original, key = optimizer.step, ProximalHandle()
    own = "step" in vars(optimizer)

    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            args, kwargs = _begin(key, optimizer, args, kwargs, closure_position=0)
            result = original(*args, **kwargs)
        except BaseException:
            _abandon(key)
            raise
        _end(key, optimizer)
        return result

    def undo() -> None:
        if own:
            optimizer.step = original
        else:
            del optimizer.step

    step._peft_linear_original = original  # type: ignore[attr-defined]
    optimizer.step = step
    return ProximalHandle(undo)


@_not_compiled
def _begin(key: Any, optimizer: Any, args: tuple, kwargs: dict, closure_position: int) -> tuple[tuple, dict]:
    """Opens a step. The gradient is complete only after the closure, if there is one, so the closure is wrapped."""
    for other in list(_open.steps.keys()):
        if other is key or not _is_running(other):  # it raised, or this is super().step() of a subclass: start again
            _abandon(other)
    step = OptimizerStep(enclosing=_open.steps.values())
    _open.steps[key] = step
    closure = kwargs.get("closure")
    if closure is None and len(args) > closure_position and callable(args[closure_position]):
        closure = args[closure_position]
    if closure is None:
        step.before(optimizer)
        return args, kwargs

    def closure_then_before() -> Any:
        loss = closure()
        step.before(optimizer)
        return loss

    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": closure_then_before}
    return (*args[:closure_position], closure_then_before, *args[closure_position + 1 :]), kwargs


def _abandon(key: Any) -> None:
    step = _open.steps.pop(key, None)
    if step is not None:
        step.abandon()


def _is_running(key: Any) -> bool:
    """Whether an open step is still on this thread's stack: torch calls no hook after a step that raises."""
    if isinstance(key, ProximalHandle):
        return True  # its step ends in any case
    frame: Any = sys._getframe(1)
    while frame is not None:
        where = (frame.f_code.co_filename, frame.f_code.co_name)
        if where == (_TORCH_STEP.co_filename, _TORCH_STEP.co_name) and frame.f_locals.get("self") is key:
            return True
        frame = frame.f_back
    return False


@_not_compiled
def _end(key: Any, optimizer: Any) -> None:
    step = _open.steps.pop(key, None)
    if step is None:
        return
    if not step.prepared:
        raise PeftLinearError(
            f"{type(optimizer).__name__}.step did not call the closure it was given, so the gradient that the "
            "proximal term needs was never computed; call step() without a closure"
        )
    step.after(optimizer)


_TORCH_STEP = Optimizer.profile_hook_step(lambda self: None).__code__  # the function around every step()


def _pre_hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    return _begin(optimizer, optimizer, args, kwargs, closure_position=1) if live_records else None


def _post_hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if _open.steps:
        _end(optimizer, optimizer)


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside wrappers that keep it as `.optimizer`, as accelerate's does."""
    while not _has_torch_hooks(optimizer) and hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
    return optimizer


def _has_torch_hooks(optimizer: Any) -> bool:
    return getattr(getattr(type(optimizer), "step", None), "hooked", False)


def _check_interface(optimizer: Any) -> None:
    groups = getattr(optimizer, "param_groups", None)
    proper = isinstance(groups, (list, tuple)) and all(isinstance(g, dict) and "params" in g for g in groups)
    if not proper or not callable(getattr(optimizer, "step", None)):
        raise PeftLinearError(
            f"cannot attach to {type(optimizer).__name__}: an optimizer needs a method step() and param_groups, a "
            "list of dicts with 'params' and 'lr'"
        )


register_optimizer_step_pre_hook(_pre_hook)
register_optimizer_step_post_hook(_post_hook)
