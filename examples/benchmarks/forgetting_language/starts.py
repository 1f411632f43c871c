# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Arms that start LoRA in a subspace which the reference texts do not use much, by peft's CorDA initialisation.

The base weight loses what the factors start with. A strength below 1 is the factor of the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import CordaEigens, preprocess_corda
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from examples.benchmarks.language.arms import candidates
from peft_linear import ProximalLoraConfig

from .arms import Arm, Request, register
from .measures import predictions
from .penalties import lora_layers, matrices
from .plan import RANK


NULL_ENERGY = 0.01  # the part of the inputs' second moment that lies in the directions taken as unused


class ReducedBase(Arm):
    """Start factors that are taken out of the base weight. Strength: the factor of the learning rate."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.rate_factor = request.strength
        self.fields = {
            "proximal_lambda": 0.0,
            "init_lora_weights": "corda",
            "corda_config": CordaConfig(corda_method="kpm"),
        }

    @contextmanager
    def base(self, config: ProximalLoraConfig) -> Iterator[None]:
        modules = {one.name: self.request.model.get_submodule(one.name) for one in candidates(self.request.model)}
        kept = {name: module.weight.data.clone() for name, module in modules.items()}
        try:
            starts = self.request.once(type(self).__name__, lambda: self.starts(config, modules))
            for name, module in modules.items():
                module.eigens = CordaEigens(*(part.clone() for part in starts[name]))  # peft scales them in place
            yield
        finally:
            for name, module in modules.items():
                module.weight.data = kept[name]
                for left in ("eigens", "sample_count", "covariance_matrix", "corda_method", "rank"):
                    if hasattr(module, left):
                        delattr(module, left)

    def starts(self, config: ProximalLoraConfig, modules: dict[str, nn.Module]) -> dict[str, tuple[Tensor, ...]]:
        """{module: (S (r,), U (d_out, r), V (d_in, r))}, the start U·diag(S)·Vᵀ of the weight's change."""
        raise NotImplementedError

    def attach(self, wrapped: PeftModel) -> None:
        self.start = {
            name: tuple(factor.detach().clone() for factor in matrices(layer)[:2])
            for name, layer in lora_layers(self.request.model).items()
        }

    @contextmanager
    def scaled(self, model: nn.Module, factor: float) -> Iterator[None]:
        """The base weights take what the scaled adapter lacks of its start, and come back bitwise."""
        if factor == 1.0:
            yield
            return
        layers = lora_layers(self.request.model)
        kept = {name: layer.get_base_layer().weight.data for name, layer in layers.items()}
        for name, (a, b) in self.start.items():
            scaling = matrices(layers[name])[2]
            layers[name].get_base_layer().weight.data = kept[name] + (1 - factor) * scaling * b @ a
        try:
            with super().scaled(model, factor):
                yield
        finally:
            for name, weight in kept.items():
                layers[name].get_base_layer().weight.data = weight

    @torch.no_grad()
    def read_reference(self) -> None:
        for text in self.request.reference:
            predictions(self.request.model, [text])


@register("corda")
class Corda(ReducedBase):
    """CorDA (arXiv 2406.05223), knowledge-preserved mode, by peft's `preprocess_corda` on the reference texts."""

    def starts(self, config: ProximalLoraConfig, modules: dict[str, nn.Module]) -> dict[str, tuple[Tensor, ...]]:
        preprocess_corda(self.request.model, config, run_model=self.read_reference)
        return {name: (one.eigens.S_WC, one.eigens.U_WC, one.eigens.V_WC) for name, one in modules.items()}


@register("lora_null")
class LoraNull(ReducedBase):
    """LoRA-Null: the leading singular part of W·P, P the projection onto directions that the reference hardly uses.

    P keeps the eigenvectors of the inputs' second moment that hold its last hundredth. Implemented from the method's
    description; both factors are trained.
    """

    def starts(self, config: ProximalLoraConfig, modules: dict[str, nn.Module]) -> dict[str, tuple[Tensor, ...]]:
        moments = self._second_moments(modules)
        found = {}
        for name, module in modules.items():
            unused = unused_directions(moments.pop(name))
            u, s, v = torch.svd_lowrank(module.weight.data @ unused, q=RANK + 4, niter=4)
            found[name] = (s[:RANK], u[:, :RANK].contiguous(), (unused @ v[:, :RANK]).contiguous())
        return found

    def _second_moments(self, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = {}

        def watch(name: str, module: nn.Module) -> RemovableHandle:
            def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                rows = given[0].detach().flatten(0, -2)
                moments[name] = moments.get(name, 0) + rows.T @ rows

            return module.register_forward_pre_hook(hook)

        handles = [watch(name, module) for name, module in modules.items()]
        try:
            self.read_reference()
        finally:
            for handle in handles:
                handle.remove()
        return moments


def unused_directions(moment: Tensor) -> Tensor:
    """(d, k): eigenvectors of the least eigenvalues of a second moment (d, d) that hold NULL_ENERGY of its trace."""
    values, vectors = torch.linalg.eigh(moment.double())  # ascending
    share = values.clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    count = max(RANK, int((share <= NULL_ENERGY).sum()))
    return vectors[:, :count].to(moment.dtype)
