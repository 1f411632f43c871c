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
"""The proximal term in every training loop: hooks on `torch.optim`'s step, which all loops go through.

Importing this module registers one pre and one post hook with `torch.optim.Optimizer`. They do nothing while no
ProximalLoRA adapter is alive, and act on the factors of live adapters only: trainable, with a gradient, with λ > 0.
Per optimizer step the term acts once, with the learning rate of each factor's parameter group. The selective rule's
inner product is over the factors of an adapter that the stepping optimizer holds, in all of its groups: where several
optimizers share one adapter, each decides for its part.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..errors import PeftLinearError
from ..functional.proximal import delta_squared_distance, squared_distance
from ..tuners.proximal_lora.config import SPACES, variants_without_product
from ..tuners.proximal_lora.state import find_adapters, live_records
from ..tuners.proximal_lora.tracked import TrackedAdapter
from .proximal_stack import matrices
from .proximal_step import ProximalStep


_under_way: weakref.WeakKeyDictionary[Any, ProximalStep] = weakref.WeakKeyDictionary()


def proximal_distance(model: nn.Module, adapter_name: str | None = None, space: str | None = None) -> float:
    """‖θ−θ0‖, how far the adapter is from the pretrained model.

    Args:
        model: the model, or anything around it (PeftModel, DDP, a compiled model).
        adapter_name: one adapter; default: all active ones together.
        space: `"factors"` (root of Σ ‖A−A0‖² + ‖B−B0‖²) or `"delta"` (root of Σ ‖s·BA − s·B0A0‖_F², the distance of
            the weights); default: the one that the adapter is configured with.

    Returns:
        The distance, accumulated in float64. O(number of adapter parameters · r) at most.

    Raises:
        PeftLinearError: no such adapter or space.
    """
    if space is not None and space not in SPACES:
        raise PeftLinearError(f"space must be one of {', '.join(map(repr, SPACES))}, got {space!r}")
    squares = [_squared(adapter, space) for adapter in find_adapters(model, adapter_name)]
    return math.sqrt(sum(squares))


def proximal_firing_rate(model: nn.Module, adapter_name: str | None = None) -> float:
    """Fraction of the optimizer steps so far with λ > 0 at which the term acted (1 without the selective rule).

    Of one adapter, or of all active ones together; NaN before the first step, and with λ = 0. A run that is resumed
    with its optimizer's state goes on counting. With `proximal_mode="projection"`, which decides tensor by tensor, the
    fraction of the tensors is meant, averaged over the steps.

    Raises:
        PeftLinearError: no such adapter.
    """
    counts = [adapter.statistics.total() for adapter in find_adapters(model, adapter_name)]
    active = sum(float(each.active) for each in counts)
    return sum(float(each.fired) for each in counts) / active if active else float("nan")


def proximal_strength(model: nn.Module, adapter_name: str | None = None) -> dict[str, float]:
    """λ of the last optimizer step (before the first: of that one), of the named adapter or of every active one.

    By adapter name; `proximal_lambda` times what the schedule makes of it. What `proximal_lambda_pattern` gives to
    single modules is multiplied alike.

    Raises:
        PeftLinearError: no such adapter.
    """
    return {
        adapter.name: adapter.config.proximal_lambda
        * adapter.strengths.factor(max(adapter.statistics.position - 1, 0))
        for adapter in find_adapters(model, adapter_name)
    }


def proximal_summary(model: nn.Module) -> dict[str, float]:
    """The quantities worth logging about the active adapters, by the names `ProximalCallback` logs them under.

    Raises:
        PeftLinearError: there is no active ProximalLoRA adapter.
    """
    adapters = find_adapters(model)
    summary = {"proximal_distance": proximal_distance(model, space="factors")}
    if not any(variants_without_product(adapter.config) for adapter in adapters):
        summary["proximal_distance_delta"] = proximal_distance(model, space="delta")
    strengths = proximal_strength(model)
    if len(set(strengths.values())) == 1:
        summary["proximal_lambda"] = next(iter(strengths.values()))
    else:
        summary.update({f"proximal_lambda_{name}": strength for name, strength in strengths.items()})
    rate = proximal_firing_rate(model)
    if not math.isnan(rate):
        summary["proximal_firing_rate"] = rate
    return summary


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


def _squared(adapter: TrackedAdapter, space: str | None) -> float:
    space = space or adapter.config.proximal_space
    variants = variants_without_product(adapter.config)
    if space == "delta" and variants:
        raise PeftLinearError(
            f"adapter {adapter.name!r} has {', '.join(variants)}, with which the change of the weight is not s·B·A; "
            "use space='factors'"
        )
    factors = list(adapter.factors())
    with torch.no_grad():
        if space == "factors":
            values = [value for f in factors for value in (f.a, f.b)]
            anchors = [anchor for f in factors for anchor in (f.anchor.a, f.anchor.b)]
            return float(squared_distance(values, anchors))
        total = 0.0
        for f in factors:
            a, b = matrices(f.layer, f.a, f.b)
            a0 = b0 = None
            if f.anchor.a is not None and f.anchor.b is not None:
                a0, b0 = matrices(f.layer, f.anchor.a, f.anchor.b)
            scaling = float(f.layer.scaling[adapter.name])
            total += float(delta_squared_distance(a, b, a0, b0, scaling).sum())
        return total


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
