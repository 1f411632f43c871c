# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""All passes over a model: from each batch to the parts of every term, and the checks that come before the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import TargetError
from .batches import evaluate
from .engine.accumulate import TermAccumulator
from .job import OTHER, Job, Parts
from .parameters import differentiable, parameter_rows
from .recorder import Recorder, by_example, recording
from .shared_inputs import SharedInputs
from .targets import base_model


@contextmanager
def capturing(job: Job) -> Iterator[Callable[[int], tuple[Parts, Tensor]]]:
    """Hooks the modules; yields the function that takes a batch's number to its parts by key, and its outputs."""
    hooked = {**job.candidates, **job.head_linear}
    shared = SharedInputs(job.terms)
    accumulators = {
        name: [TermAccumulator(name, number, term, shared) for number, term in enumerate(job.terms[name])]
        for name in hooked
    }
    now = {"output": 0, "size": 0, "outputs": 0}
    checked = False

    def take(name: str, number: int, cotangent: Tensor) -> None:
        for accumulator in accumulators[name]:
            accumulator.add(number, cotangent, now["output"], now["size"], now["outputs"])

    def capture(number: int) -> tuple[Parts, Tensor]:
        nonlocal checked
        recorder.clear()
        outputs = evaluate(job.model, job.batches[number].to(job.device), job.function, number)
        if recorder.copy_changed_inputs():
            recorder.clear()
            outputs = evaluate(job.model, job.batches[number].to(job.device), job.function, number)
        now["size"], now["outputs"] = outputs.shape
        if not checked:
            _check_batch(recorder, job, outputs)
            checked = True
        shared.start(recorder.calls)
        for output in range(outputs.shape[1]):
            now["output"] = output
            recorder.backward(outputs[:, output].sum(), output + 1 < outputs.shape[1], take)
        parts = {
            key: accumulator.end_batch(outputs.shape[1])
            for name, of_module in accumulators.items()
            for key, accumulator in zip(job.keys(name), of_module, strict=True)
        }
        shared.clear()
        recorder.clear()
        return parts, outputs.detach()

    with recording(job.model, hooked) as recorder:
        yield capture


@contextmanager
def capturing_other(job: Job) -> Iterator[Callable[[int], tuple[Parts, Tensor]]]:
    """The same for the parameters of the head that belong to no linear map."""

    def capture(number: int) -> tuple[Parts, Tensor]:
        outputs = evaluate(job.model, job.batches[number].to(job.device), job.function, number)
        return {OTHER: parameter_rows(job.head_other, outputs)}, outputs.detach()

    with differentiable(job.model, job.head_other):
        yield capture


def no_gradient(candidates: Iterable[str], kind: str) -> TargetError:
    return TargetError(
        f"no target takes a gradient from outputs={kind!r}: {', '.join(candidates)}; "
        "are they part of the forward pass that makes these outputs?"
    )


def _check_batch(recorder: Recorder, job: Job, outputs: Tensor) -> None:
    """Before the first backward pass: are candidates part of the graph, and are the examples of a batch independent?

    Transformers work on (batch, …, width) everywhere; where a model does, no gradient of example 0 can reach the rows
    of another example. Other layouts and other models are tried: one more backward pass, of the first example alone.
    """
    size = outputs.shape[0]
    calls = [(name, call) for name, calls in recorder.calls.items() for call in calls]
    if not outputs.requires_grad or not any(recorder.calls[name] for name in job.candidates):
        raise no_gradient(job.candidates, job.function.output.name)
    plain = isinstance(base_model(job.model), PreTrainedModel) and all(
        call.inputs.shape[0] == size and size not in call.inputs.shape[1:-1] for _, call in calls
    )
    if size == 1 or plain:
        return
    mixed = {}

    def look(name: str, number: int, cotangent: Tensor) -> None:
        by_example(recorder.calls[name][number].inputs, size, name)
        if bool(by_example(cotangent, size, name)[1:].any()):
            mixed[name] = tuple(cotangent.shape)

    recorder.backward(outputs[0].sum(), keep_graph=True, on_cotangent=look)
    if mixed:
        name, shape = next(iter(mixed.items()))
        raise TargetError(
            f"{name} mixes the examples of a batch (its output has shape {shape}), so their gradients cannot be told "
            "apart; pass batches of one example"
        )
