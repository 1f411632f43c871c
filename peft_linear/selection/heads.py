# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Gradient energy through two heads: the new one that training begins with, and what it is a few steps later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError, OutputError
from ..kernels.module_kernels import ModuleKernels
from .problem import Problem


def loss_kernels(kernels: ModuleKernels) -> ModuleKernels:
    """Kernels of the examples' losses, from kernels of their logits: `K_m[i, j] = e_iᵀ K_m,ij e_j`, (N, N).

    With `e_i = ∂ℓ_i/∂f(x_i)` at θ0 this is the Gram matrix of the examples' loss gradients, what `compute_ntk` gives
    with outputs="loss" (a backward pass instead of C). Kernels of losses are returned as they are. O(n²) a module;
    lazy kernels are read block by block, and the result is held in memory.

    Raises:
        OutputError: the kernels are neither of labelled logits nor of losses.
    """
    if kernels.output_kind == "loss":
        return kernels
    problem = Problem.of(kernels, ridge=1.0)
    if "logits" not in problem.provides:
        raise OutputError(f"{problem.what} have no cross-entropy; compute kernels of labelled logits or of losses")
    errors = problem.error.view(problem.outputs.shape) * problem.num_examples
    return replace(
        kernels,
        blocks={name: _contract(kernels[name], errors) for name in kernels.names},
        base=_contract(kernels.base, errors),
        outputs=F.cross_entropy(problem.outputs, problem.targets, reduction="none")[:, None],
        output_kind="loss",
    )


def _contract(gram: Tensor, errors: Tensor) -> Tensor:
    count, outputs = errors.shape
    rows = (gram.view(count, outputs, -1) * errors[:, :, None]).sum(dim=1)
    return (rows.view(count, count, outputs) * errors).sum(dim=2)


def over_heads(looks: Sequence[ModuleKernels]) -> ModuleKernels:
    """The mean of kernels of the same modules and examples through several heads, none of which outweighs another.

    Each look becomes the kernels of its losses, divided by the gradient energy of all its candidates together, so that
    the gradient energy of a module in the mean is its mean share: over all candidates the shares add up to 1, and sets
    have the sum of their modules' shares.

    Raises:
        KernelError: no looks, looks of different modules or numbers of examples, or one without any loss gradient.
        OutputError: as `loss_kernels`.
    """
    of_losses = [loss_kernels(look) for look in looks]
    if not of_losses:
        raise KernelError("there are no kernels to take the mean of")
    first = of_losses[0]
    total: dict[str, Tensor] = {name: torch.zeros_like(first.base) for name in (*first.names, "")}
    for look in of_losses:
        if look.names != first.names or look.num_examples != first.num_examples:
            raise KernelError(
                f"kernels through another head must be of the same modules and examples, got {len(look)} modules and "
                f"{look.num_examples} examples beside {len(first)} and {first.num_examples}"
            )
        share = len(of_losses) * sum(float(look[name].sum()) for name in look.names) / look.num_examples**2
        if not share > 0:
            raise KernelError("the loss has no gradient in any candidate, so there is nothing to choose")
        for name in look.names:
            total[name] += look[name] / share
        total[""] += look.base / share
    base = total.pop("")
    return replace(first, blocks=total, base=base)
