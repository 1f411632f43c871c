# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`jacobian_features`: the rows of the Jacobian of a model's adapters, from the same passes as kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import PeftLinearError
from ..functional.gram import jacobian_rows
from ..functional.outputs import Outputs
from ..kernels.jacobian_features import BASE, Columns, JacobianFeatures, laid_out
from .adapter_spaces import ParameterMatrix, formed_rows
from .batches import gather_labels, read_batches
from .engine.memory import format_memory
from .job import OTHER, Jacobians, Job
from .keywords import with_progress
from .layers import Layer
from .passes import capturing, capturing_other, not_finite
from .request import KernelRequest
from .resources import Resources
from .self_check import self_check
from .targets import Targets, base_model, require_plain_lora


AT_MOST_8GB = Resources(max_memory="8GB")


@with_progress
def jacobian_features(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: Targets = KernelRequest.targets,
    rank: int = KernelRequest.rank,
    lora_alpha: float = KernelRequest.lora_alpha,
    outputs: Outputs = KernelRequest.outputs,
    always_trained: Sequence[str] | None = KernelRequest.always_trained,
    seed: int = KernelRequest.seed,
    resources: Resources = AT_MOST_8GB,
) -> JacobianFeatures:
    """The Jacobian rows of LoRA adapters (and of the task head), from one forward and C backward passes a batch.

    `rows @ rowsᵀ` is the kernel that `compute_ntk(..., space="lora")` gives with the same arguments, which are
    explained there. Rows take n·P numbers (P = r·d_out a module at B = 0) where a kernel takes n² a module: for a few
    modules and a few hundred examples.

    Args:
        model: a plain model (fresh adapters, B = 0), or one that carries LoRA adapters; only of the latter do the
            columns have names in the model. Left as it was found.
        targets: of a model that carries adapters, "all-linear" means those modules that have one.
        resources: an error is raised where the rows would take more than its `max_memory`. They are kept in memory,
            in their own precision, by each process for itself: there is no `folder` and no `precision` to set.

    Raises:
        TargetError, OutputError: as `compute_ntk`.
        PeftLinearError: no batches, or more memory needed than `max_memory`, or resources that rows do not have.
    """
    if resources.folder is not None or resources.precision is not None:
        raise PeftLinearError(
            "rows are kept in memory in their own precision; leave `folder` and `precision` out of the resources, or "
            "call compute_ntk, whose kernels take both"
        )
    request = KernelRequest(
        targets=_adapted(model) if targets == "all-linear" else targets,
        space="lora",
        rank=rank,
        lora_alpha=lora_alpha,
        outputs=outputs,
        always_trained=always_trained,
        seed=seed,
    )
    job = request.prepare(model).job
    output = job.function.output
    read = read_batches(batches, model, output.needs_labels, f"outputs={output.name!r}")
    job = replace(job, batches=read)
    columns = _columns(job)
    width = columns[-1].stop if columns else 0
    examples = sum(batch.size for batch in read)
    rows: Tensor | None = None
    values: list[Tensor] = []
    first = 0
    with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
        self_check(job, resources.check)
        for jacobians, batch_outputs in _passes(job, resources.progress):
            if rows is None:
                rows = _allocate(resources.memory_limit, examples * batch_outputs.shape[1], width, jacobians)
            _write_rows(rows[first : first + batch_outputs.numel()], job, jacobians)
            first += batch_outputs.numel()
            values.append(batch_outputs.cpu().double())
    assert rows is not None
    if not bool(rows.isfinite().all()):
        raise not_finite("an adapter or the head", next(job.model.parameters()).dtype)
    outputs0 = torch.cat(values)
    parameters = dict(job.model.named_parameters())
    start = [laid_out(parameters[c.parameter], c) if c.parameter else torch.zeros(c.stop - c.first) for c in columns]
    return JacobianFeatures(
        rows=rows,
        start=torch.cat([piece.to(rows) for piece in start]),
        outputs=outputs0,
        labels=gather_labels(read, outputs0, job.function),
        names=tuple(job.candidates),
        columns=tuple(columns),
    )


