# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose weights are not, or not only, the model's parameters: what the term does with them.

A pull of the parameter alone is lost where the optimizer overwrites it from a tensor of its own. Found by what the
optimizer holds, not by its class:

- **copies** (master weights, in the state, on the parameter or in lists of the optimizer): tensors that equal the
  parameter, rounded to its dtype, after the optimizer's step. They get the pulled weights too, in their own dtype.
- **schedule-free** optimizers: the iterate is `z`; the parameter is y = (1−β)z + βx, x the average of the z. The term
  is the proximal operator on z, and y (and x) change as they would have if z had been there.
- **averages** (Lookahead's slow weights, averages kept by the optimizer): a part of what is pulled comes back, so
  they are refused, but for `"coupled"`, where the term is part of the gradient and passes through any rule. So are
  copies of the parameters in one flat tensor.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PeftLinearError
from ..tuners.proximal_lora.counts import GROUP_KEY, REMAINDERS_KEY
from .shards import is_sharded
from .updates import LOW_PRECISION, AdapterUpdate, FactorUpdate


_AVERAGES = re.compile(r"slow|lookahead|shadow|polyak|swa(?![a-z])|(?<![a-z])(ema|average|averaged|avg)(?![a-z])")
_GRADIENTS = re.compile(r"exp|grad|moment|sq")  # names of averages of gradients: exp_avg_slow
_LOOKS = 3  # copies of a factor are looked for in the first steps that move it
_DEPTH = 4
_SCHEDULE_FREE = {"weight_sum", "lr_max", "k"}  # keys of its parameter groups


class _Copied(NamedTuple):
    """The copies of one factor that one optimizer keeps."""

    looks: int = 0
    paths: tuple[tuple, ...] = ()  # from the optimizer, see `_roots`


_NEW = _Copied()
_known: weakref.WeakKeyDictionary[Any, dict[int, _Copied]] = weakref.WeakKeyDictionary()  # by id of the factor


def refuse_other_weights(optimizer: Any, update: AdapterUpdate) -> None:
    """Raises `PeftLinearError` if the optimizer averages weights and the term acts on weights after the step.

    To be called before and after a step: some make their copies in the first one.
    """
    factor = next((factor for module in update.active_modules for factor in module.factors()), None)
    if factor is None:
        return
    name = type(optimizer).__name__
    if factor.is_low and factor.group.keys() >= _SCHEDULE_FREE:
        raise PeftLinearError(
            f"{name} is schedule-free: it moves averages of the weights by small parts of them, which are rounded "
            f"away in {factor.parameter.dtype}, the dtype of adapter {update.adapter.name!r}, and the pull with "
            "them: keep the adapter in float32 (autocast_adapter_dtype=True), or use another optimizer"
        )
    if update.mode == "projection" and _is_schedule_free(factor.group):
        raise PeftLinearError(
            f"{name} is schedule-free: its step is one of another point than the factors, for which "
            "proximal_mode='projection' is not defined; use proximal_mode='decoupled' or 'coupled'"
        )
    if update.mode == "coupled":
        return
    classes = [base.__name__ for base in type(optimizer).__mro__ if "lookahead" in base.__name__.lower()]
    average = next(iter(classes), None) or next(_averages(optimizer, factor), None)
    if average is not None:
        raise PeftLinearError(
            f"{name} averages weights ({average}), so that a part of what proximal_mode={update.mode!r} does to the "
            f"factors of adapter {update.adapter.name!r} after a step would be undone: use proximal_mode='coupled', "
            "whose term is part of the gradient, or average outside of the optimizer "
            "(torch.optim.swa_utils.AveragedModel)"
        )


def note_weights(optimizer: Any, update: AdapterUpdate) -> None:
    """Before the optimizer's step: what is needed to tell copies from other tensors, in its first steps."""
    known = _knowledge(optimizer)
    for factor in update.factors() if update.mode != "coupled" else ():
        if known.get(id(factor.parameter), _NEW).looks < _LOOKS and not is_sharded(factor.parameter):
            factor.earlier = factor.parameter.detach().clone()


def find_places(optimizer: Any, update: AdapterUpdate) -> None:
    """After the optimizer's step: sets the `place` of every factor whose weights are elsewhere too."""
    if update.mode == "coupled":
        return
    known = _knowledge(optimizer)
    schedule_free = {id(group) for group in optimizer.param_groups if _is_schedule_free(group)}
    for factor in update.factors():
        copied = known.get(id(factor.parameter), _NEW)
        if not schedule_free and not copied.paths and copied.looks >= _LOOKS:
            continue  # the usual case
        if is_sharded(factor.parameter):
            continue
        state = _state(optimizer, factor)
        if id(factor.group) in schedule_free and isinstance(state.get("z"), Tensor):
            factor.place = _ScheduleFree(factor, state)
            factor.learning_rate = factor.group.get("scheduled_lr", factor.learning_rate)
            continue
        if copied.looks < _LOOKS:
            known[id(factor.parameter)] = copied = _look_for_copies(optimizer, factor, copied)
        copies = [copy for path in copied.paths if (copy := _follow(optimizer, factor, path)) is not None]
        if copies:
            factor.place = _Copies(factor, copies)


class _Copies:
    """The weights are the copy with most bits, or the factor."""

    def __init__(self, factor: FactorUpdate, copies: list[Tensor]) -> None:
        self._factor = factor
        self._copies = sorted(copies, key=lambda copy: -copy.element_size())
        self._first = self._copies[0]

    def read(self) -> Tensor:
        if self._first.element_size() > self._factor.local.element_size():
            return self._first.detach()
        value = self._factor.local
        return value.float() + self._factor.remainder if self._factor.is_low else value

    def write(self, value: Tensor) -> None:
        local = self._factor.local
        if value.data_ptr() != local.data_ptr():
            local.copy_(value)
        if self._factor.is_low and self._first.dtype in LOW_PRECISION:
            self._factor.remainder.copy_(value - local.float())
        for copy in self._copies:
            if copy.data_ptr() != value.data_ptr():
                copy.copy_(value if copy.dtype == value.dtype else local)


class _ScheduleFree:
    """The weights are z; the factor (y, or x where steps take closures), and x if it is kept, follow from it.

    z′ = prox(z) = z + Δ: the average x, in which the newest z has the weight c, has x + cΔ, and y = (1−β)z + βx has
    y + (1−β+βc)Δ.
    """

    def __init__(self, factor: FactorUpdate, state: Mapping[str, Any]) -> None:
        group = factor.group
        self._z: Tensor = state["z"]
        weight_sum = group["weight_sum"]
        weight = group["k"] ** group.get("r", 0) * group["lr_max"] ** group["weight_lr_power"]
        newest = weight / weight_sum if weight_sum else 0.0
        momentum = group["momentum"] if "momentum" in group else group["betas"][0]
        of_y = 1 - momentum + momentum * newest
        self._shares = [(factor.local, of_y if "train_mode" in group else newest)]
        for key, share in (("x", newest), ("y", of_y)):  # kept by the package's reference implementations
            if isinstance(state.get(key), Tensor):
                self._shares.append((state[key], share))

    def read(self) -> Tensor:
        return self._z.clone()

    def write(self, value: Tensor) -> None:
        change = value - self._z
        self._z.copy_(value)
        for tensor, share in self._shares:
            tensor.add_(share * change)


def _is_schedule_free(group: Mapping[str, Any]) -> bool:
    """Whether the optimizer itself is. In a wrapper of the kind the inner one steps z, and is pulled as any other."""
    return group.keys() >= _SCHEDULE_FREE | {"weight_lr_power"}


def _knowledge(optimizer: Any) -> dict[int, _Copied]:
    try:
        return _known.setdefault(optimizer, {})
    except TypeError:  # no weak references or no hash
        return {}


def _state(optimizer: Any, factor: FactorUpdate) -> Mapping[Any, Any]:
    states = getattr(optimizer, "state", None)
    state = states.get(factor.parameter) if isinstance(states, Mapping) else None
    return state if isinstance(state, Mapping) else {}


def _roots(optimizer: Any, factor: FactorUpdate) -> Iterator[tuple[str, Any]]:
    """Where tensors of an optimizer may be: those for the factor, and those in attributes of its own."""
    yield "state", _state(optimizer, factor)
    yield "parameter", vars(factor.parameter)
    own = {"params", GROUP_KEY, REMAINDERS_KEY}
    yield "group", {key: value for key, value in factor.group.items() if key not in own}
    own = {"state", "param_groups", "defaults"}
    yield "optimizer", {key: value for key, value in getattr(optimizer, "__dict__", {}).items() if key not in own}


def _tensors(value: Any, path: tuple, depth: int = _DEPTH) -> Iterator[tuple[tuple, Tensor]]:
    """Tensors in nested containers, with their paths."""
    if isinstance(value, Tensor):
        if type(value) in (Tensor, torch.nn.Parameter):
            yield path, value
    elif depth and isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, (*path, key), depth - 1)


