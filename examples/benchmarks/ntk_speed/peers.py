# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Other ways to the same kernel, written as their users would write them; each returns the sum over all targets."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_linear.capture.adapter_spaces import initial_lora_a


@dataclass
class Case:
    """A model, one batch, and the adapter under consideration."""

    model: nn.Module
    batch: dict[str, Tensor]
    space: str
    names: tuple[str, ...]
    rank: int
    lora_alpha: float
    best_chunk: int | None = None
    _peft: list[PeftModel] = field(default_factory=list)

    def peft_model(self) -> PeftModel:
        """The model with an adapter on every target, whose A are those that `compute_ntk` considers."""
        if not self._peft:
            config = LoraConfig(r=self.rank, lora_alpha=self.lora_alpha, target_modules=list(self.names))
            wrapped = get_peft_model(copy.deepcopy(self.model), config).eval()
            modules = dict(wrapped.get_base_model().named_modules())
            for name in self.names:
                weight = modules[name].lora_A["default"].weight
                weight.data = initial_lora_a(name, weight.shape[1], self.rank).to(weight)
            self._peft.append(wrapped)
        return self._peft[0]

    def embeddings(self) -> Tensor:
        """(N, T, d): input of the other implementations, since vmap fails where a model branches on its token ids."""
        return self.model.get_input_embeddings()(self.batch["input_ids"]).detach()

    def network(self) -> tuple[nn.Module, list[str]]:
        """The network to differentiate and the names of its parameters that count (at B = 0 only B has a gradient)."""
        if self.space == "weight":
            return self.model, [f"{name}.weight" for name in self.names]
        wrapped = self.peft_model()
        return wrapped, [name for name, _ in wrapped.named_parameters() if ".lora_B." in name]


def torch_func(case: Case) -> Tensor:
    """vmap(jacrev) over the counted parameters alone, then one contraction a parameter; the fastest of some chunks."""
    if case.best_chunk is None:
        find_best_chunk(case)
    return _torch_func(case, case.best_chunk)


def find_best_chunk(case: Case) -> None:
    """Sets the chunk size with which torch.func is quickest; a size that needs too much memory is none."""
    taken = {}
    for chunk in sorted({min(len(case.batch["input_ids"]), size) for size in (4, 16, 64)}):
        start = time.perf_counter()
        try:
            _torch_func(case, chunk)
        except RuntimeError:
            continue
        taken[chunk] = time.perf_counter() - start
    case.best_chunk = min(taken, key=lambda chunk: taken[chunk]) if taken else 1


def _torch_func(case: Case, chunk: int | None) -> Tensor:
    network, counted = case.network()
    state = {name: p.detach() for name, p in network.named_parameters()} | dict(network.named_buffers())
    parameters = {name: state.pop(name) for name in counted}

    def single(parameters: dict[str, Tensor], embedded: Tensor) -> Tensor:
        return torch.func.functional_call(
            network, {**state, **parameters}, (), {"inputs_embeds": embedded[None]}
        ).logits[0]

    jacobian = torch.func.vmap(torch.func.jacrev(single), (None, 0), chunk_size=chunk)
    return _contract(jacobian(parameters, case.embeddings()).values())


def authors(case: Case) -> Tensor:
    """Example by example, over all parameters, keeping the adapter's: the paper's own way."""
    network, counted = case.network()
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def single(parameters: dict[str, Tensor], embedded: Tensor) -> Tensor:
        return torch.func.functional_call(
            network, {**buffers, **parameters}, (), {"inputs_embeds": embedded[None]}
        ).logits[0]

    jacobian = torch.func.vmap(torch.func.jacrev(single), (None, 0))
    kept: dict[str, list[Tensor]] = {name: [] for name in counted}
    for embedded in case.embeddings():
        rows = jacobian(parameters, embedded[None])
        for name in counted:
            kept[name].append(rows[name])
    return _contract(torch.cat(rows) for rows in kept.values())


def nngeometry(case: Case) -> Tensor:
    """nngeometry's hooks, asked for the dense Jacobian of the counted layers.

    Its linear layer takes inputs (N, d) only (version 0.4); the product that inputs (N, T, d) need is patched in.
    """
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.backend.torch_hooks.grads import LinearJacobianFactory
    from nngeometry.layercollection import LayerCollection

    def flat_grad(cls, buffer, module, layer, x, gy):
        size = layer.weight.numel()
        x, gy = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, gy))
        buffer[:, :size].add_((gy.mT @ x).flatten(1))
        if layer.bias is not None:
            buffer[:, size:].add_(gy.sum(1))

    LinearJacobianFactory.flat_grad = classmethod(flat_grad)
    network, counted = case.network()
    network = copy.deepcopy(network)
    modules = dict(network.named_modules())
    layers = LayerCollection()
    for name in counted:
        module = modules[name.removesuffix(".weight")]
        module.bias = None if not isinstance(module, nn.Linear) else module.bias
        layers.add_layer_from_model(network, module)
    embeddings = case.embeddings()

    def function(embedded: Tensor, *_: Tensor) -> Tensor:
        mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
        return network(inputs_embeds=embedded, attention_mask=mask).logits

    backend = TorchHooksJacobianBackend(model=network, function=function, layer_collection=layers)
    data = torch.utils.data.TensorDataset(embeddings, torch.zeros(len(embeddings), device=embeddings.device))
    loader = torch.utils.data.DataLoader(data, batch_size=len(embeddings))
    jacobian = backend.get_jacobian(loader)  # (C, N, P)
    rows = jacobian.transpose(0, 1).flatten(0, 1)
    kept, start = [], 0
    for layer in layers.layers.values():
        size = layer.weight.numel()
        kept.append(rows[:, start : start + size])
        start += layer.numel()
    return sum((part @ part.T for part in kept), torch.zeros(len(rows), len(rows), device=rows.device))


def trak(case: Case) -> Tensor:
    """TRAK's own functional gradient computer, once an output; it differentiates all weights and drops the others."""
    from trak.gradient_computers import FunctionalGradientComputer

    network, counted = case.network()
    columns = []
    for a in range(2):

        class Task:
            @staticmethod
            def get_output(model, weights, buffers, embedded, a=a):
                return _logits(model, (weights, buffers), embedded)[a]

        computer = FunctionalGradientComputer(
            network,
            Task,
            grad_dim=0,
            dtype=torch.float32,
            device=case.batch["input_ids"].device,
            grad_wrt=set(counted),
        )
        columns.append(computer.compute_per_sample_grad((case.embeddings(),)))
    return _contract(torch.stack([column[name] for column in columns], 1) for name in counted)


def _logits(network: nn.Module, state, embedded: Tensor) -> Tensor:
    """(C,) of one example (T, d)."""
    return torch.func.functional_call(network, state, (), {"inputs_embeds": embedded[None]}).logits[0]


def _contract(jacobians) -> Tensor:
    """Σ over parameters of J Jᵀ, J (N, C, …) → (N·C, N·C)."""
    total = None
    for jacobian in jacobians:
        rows = jacobian.detach().flatten(2).flatten(0, 1)
        product = rows @ rows.T
        total = product if total is None else total.add_(product)
    return total


PEERS: dict[str, Callable[[Case], Tensor]] = {
    "torch.func": torch_func,
    "authors": authors,
    "nngeometry": nngeometry,
    "TRAK": trak,
}
