# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The proximal term in every training loop: hooks on `torch.optim`'s step, which all loops go through.

Importing this module registers one pre and one post hook with `torch.optim.Optimizer`. They do nothing while no
ProximalLoRA adapter is alive, and act on the factors of live adapters only: trainable, with a gradient, with λ > 0.
Per optimizer step the term acts once, with the learning rate of each factor's parameter group. The selective rule's
inner product is over the factors of an adapter that the stepping optimizer holds, in all of its groups: where several
optimizers share one adapter, each decides for its part.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..errors import PeftLinearError
from ..tuners.proximal_lora.state import find_adapters, live_records
from .report import proximal_distance, proximal_firing_rate, proximal_strength, proximal_summary
from .step import ProximalStep


__all__ = [
    "ProximalHandle",
    "attach_proximal",
    "proximal_distance",
    "proximal_firing_rate",
    "proximal_strength",
    "proximal_summary",
]

_under_way: weakref.WeakKeyDictionary[Any, ProximalStep] = weakref.WeakKeyDictionary()


class ProximalHandle:
    """What `attach_proximal` returns; `remove()` undoes it."""

    def __init__(self, undo: Callable[[], None] = lambda: None) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Gives the optimizer its own `step` back; without effect on optimizers that needed nothing."""
        self._undo()
        self._undo = lambda: None


def attach_proximal(model: nn.Module, optimizer: Any) -> ProximalHandle:
    """Makes the proximal term act in an optimizer that is not a `torch.optim.Optimizer`.

    `torch.optim.Optimizer`s and their subclasses (accelerate's wrapper around one included) need no call: for them
    this only checks that the optimizer steps factors of an adapter of `model`. Any other object is attached if it has

    - `param_groups`: a list of dicts with `"params"` (the model's own parameters) and `"lr"`, and
    - `step(...)`: reads `.grad` of these parameters and moves them. A closure may be passed, as to torch's.

    Its `step` is replaced on the object, so that the term acts once a call. Attaching twice is attaching once.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        PeftLinearError: `model` has no active ProximalLoRA adapter, or the optimizer is not of this form, or it holds
            none of the adapter's factors (flattened or sharded copies, another model's).
    """
    adapters = find_adapters(model)
    optimizer = _inmost(optimizer)
    _check_contract(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(a) in held or id(b) in held for adapter in adapters for _, _, a, b in adapter.layers()):
        raise PeftLinearError(
            f"{type(optimizer).__name__} holds no factor of the adapters {[t.name for t in adapters]} of this model: "
            "it was made for another model, before the adapter, or holds flattened or sharded copies (not supported)"
        )
    if _hooked(optimizer) or hasattr(optimizer.step, "_peft_linear_original"):
        return ProximalHandle()
    original, key = optimizer.step, ProximalHandle()
    own = "step" in vars(optimizer)

    def step(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _before_step(key, optimizer, args, kwargs, closure_position=0)
        result = original(*args, **kwargs)
        _after_step(key, optimizer)
        return result

    def undo() -> None:
        if own:
            optimizer.step = original
        else:
            del optimizer.step

    step._peft_linear_original = original  # type: ignore[attr-defined]
    optimizer.step = step
    return ProximalHandle(undo)


def _before_step(key: Any, optimizer: Any, args: tuple, kwargs: dict, closure_position: int) -> tuple[tuple, dict]:
    """Starts a step. With a closure the gradient is there only after it ran, so the closure is wrapped."""
    stale = _under_way.pop(key, None)
    if stale is not None:  # the last step raised, or this is super().step() of a subclass: start again
        stale.restore_gradients()
    step = ProximalStep(_under_way.values())
    _under_way[key] = step
    closure = kwargs.get("closure")
    if closure is None and len(args) > closure_position and callable(args[closure_position]):
        closure = args[closure_position]
    if closure is None:
        step.before(optimizer)
        return args, kwargs

    def closure_then_prepare() -> Any:
        loss = closure()
        step.before(optimizer)
        return loss

    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": closure_then_prepare}
    return (*args[:closure_position], closure_then_prepare, *args[closure_position + 1 :]), kwargs


def _after_step(key: Any, optimizer: Any) -> None:
    step = _under_way.pop(key, None)
    if step is None:
        return
    if not step.prepared:
        raise PeftLinearError(
            f"{type(optimizer).__name__}.step did not call the closure it was given, so the proximal term could not "
            "see the gradient; call step() without a closure"
        )
    step.after(optimizer)


def _pre_hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    return _before_step(optimizer, optimizer, args, kwargs, closure_position=1) if live_records else None


def _post_hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if _under_way:
        _after_step(optimizer, optimizer)


def _inmost(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper (and others that keep it as `.optimizer`)."""
    while not _hooked(optimizer) and hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
    return optimizer


def _hooked(optimizer: Any) -> bool:
    return getattr(getattr(type(optimizer), "step", None), "hooked", False)


def _check_contract(optimizer: Any) -> None:
    groups = getattr(optimizer, "param_groups", None)
    proper = isinstance(groups, (list, tuple)) and all(isinstance(g, dict) and "params" in g for g in groups)
    if not proper or not callable(getattr(optimizer, "step", None)):
        raise PeftLinearError(
            f"cannot attach to {type(optimizer).__name__}: an optimizer needs a method step() and param_groups, a "
            "list of dicts with 'params' and 'lr'"
        )


register_optimizer_step_pre_hook(_pre_hook)
register_optimizer_step_post_hook(_post_hook)