def _averages(optimizer: Any, factor: FactorUpdate) -> Iterator[str]:
    """Attributes and state that are named as averages of weights are and hold a tensor near the factor."""
    parameter = factor.parameter.detach()
    for root, value in _roots(optimizer, factor):
        for key, item in value.items() if root != "group" else ():
            name = key.lower() if isinstance(key, str) else ""
            if _AVERAGES.search(name) and not _GRADIENTS.search(name):
                for _, tensor in _tensors(item, ()):
                    same = tensor.shape == parameter.shape and tensor.data_ptr() != parameter.data_ptr()
                    if same and (tensor.detach().to(parameter) - parameter).norm() < 0.5 * parameter.norm():
                        yield f"{root}.{key}"


def _look_for_copies(optimizer: Any, factor: FactorUpdate, earlier: _Copied) -> _Copied:
    parameter = factor.parameter.detach()
    if not parameter.any():
        return earlier
    found = []
    stepped = {id(each) for group in optimizer.param_groups for each in group["params"]} | {id(factor.parameter.grad)}
    for root, value in _roots(optimizer, factor):
        for path, tensor in _tensors(value, (root,)):
            if id(tensor) in stepped or tensor.shape != parameter.shape or not tensor.is_floating_point():
                continue
            if tensor.data_ptr() != parameter.data_ptr() and torch.equal(tensor.detach().to(parameter), parameter):
                found.append(path)
    moved = factor.earlier is not None and not torch.equal(parameter, factor.earlier)  # else what equals it may differ
    if moved:
        _refuse_flat_copies(optimizer, factor)
    return _Copied(earlier.looks + moved, tuple(path for path in found if not earlier.looks or path in earlier.paths))


