# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Slow, obviously right twins: one example, one output, one backward pass at a time, by ordinary reverse mode.

They share no code with the package but `initial_lora_a` (the random A whose kernel is asked for).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_linear.capture.adapter_spaces import initial_lora_a


def example_batches(batch: dict) -> list[dict]:
    """The batch as batches of one example."""
    size = len(next(iter(batch.values())))
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(size)]


def jacobian(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batches: list[dict],
    output: Callable[[nn.Module, dict], Tensor],
) -> Tensor:  # (n, P)
    """Rows ∂f_a(x_i)/∂θ, example-major; `output(model, batch of one)` is the (C,) vector f(x_i)."""
    was_training = model.training
    model.eval()
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    rows = []
    for batch in batches:
        for single in example_batches(batch):
            for value in output(model, single):
                gradients = torch.autograd.grad(
                    value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.train(was_training)
    return torch.stack(rows).detach()


def kernel(model, parameters, batches, output) -> Tensor:
    rows = jacobian(model, parameters, batches, output)
    return rows @ rows.T


def logits(model: nn.Module, batch: dict) -> Tensor:
    """All logits of a classifier, (C,)."""
    return model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]


def sequence_log_likelihood(model: nn.Module, batch: dict) -> Tensor:
    """Σ_t log p(label_{t+1} | …) of a causal language model, one token at a time, (1,)."""
    scores = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
    total = scores.new_zeros(1)
    for t, label in enumerate(batch["labels"][0].tolist()[1:]):
        if label != -100:
            total = total + torch.log_softmax(scores[t], 0)[label]
    return total


def with_lora(
    model: nn.Module, names, rank: int, lora_alpha: float, seed: int = 0, draw: int = 0, b_scale: float = 0.0
):
    """A peft LoRA model whose A are the ones `compute_ntk` considers; B is 0, or random of the given scale."""
    config = LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=list(names), lora_dropout=0.0)
    peft_model = get_peft_model(model, config)
    modules = dict(peft_model.get_base_model().named_modules())
    for name in names:
        layer = modules[name]
        a = layer.lora_A["default"].weight
        b = layer.lora_B["default"].weight
        a.data = initial_lora_a(name, a.shape[1], rank, seed, draw).to(a.dtype)
        b.data = torch.randn(b.shape, dtype=torch.float64).to(b.dtype) * b_scale
    return peft_model


def lora_parameters(peft_model: nn.Module, name: str) -> list[nn.Parameter]:
    layer = dict(peft_model.get_base_model().named_modules())[name]
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def gradient_shares(
    models: list[nn.Module], batches: list[dict], names, rank: int, lora_alpha: float, draws=1, by_adam: bool = False
) -> dict[str, float]:
    """{module: least over the models of ‖g_m‖²/Σ_m ‖g_m‖²}, g_m the gradient of the mean loss in fresh LoRA on m.

    ‖g_m‖² is the mean over draws of A. by_adam: ‖g_m‖²/s_m instead, s_m = ‖g_m‖/sqrt(d_in·d_out), Adam's scale where
    every batch has all examples.
    """
    shares = []
    for model in models:
        energies = {}
        for name in names:
            square = 0.0
            for draw in range(draws):
                adapted = with_lora(copy.deepcopy(model), [name], rank, lora_alpha, draw=draw)
                scores = torch.cat([logits(adapted, single)[None] for b in batches for single in example_batches(b)])
                loss = nn.functional.cross_entropy(scores, torch.cat([batch["labels"] for batch in batches]))
                gradients = torch.autograd.grad(loss, lora_parameters(adapted, name))
                square += float(sum(gradient.square().sum() for gradient in gradients)) / draws
            layer = dict(adapted.get_base_model().named_modules())[name]
            energies[name] = (square * layer.in_features * layer.out_features) ** 0.5 if by_adam else square
        shares.append({name: energy / sum(energies.values()) for name, energy in energies.items()})
    return {name: min(of_model[name] for of_model in shares) for name in names}


def reference_statistics(model: nn.Module, batches: list[dict], names, seed: int) -> tuple[dict, dict]:
    """{module: E[h hᵀ]} and {module: Σ ‖δ‖²/(d_out·N)} of `collect_reference`, from plain hooks and autograd.

    δ is the gradient of log p of labels sampled at every prediction that counts; positions with δ = 0 do not count.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = {name: [] for name in names}, {name: [] for name in names}
    cotangents = {name: [] for name in names}
    handles = []
    for name in names:

        def hook(module, args, output, name=name):
            inputs[name].append(args[0].detach())
            outputs[name].append(output)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    shift = int("CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__)
    total = 0
    for batch in batches:
        for name in names:
            outputs[name].clear()
        given = {k: v for k, v in batch.items() if k != "labels" or model.config.is_encoder_decoder}
        scores = model(**given).logits
        if scores.ndim == 3:
            counted = (batch["labels"] != -100)[:, shift:]
            scores = (scores[:, :-1] if shift else scores)[counted]
        labels = torch.multinomial(scores.detach().softmax(-1), 1, generator=generator)
        total += len(labels)
        log_p = scores.log_softmax(-1).gather(1, labels).sum()
        flat = [output for name in names for output in outputs[name]]
        found = iter(torch.autograd.grad(log_p, flat, allow_unused=True))
        for name in names:
            for output in outputs[name]:
                gradient = next(found)
                cotangents[name].append(torch.zeros_like(output) if gradient is None else gradient)
    for handle in handles:
        handle.remove()
    moments, scales = {}, {}
    for name in names:
        h = torch.cat([each.flatten(0, -2) for each in inputs[name]])
        d = torch.cat([each.flatten(0, -2) for each in cotangents[name]])
        h = h[(d != 0).any(-1)]
        moments[name] = h.T @ h / len(h)
        scales[name] = float(d.square().sum()) / d.shape[-1] / total
    return moments, scales