def _adapted(model: nn.Module) -> Targets:
    """The modules that carry a LoRA adapter; "all-linear" where none does."""
    layers = [
        name
        for name, module in base_model(model).named_modules()
        if isinstance(module, LoraLayer) and require_plain_lora(name, module) is not None
    ]
    return layers or "all-linear"


def _passes(job: Job, progress: bool) -> Iterator[tuple[Jacobians, Tensor]]:
    """Jacobians in all matrices, those of the other head parameters among them, and outputs, batch by batch."""
    others = []
    if job.head_other:
        with capturing_other(job) as capture:
            others = [capture(number)[0] for number in range(len(job.batches))]
    with capturing(job) as capture:
        for number in tqdm(range(len(job.batches)), desc="features", unit="batch", disable=not progress):
            jacobians, outputs = capture(number)
            yield jacobians | (others[number] if others else {}), outputs


def _write_rows(target: Tensor, job: Job, jacobians: Jacobians) -> None:
    """The rows of a batch into `target` (B·C, P)."""
    first = 0
    for key, matrix in _matrices(job):
        jacobian, width = jacobians.get(key), matrix.features * matrix.channels
        columns = target[:, first : first + width]
        if jacobian is None:
            columns.zero_()
        else:
            rows = jacobian if isinstance(jacobian, Tensor) else jacobian_rows(*jacobian)
            columns.copy_(rows.reshape(len(target), width))
        first += width


def _matrices(job: Job) -> Iterator[tuple[str, ParameterMatrix]]:
    for name in job.layers:
        yield from zip(job.keys(name), job.matrices[name], strict=True)
    if job.head_other:
        yield OTHER, formed_rows(job.head_other)


def _columns(job: Job) -> list[Columns]:
    """In the order of `_matrices`; the other head parameters one by one."""
    names = {id(parameter): name for name, parameter in job.model.named_parameters()}
    columns: list[Columns] = []

    def add(module: str, parameter: Tensor | None, shape: tuple[int, ...], transposed: bool) -> None:
        first = columns[-1].stop if columns else 0
        own = None if parameter is None or parameter.shape == shape[::-1] else tuple(parameter.shape)
        columns.append(
            Columns(module, names.get(id(parameter)), first, shape, transposed, own if transposed else None)
        )

    for name, layer in job.candidates.items():
        factors: Sequence[Tensor | None] = _lora_factors(layer) or [None]
        for factor, matrix in zip(factors, job.matrices[name], strict=False):  # A has none at B = 0
            add(name, factor, (matrix.features, matrix.channels), transposed=True)
    for name, layer in job.head_layers.items():
        weight, *bias = job.matrices[name]
        add(BASE, layer.weight, (weight.features, weight.channels), transposed=layer.output_first)
        for matrix in bias:
            add(BASE, layer.bias, (matrix.channels,), transposed=False)
    for parameter in job.head_other:
        add(BASE, parameter, tuple(parameter.shape), transposed=False)
    return columns


def _lora_factors(layer: Layer) -> list[Tensor] | None:
    """B and A of a layer that carries an adapter."""
    module: Any = layer.module
    adapter = require_plain_lora(layer.name, module) if isinstance(module, LoraLayer) else None
    return None if adapter is None else [module.lora_B[adapter].weight, module.lora_A[adapter].weight]


def _allocate(limit: int | None, rows: int, width: int, jacobians: Jacobians) -> Tensor:
    known = [one if isinstance(one, Tensor) else one[0] for one in jacobians.values() if one is not None]
    dtype = torch.float64 if any(one.dtype == torch.float64 for one in known) else torch.float32
    size = rows * width * dtype.itemsize
    if limit is not None and size > limit:
        raise PeftLinearError(
            f"{rows} rows of {width:,} numbers take {format_memory(size)}, more than max_memory="
            f"{format_memory(limit)}; take fewer examples, modules or ranks, or raise max_memory"
        )
    return torch.empty(rows, width, dtype=dtype)
