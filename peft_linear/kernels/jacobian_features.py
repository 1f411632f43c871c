# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`JacobianFeatures`: the rows of the Jacobian themselves, for what their Gram matrix does not hold (Adam's path)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftLinearError, TargetError
from ..functional.feature_training import train_on_features
from ..functional.simulation import LearningRate, TrainingCurve


BASE = "base"  # the module of columns that are always trained


@dataclass(frozen=True)
class Columns:
    """Which columns of the features are one parameter, and how it lies in them: flattened, or its transpose is."""

    module: str  # "base" for what is always trained
    parameter: str | None  # its full name in the model; None for the B of an adapter that the model does not carry
    first: int
    shape: tuple[int, ...]  # as it lies in the columns
    transposed: bool
    parameter_shape: tuple[int, ...] | None = None  # where it has more than two dimensions

    @property
    def stop(self) -> int:
        return self.first + torch.Size(self.shape).numel()


@dataclass(frozen=True, eq=False)
class JacobianFeatures:
    """Jacobian rows `∂f/∂θ` at θ0 of the parameters that move f to first order; `rows @ rowsᵀ` is the NTK.

    LoRA's A is among them only where B ≠ 0: at B = 0 its columns would all be zero. Columns lie module after module,
    the always-trained ones (the task head) last, so that a proximal term that leaves those alone pulls the first
    `pulled`. Made by `peft_linear.capture.features.jacobian_features`.
    """

    rows: Tensor  # (n, P) float32 or float64, n = N·C, example-major, on the CPU where they are made
    start: Tensor  # (P,) θ0
    outputs: Tensor  # (N, C) float64, f at θ0
    labels: Tensor | None  # (N,)
    names: tuple[str, ...]  # modules, in model order
    columns: tuple[Columns, ...]

    @property
    def pulled(self) -> int:
        """Number of columns that belong to adapters."""
        return sum(c.stop - c.first for c in self.columns if c.module != BASE)

    @property
    def num_parameters(self) -> Mapping[str, int]:
        """Columns of each module, and of "base" where there is one."""
        counts: dict[str, int] = {}
        for c in self.columns:
            counts[c.module] = counts.get(c.module, 0) + c.stop - c.first
        return MappingProxyType(counts)

    def subset(self, names: Iterable[str]) -> JacobianFeatures:
        """The features of some modules, and of what is always trained.

        Raises:
            TargetError: a name has no features.
        """
        names = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise TargetError(f"no features of {', '.join(map(repr, unknown))}; there are: {', '.join(self.names)}")
        kept = [c for c in self.columns if c.module == BASE or c.module in names]
        index = torch.cat([torch.arange(c.first, c.stop) for c in kept]) if kept else torch.empty(0, dtype=torch.long)
        moved, first = [], 0
        for c in kept:
            moved.append(replace(c, first=first))
            first = moved[-1].stop
        chosen = tuple(name for name in self.names if name in names)
        return replace(self, rows=self.rows[:, index], start=self.start[index], names=chosen, columns=tuple(moved))

    def select_examples(self, indices: Tensor | Sequence[int]) -> JacobianFeatures:
        """The same of some examples, in that order."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        rows = self.rows.view(*self.outputs.shape, -1)[indices].flatten(0, 1)
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, rows=rows, outputs=self.outputs[indices], labels=labels)

    def to(self, device: torch.device | str) -> JacobianFeatures:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("rows", "start", "outputs")}
        return replace(self, **moved, labels=None if self.labels is None else self.labels.to(device))

    def gram(self, other: JacobianFeatures | None = None) -> Tensor:
        """K (n, n) in float64, or K(x, X) (m, n) with the rows of `self` against those of `other`.

        Raises:
            TargetError: the features are of different parameters.
        """
        right = self if other is None else other
        if right.columns != self.columns:
            raise TargetError("the features are of different parameters; take the same subset of both")
        return self.rows.double() @ right.rows.double().T

    def train(
        self,
        *,
        learning_rate: LearningRate,
        steps: int,
        held_out: JacobianFeatures | None = None,
        **settings: Any,
    ) -> TrainingCurve:
        """`train_on_features` of these features, labels and θ0; λ pulls the adapters only. `settings` are its own.

        Raises:
            PeftLinearError: there are no labels.
            TargetError: the held-out features are of other parameters.
            KernelError: as `train_on_features`.
        """
        for features in (self, held_out):
            if features is not None and features.labels is None:
                raise PeftLinearError("the features have no labels to train on; pass batches with labels")
        if held_out is not None and held_out.columns != self.columns:
            raise TargetError("the features are of different parameters; take the same subset of both")
        settings.setdefault("pulled", self.pulled)
        settings.setdefault("start", self.start)
        assert self.labels is not None
        return train_on_features(
            self.rows,
            self.outputs,
            self.labels,
            learning_rate=learning_rate,
            steps=steps,
            held_out=None if held_out is None else (held_out.rows, held_out.outputs, held_out.labels),  # type: ignore
            **settings,
        )

    def flatten(self, parameters: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """θ of a model that carries the adapters, or of a mapping of its names, as these columns have it: (P,).

        Raises:
            TargetError: it lacks a parameter, or the features are those of adapters that no model carries yet.
        """
        values = dict(parameters.named_parameters()) if isinstance(parameters, nn.Module) else parameters
        return torch.cat([laid_out(_lookup(values, c), c) for c in self.columns]).to(self.start)

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """The parameters {name in the model: value} at θ (P,), as a state dict or `load_parameters_from` takes them.

        Raises:
            TargetError: the features are those of adapters that no model carries yet.
        """
        found = {}
        for c in self.columns:
            value = theta[c.first : c.stop].view(c.shape)
            value = (value.T if c.transposed else value).contiguous()
            found[_name_of(c)] = value.view(c.parameter_shape or value.shape)
        return found

    def __repr__(self) -> str:
        n, width = self.rows.shape
        size = self.rows.numel() * self.rows.element_size() / 1e6
        shape = f"{len(self.outputs)} examples, {n} rows of {width:,} numbers, {size:,.1f} MB"
        return f"JacobianFeatures({len(self.names)} modules, {shape})"


def laid_out(parameter: Tensor, columns: Columns) -> Tensor:
    """A parameter as its columns have it, flattened, on the CPU.

    Raises:
        TargetError: its shape is another one.
    """
    value = parameter.detach().cpu()
    value = value.flatten(1).T if columns.transposed and value.ndim > 1 else value
    if tuple(value.shape) != columns.shape:
        raise TargetError(
            f"{columns.parameter!r} has shape {tuple(parameter.shape)}, which does not belong to the features"
        )
    return value.reshape(-1)


def _lookup(values: Mapping[str, Tensor], columns: Columns) -> Tensor:
    name = _name_of(columns)
    if name not in values:
        raise TargetError(f"no parameter {name!r} there; pass the model that the features were taken of")
    return values[name]


def _name_of(columns: Columns) -> str:
    if columns.parameter is None:
        raise TargetError(
            f"{columns.module} carried no adapter when its features were taken, so its B has no name in the model; "
            "take the features of the PeftModel"
        )
    return columns.parameter
