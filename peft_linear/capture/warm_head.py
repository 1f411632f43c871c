# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`warmed_head`: a new task head is trained for some steps while kernels are computed, and then restored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftLinearError, TargetError
from .batches import Batch, check_outputs, evaluate, read_batches
from .conditions import unwrapped
from .outputs import OutputFunction, logits_of
from .parameters import differentiable, head_parameters
from .targets import base_model, resolve_always_trained


STEPS, RATE = 20, 3e-3


@contextmanager
def warmed_head(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    steps: int = STEPS,
    learning_rate: float = RATE,
    always_trained: Sequence[str] | None = None,
) -> Iterator[None]:
    """Inside the block the task head is one that was trained for some steps; after it everything is as before.

    A fresh head is random: it projects the gradients that reach the modules below it, which then say little about the
    task. Training first moves the head, then the modules below it. Adam takes `steps` steps on the mean loss of all
    examples, in the parameters that are always trained, without dropout and without random numbers:

        with warmed_head(model, batches):
            kernels = compute_ntk(model, batches)

    Args:
        model: With a task head, and a loss: classification, regression.
        batches: With labels. A generator would be used up: pass a list.
        steps: The more, the better the head fits these examples, and the smaller the error that is left for the
            other modules to reduce.
        learning_rate: Of Adam.
        always_trained: As for `compute_ntk`.

    Raises:
        PeftLinearError: steps < 1, a learning rate that is not above 0, no batches.
        TargetError: the model has no head.
        OutputError: labels are missing, or outputs are not finite.

    Cost: a forward pass of all examples, and `steps` passes through the head alone, where the head gives the logits
    (BERT, ViT, …); else `steps` forward passes, and backward passes through the head alone.
    """
    if steps < 1 or not (math.isfinite(learning_rate) and learning_rate > 0):
        raise PeftLinearError(
            f"warming the head needs steps ≥ 1 and a learning rate > 0, got steps={steps}, "
            f"learning_rate={learning_rate}"
        )
    model = unwrapped(model)
    head = resolve_always_trained(model, always_trained)
    parameters = head_parameters(head)
    if not parameters:
        raise TargetError(
            f"{type(base_model(model)).__name__} has no task head to warm: no module is always trained. "
            "Leave head_steps at 0, or name the head in `always_trained`"
        )
    read = read_batches(batches, model, True, "warming the head")
    before = [parameter.detach().clone() for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    function = OutputFunction.of(model, "loss")
    count = sum(batch.size for batch in read)
    try:
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        with differentiable(model, parameters):
            losses = [
                _losses(model, head, batch.to(parameters[0].device), function, number)
                for number, batch in enumerate(read)
            ]
            for _ in range(steps):
                optimizer.zero_grad()
                for of_batch in losses:
                    (of_batch().sum() / count).backward()
                optimizer.step()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in zip(parameters, before, gradients, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient


def _losses(
    model: nn.Module, head: Mapping[str, nn.Module], batch: Batch, function: OutputFunction, number: int
) -> Callable[[], Tensor]:
    """A batch's losses (B, 1) as a function of the head's parameters.

    Where the head is one module whose output is the logits, its inputs are kept, and nothing below it runs again.
    """
    calls: list[tuple[tuple, dict, Any]] = []
    if len(head) == 1:
        (module,) = head.values()

        def keep(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            calls.append((args, kwargs, output))

        hook = module.register_forward_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                logits = logits_of(model(**batch.inputs))
        finally:
            hook.remove()
        if len(calls) == 1:
            args, kwargs, output = calls[0]
            if isinstance(output, Tensor) and output.shape == logits.shape and torch.equal(output, logits):
                return lambda: check_outputs(function(module(*args, **kwargs), batch.labels), batch, number)
    return lambda: evaluate(model, batch, function, number)
