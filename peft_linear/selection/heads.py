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

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError, OutputError
from ..kernels.module_kernels import ModuleKernels
from .criteria import gradient_energy
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
        blocks={name: _of_losses(kernels[name], errors) for name in kernels.names},
        base=_of_losses(kernels.base, errors),
        outputs=F.cross_entropy(problem.outputs, problem.targets, reduction="none")[:, None],
        output_kind="loss",
    )


def _of_losses(gram: Tensor, errors: Tensor) -> Tensor:
    return torch.einsum("ia,iajb,jb->ij", errors, gram.view(*errors.shape, *errors.shape), errors)


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
    first, energies = of_losses[0], []
    for look in of_losses:
        if look.names != first.names or look.num_examples != first.num_examples:
            raise KernelError(
                f"kernels through another head must be of the same modules and examples, got {len(look)} modules and "
                f"{look.num_examples} examples beside {len(first)} and {first.num_examples}"
            )
        problem = Problem.of(look, ridge=1.0)
        energies.append(sum(gradient_energy(look[name], problem) for name in look.names))
        if not energies[-1] > 0:
            raise KernelError("the loss has no gradient in any candidate, so there is nothing to choose")

    def mean(blocks: Iterable[Tensor]) -> Tensor:
        return torch.stack([block / energy for block, energy in zip(blocks, energies, strict=True)]).mean(dim=0)

    blocks = {name: mean(look[name] for look in of_losses) for name in first.names}
    return replace(first, blocks=blocks, base=mean(look.base for look in of_losses))
