# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""All passes over a model: from each batch to its Jacobian in every parameter matrix; checks before the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import OutputError, TargetError
from .accumulate import JacobianAccumulator, Sizes
from .batches import evaluate
from .job import OTHER, Jacobians, Job
from .parameters import differentiable, parameter_rows
from .recorder import Recorder, recording
from .shared_inputs import SharedInputs


@contextmanager
def capturing(
    job: Job, sizes: Sizes | None = None, first: int = 0
) -> Iterator[Callable[[int], tuple[Jacobians, Tensor]]]:
    """Hooks the layers; yields a function that returns the Jacobians (by key) and the outputs of a batch.

    `sizes` takes what the self-check needs of each matrix; `first` is the number of the first batch, for messages.
    """
    layers = job.layers
    shared = SharedInputs(layers, job.matrices)
    accumulators = {
        name: [
            JacobianAccumulator(layer, number, matrix, shared, sizes)
            for number, matrix in enumerate(job.matrices[name])
        ]
        for name, layer in layers.items()
    }
    now = {"output": 0, "size": 0, "outputs": 0}
    checked = False

    def take(name: str, number: int, cotangent: Tensor) -> None:
        for accumulator in accumulators[name]:
            accumulator.add(number, cotangent, now["output"], now["size"], now["outputs"])

    def capture(number: int) -> tuple[Jacobians, Tensor]:
        nonlocal checked
        recorder.clear()
        outputs = evaluate(job.model, job.batches[number].to(job.device), job.function, first + number)
        if recorder.copy_changed_inputs():
            recorder.clear()
            outputs = evaluate(job.model, job.batches[number].to(job.device), job.function, first + number)
        now["size"], now["outputs"] = outputs.shape
        if not checked:
            _check_graph(recorder, job, outputs)
            checked = True
        shared.start(recorder.calls)
        for output in range(outputs.shape[1]):
            now["output"] = output
            recorder.backward(outputs[:, output].sum(), output + 1 < outputs.shape[1], take)
        jacobians = {
            key: accumulator.end_batch(outputs.shape[1])
            for name, of_layer in accumulators.items()
            for key, accumulator in zip(job.keys(name), of_layer, strict=True)
        }
        shared.clear()
        recorder.clear()
        return jacobians, outputs.detach()

    with recording(job.model, layers) as recorder:
        yield capture


@contextmanager
def capturing_other(job: Job) -> Iterator[Callable[[int], tuple[Jacobians, Tensor]]]:
    """The same for the parameters of the head that belong to no layer of a known kind."""

    def capture(number: int) -> tuple[Jacobians, Tensor]:
        outputs = evaluate(job.model, job.batches[number].to(job.device), job.function, number)
        return {OTHER: parameter_rows(job.head_other, outputs)}, outputs.detach()

    with differentiable(job.model, job.head_other):
        yield capture


def no_gradient(candidates: Iterable[str], kind: str) -> TargetError:
    return TargetError(
        f"no target takes a gradient from outputs={kind!r}: {', '.join(candidates)}; "
        "are they part of the forward pass that makes these outputs, outside of torch.no_grad, detach and "
        "torch.utils.checkpoint with use_reentrant=True?"
    )


def not_finite(name: str, dtype: torch.dtype) -> OutputError:
    """The error for gradients that overflow, of a module."""
    return OutputError(
        f"the gradients of {name} are NaN or inf although the outputs are finite: they overflow in {dtype}; load the "
        "model in bfloat16 or float32"
    )


def _check_graph(recorder: Recorder, job: Job, outputs: Tensor) -> None:
    """Before the first backward pass: are candidates part of the graph?"""
    if not outputs.requires_grad or not any(recorder.calls[name] for name in job.candidates):
        raise no_gradient(job.candidates, job.function.output.name)
