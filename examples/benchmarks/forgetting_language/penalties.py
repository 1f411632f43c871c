# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Arms that add a quadratic penalty to the loss whose curvature is measured on the reference texts.

All curvatures are Fisher information a predicted token with labels sampled from the base model, so that the penalty at
strength 1 is each method's estimate of KL(base ‖ tuned) in nats a token. Both methods are implemented from their
definitions as summarised in their abstracts; the reference takes the place of the old task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from examples.benchmarks.language.batches import Encoded

from .arms import Arm, register
from .measures import predictions


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def matrices(layer: LoraLayer) -> tuple[Tensor, Tensor, float]:
    """A (r, d_in), B (d_out, r) and the scaling of the one adapter."""
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def sampled_losses(model: nn.Module, texts: list[Encoded], seed: int = 0) -> Iterator[tuple[Tensor, int]]:
    """For each text, −log p of labels that the model draws, summed over its predicted tokens, and their number."""
    draw = torch.Generator().manual_seed(seed)
    for text in texts:
        hidden, _ = predictions(model, [text])
        logits = model.lm_head(hidden).float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        yield functional.cross_entropy(logits, labels, reduction="sum"), len(labels)


def mean_squared_gradients(model: nn.Module, parameters: dict[Any, nn.Parameter], texts: list[Encoded]) -> dict:
    """{key: diagonal of the Fisher matrix a predicted token}: Σ over texts of squared gradients, by all tokens."""
    squares = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
    total = 0
    for loss, count in sampled_losses(model, texts):
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for key, gradient in zip(parameters, gradients, strict=True):
            squares[key].addcmul_(gradient, gradient)
        total += count
    return {key: square / total for key, square in squares.items()}


class WeightedSquare(torch.autograd.Function):
    """½ Σ_ij F_ij ΔW_ij² with ΔW = s·B·A; only small matrices are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scaling: float, fisher: Tensor) -> Tensor:
        change = scaling * b @ a  # (d_out, d_in)
        weighted = fisher * change
        ctx.save_for_backward(scaling * b.T @ weighted, scaling * weighted @ a.T)
        return 0.5 * (weighted * change).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        for_a, for_b = ctx.saved_tensors
        return gradient * for_a, gradient * for_b, None, None


class Penalty(Arm):
    """The loss plus `strength` times a penalty on the adapter."""

    def attach(self, wrapped: PeftModel) -> None:
        self.layers = lora_layers(self.request.model)

    def loss(self, model: nn.Module, batch: list[Encoded]) -> Tensor:
        return super().loss(model, batch) + self.request.strength * self.penalty()

    def penalty(self) -> Tensor:
        raise NotImplementedError


@register("ewc_lora")
class EwcLora(Penalty):
    """EWC-LoRA (arXiv 2602.17559): ½ Σ F_ij ΔW_ij², F the diagonal Fisher information of the weights themselves.

    Strength: the weight of the penalty. F has the size of the adapted weights.
    """

    def attach(self, wrapped: PeftModel) -> None:
        super().attach(wrapped)
        self.fisher = self.request.once("weight_fisher", lambda: self._fisher(wrapped))

    def penalty(self) -> Tensor:
        values = [WeightedSquare.apply(*matrices(layer), self.fisher[name]) for name, layer in self.layers.items()]
        return torch.stack(values).sum()

    def _fisher(self, wrapped: PeftModel) -> dict[str, Tensor]:
        weights = {name: layer.get_base_layer().weight for name, layer in self.layers.items()}
        with wrapped.disable_adapter():
            try:
                for weight in weights.values():
                    weight.requires_grad_(True)
                return mean_squared_gradients(self.request.model, weights, self.request.reference)
            finally:
                for weight in weights.values():
                    weight.requires_grad_(False)


@register("lalora_diagonal")
class LaLoraDiagonal(Penalty):
    """LaLoRA (arXiv 2512.17720) with a diagonal: ½ Σ F_i (θ_i − θ0_i)² over the entries of A and B.

    Strength: the weight of the penalty. At B = 0 the Fisher information of A is 0.
    """

    def attach(self, wrapped: PeftModel) -> None:
        super().attach(wrapped)
        model = self.request.model
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.fisher = mean_squared_gradients(model, self.parameters, self.request.reference)

    def penalty(self) -> Tensor:
        values = [
            (self.fisher[name] * (parameter - self.start[name]).square()).sum()
            for name, parameter in self.parameters.items()
        ]
        return 0.5 * torch.stack(values).sum()


@register("lalora_kfac")
class LaLoraKfac(Penalty):
    """LaLoRA (arXiv 2512.17720) with a Kronecker-factored block for each factor: ½ tr(Bᵀ S B · G).

    G = E[(Ah)(Ah)ᵀ] and S = E[δδᵀ] are the second moments of the inputs and output cotangents of B at the start; the
    block of A is 0 there. Strength: the weight of the penalty.
    """

    def attach(self, wrapped: PeftModel) -> None:
        super().attach(wrapped)
        self.factors = kronecker_factors(self.request.model, self.layers, self.request.reference)

    def penalty(self) -> Tensor:
        values = []
        for name, layer in self.layers.items():
            inputs, cotangents = self.factors[name]
            b = matrices(layer)[1]
            values.append(((cotangents @ b @ inputs) * b).sum())
        return 0.5 * torch.stack(values).sum()


def kronecker_factors(
    model: nn.Module, layers: dict[str, LoraLayer], texts: list[Encoded]
) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (G (r, r), S (d_out, d_out))} of the factor B, means over predicted tokens."""
    inputs: dict[str, Tensor | int] = dict.fromkeys(layers, 0)
    cotangents: dict[str, Tensor | int] = dict.fromkeys(layers, 0)

    def watch(name: str, module: nn.Module) -> Any:
        def forward(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            rows = given[0].detach().flatten(0, -2)
            inputs[name] = inputs[name] + rows.T @ rows

            def backward(gradient: Tensor) -> None:
                rows = gradient.flatten(0, -2)
                cotangents[name] = cotangents[name] + rows.T @ rows

            output.register_hook(backward)

        return module.register_forward_hook(forward)

    handles = [watch(name, next(iter(layer.lora_B.values()))) for name, layer in layers.items()]
    total = 0
    try:
        for loss, count in sampled_losses(model, texts):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, trained)
            total += count
    finally:
        for handle in handles:
            handle.remove()
    return {name: (inputs[name] / total, cotangents[name] / total) for name in layers}
