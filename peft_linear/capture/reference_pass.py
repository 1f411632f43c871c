# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Gradients as training takes them, for the self-check: by autograd, of parameters and adapters, without our hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter_spaces import ParameterMatrix
from .batches import evaluate
from .conditions import gradient_errors
from .job import Job
from .layers import Conv1D, Layer, Linear
from .parameters import differentiable
from .targets import base_model


@dataclass
class _Source:
    """How the gradient of one parameter matrix is obtained: from a leaf of the graph."""

    leaf: Tensor
    take: Any  # gradient of the leaf → (p, l)
    adapter: Stand | None = None


class Stand(nn.Module):
    """What peft would put in the place of a module: the module, and beside it `h'(x)·R` times a zero matrix (p, l)."""

    def __init__(self, inner: nn.Module, matrix: ParameterMatrix, directions: Tensor, leaf: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self._matrix, self._directions, self._leaf = matrix, directions, leaf

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        x = x.to(self._leaf.dtype, copy=True)
        output = self.inner(*args, **kwargs)
        projection = self._matrix.projection
        features = self._matrix.inputs(x) if projection is None else x @ projection.to(x).T
        change = features @ self._directions.to(x) @ self._leaf
        missing = output.shape[-1] - change.shape[-1]
        return output + F.pad(change, (0, missing)).to(output.dtype)


def reference_gradients(
    job: Job,
    directions: Mapping[str, Tensor],  # by key of the matrix: R (k, p)
    signs: Tensor,  # (B, C) u
) -> tuple[dict[str, Tensor | None], Tensor]:
    """`Rᵀ Σ u_ia ∂f_a(x_i)/∂θ` (p, l) float64 of every matrix, and f (B, C), of the job's first batch.

    None where no training can be imitated: a layer of a kind that is quantised and not linear in its last dimension.
    Cost: one forward and one backward pass, with the gradients of every parameter that trains.
    """
    try:
        return _gradients(job, directions, signs, adapters_only=False)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        # An input that the model changes later on, in place: autograd refuses the gradient of the weight itself.
        return _gradients(job, directions, signs, adapters_only=True)


def _gradients(
    job: Job, directions: Mapping[str, Tensor], signs: Tensor, adapters_only: bool
) -> tuple[dict[str, Tensor | None], Tensor]:
    sources = _sources(job, directions, adapters_only)
    with differentiable(job.model, []), _in_place(job, sources):
        outputs = evaluate(job.model, job.batches[0].to(job.device), job.function, 0)
        scalar = (outputs * signs.to(outputs)).sum()
        leaves = {id(source.leaf): source.leaf for source in sources.values() if source is not None}
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if scalar.requires_grad and leaves:
            with gradient_errors():
                found = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
    gradients = dict(zip(leaves, found, strict=True))
    result: dict[str, Tensor | None] = {}
    for key, source in sources.items():
        if source is None:
            result[key] = None
            continue
        gradient = gradients[id(source.leaf)]
        gradient = torch.zeros_like(source.leaf) if gradient is None else gradient
        result[key] = source.take(gradient.detach().double()).cpu()
    return result, outputs.detach()


def _sources(job: Job, directions: Mapping[str, Tensor], adapters_only: bool) -> dict[str, _Source | None]:
    return {
        key: _source(layer, matrix, directions[key].to(job.device), adapters_only)
        for name, layer in job.layers.items()
        for key, matrix in zip(job.keys(name), job.matrices[name], strict=True)
    }


def _source(layer: Layer, matrix: ParameterMatrix, directions: Tensor, adapters_only: bool) -> _Source | None:
    if matrix.parameter is not None and matrix.of_gradient is not None and not adapters_only:
        of_gradient = matrix.of_gradient
        return _Source(matrix.parameter, lambda g: directions.to(g).T @ of_gradient(g))
    if type(layer) in (Linear, Conv1D):
        weight = getattr(layer.base, "weight", None)
        device = weight.device if isinstance(weight, Tensor) and not weight.is_meta else directions.device
        dtype = torch.float64 if getattr(weight, "dtype", None) == torch.float64 else torch.float32
        leaf = torch.zeros(directions.shape[1], matrix.channels, dtype=dtype, device=device, requires_grad=True)
        return _Source(leaf, lambda g: g, Stand(layer.module, matrix, directions, leaf))
    weight = getattr(layer.base, "weight", None)
    if matrix.projection is not None and isinstance(weight, nn.Parameter) and weight.is_floating_point():
        a = matrix.projection
        return _Source(weight, lambda g: directions.to(g).T @ a.to(g) @ layer.as_matrix(g).T)
    return None


@contextmanager
def _in_place(job: Job, sources: Mapping[str, _Source | None]) -> Iterator[None]:
    """Every `Stand` in the place of its module, as peft puts it: under the first of the module's names."""
    root = base_model(job.model)
    weights = [source.leaf for source in sources.values() if source is not None and source.adapter is None]
    frozen = [weight for weight in weights if not weight.requires_grad]
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        for name in job.layers:
            for key in job.keys(name):
                source = sources[key]
                if source is not None and source.adapter is not None:
                    parent, _, child = name.rpartition(".")
                    holder = root.get_submodule(parent)
                    replaced.append((holder, child, holder._modules[child]))  # type: ignore[arg-type]
                    holder._modules[child] = source.adapter
        yield
    finally:
        for holder, child, module in reversed(replaced):
            holder._modules[child] = module
        for weight in frozen:
            weight.requires_grad_(False)