def _refuse_flat_copies(optimizer: Any, factor: FactorUpdate) -> None:
    """Raises `PeftLinearError` if the optimizer keeps its parameters in one flat tensor too, in their order."""
    parameter = factor.parameter.detach().reshape(-1)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    offsets = set()
    for parameters in (*groups, [each for group in groups for each in group]):
        sizes = [each.numel() for each in parameters]
        offsets |= {sum(sizes[:i]) for i, each in enumerate(parameters) if each is factor.parameter}
    for root, value in _roots(optimizer, factor):
        for path, tensor in _tensors(value, (root,)) if root in ("group", "optimizer") else ():
            if tensor.ndim != 1 or not tensor.is_floating_point() or tensor.numel() <= parameter.numel():
                continue
            for offset in offsets:
                part = tensor.detach()[offset : offset + parameter.numel()]
                if part.data_ptr() != parameter.data_ptr() and torch.equal(part.to(parameter), parameter):
                    where = ".".join(map(str, path))
                    raise PeftLinearError(
                        f"{type(optimizer).__name__} keeps a flat copy of its parameters ({where}), from which "
                        f"it would overwrite what the term does to {factor.name}: use "
                        "proximal_mode='coupled', whose term is part of the gradient, or an optimizer without it"
                    )


def _follow(optimizer: Any, factor: FactorUpdate, path: tuple) -> Tensor | None:
    """The tensor at a path, if there still is one."""
    value: Any = dict(_roots(optimizer, factor))
    try:
        for key in path:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        return None
    return value if isinstance(value, Tensor) and value.shape == factor.parameter.shape else None
