# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What selectors use of a network: the weights of the candidates, their inputs, the gradient of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...capture.batches import Batch, evaluate
from ...capture.layers import layer_kind, layer_of
from ...capture.ntk import compute_ntk
from ...capture.outputs import OutputFunction
from ...capture.parameters import differentiable
from ...capture.passes import no_gradient
from ...capture.recorder import recording
from ...capture.resources import Resources
from ...errors import TargetError


@dataclass(frozen=True)
class ModelStatistics:
    """Statistics of the candidates on the data, and the adapter that is considered."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    batches: Sequence[Batch]
    rank: int = 8
    lora_alpha: float = 16.0
    seed: int = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def gradients(self) -> dict[str, Tensor]:
        """Ḡ (d_out, d_in) float64 of each module: the gradient of the mean loss of all examples."""
        weights = {name: weight_parameter(name, module) for name, module in self.modules.items()}
        function = OutputFunction.of(self.model, "loss")
        totals = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
        count = sum(batch.size for batch in self.batches)
        device = next(iter(weights.values())).device
        with differentiable(self.model, list(weights.values())):
            for number, batch in enumerate(self.batches):
                loss = evaluate(self.model, batch.to(device), function, number).sum() / count
                if not loss.requires_grad:
                    raise no_gradient(self.modules, "loss")
                gradients = torch.autograd.grad(
                    loss, list(weights.values()), allow_unused=True, materialize_grads=True
                )
                for name, gradient in zip(weights, gradients, strict=True):
                    totals[name] += gradient.cpu().double()
        return {name: layer_of(name, self.modules[name]).as_matrix(total) for name, total in totals.items()}

    def squared_gradients(self, batch: Batch) -> dict[str, float]:
        """`Σ g²` of each module's weights over the examples of a batch, from one backward pass."""
        try:
            kernels = compute_ntk(
                self.model,
                [{**batch.inputs, "labels": batch.labels}],
                targets=list(self.modules),
                space="weight",
                outputs="loss",
                always_trained=(),
                resources=Resources(progress=False, precision=torch.float64, distributed=False),
            )
            return {name: float(kernels[name].trace()) for name in self.modules}
        except TargetError:  # the model mixes the examples of a batch
            single = [replace(self, batches=[_example(batch, i)]).gradients() for i in range(batch.size)]
            return {name: sum(float(one[name].square().sum()) for one in single) for name in self.modules}

    def inputs(self) -> dict[str, list[Tensor]]:
        """The inputs (positions, d_in) of each module, one tensor a call; padding counts too."""
        device = self.device
        found: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        layers = {name: layer_of(name, module) for name, module in self.modules.items()}
        with recording(self.model, layers) as recorder, torch.no_grad():
            for batch in self.batches:
                recorder.clear()
                self.model(**batch.to(device).inputs)
                for name, calls in recorder.calls.items():
                    found[name] += [layers[name].inputs(call.inputs, 1).flatten(0, 1) for call in calls]
        return found


def weight_parameter(name: str, module: nn.Module) -> nn.Parameter:
    """The weight of a linear module.

    Raises:
        TargetError: it has none that is a matrix of floating-point numbers, as quantised ones.
    """
    kind = layer_kind(module)
    weight = None if kind is None else kind(name, module).weight
    if weight is None:
        raise TargetError(
            f"{name} ({type(module).__name__}) has no weight matrix of floating-point numbers, which this selector "
            "needs; leave it out of `targets`, or load the model without quantisation"
        )
    return weight


def weight_matrix(module: nn.Module) -> Tensor:
    """W (d_out, d_in), float64 on the CPU."""
    return layer_of("", module).as_matrix(module.weight.detach().cpu().double())  # type: ignore[operator, union-attr]


def _example(batch: Batch, i: int) -> Batch:
    """The batch of its example i alone."""

    def one(value: Any) -> Any:
        return value[i : i + 1] if isinstance(value, Tensor) and value.ndim and len(value) == batch.size else value

    return Batch({key: one(value) for key, value in batch.inputs.items()}, one(batch.labels))
