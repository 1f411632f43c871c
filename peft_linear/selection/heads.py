# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Gradient energy over several task heads: the new one, and the same after a few training steps."""

from __future__ import annotations

from collections.abc import Sequence
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


def over_heads(heads: Sequence[ModuleKernels]) -> ModuleKernels:
    """Selects, for each module, the kernel of the head state in which its share of the gradient energy is smallest.

    Each becomes the kernels of its losses, divided by the gradient energy of all its candidates together, so that
    the gradient energy of a module is its share and no head outweighs another. A module's block is that of the head in
    which its share is least; the base is the mean over the heads. So a module that matters only through a random head,
    or only through a fitted one, scores low (docs/decisions/0011). Least shares add up to 1 at most, and sets have the
    sum of their modules'.

    Raises:
        KernelError: no heads, kernels of different modules or numbers of examples, or one without any loss gradient.
        OutputError: as `loss_kernels`.
    """
    of_losses = [loss_kernels(kernels) for kernels in heads]
    if not of_losses:
        raise KernelError("`heads` is empty; pass the kernels through each head")
    first, energies = of_losses[0], []
    for kernels in of_losses:
        if kernels.names != first.names or kernels.num_examples != first.num_examples:
            raise KernelError(
                f"kernels through another head must be of the same modules and examples, got {len(kernels)} modules "
                f"and {kernels.num_examples} examples beside {len(first)} and {first.num_examples}"
            )
        problem = Problem.of(kernels, ridge=1.0)
        energies.append({name: gradient_energy(kernels[name], problem) for name in kernels.names})
        if not sum(energies[-1].values()) > 0:
            raise KernelError("the loss has no gradient in any candidate, so there is nothing to choose")
    totals = [sum(of_modules.values()) for of_modules in energies]

    def least(name: str) -> Tensor:
        number = min(range(len(heads)), key=lambda i: energies[i][name] / totals[i])
        return of_losses[number][name] / totals[number]

    base = torch.stack([kernels.base / total for kernels, total in zip(of_losses, totals, strict=True)]).mean(dim=0)
    return replace(first, blocks={name: least(name) for name in first.names}, base=base)
