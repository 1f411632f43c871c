# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels preconditioned by an optimizer: Adam gives every module its own step size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import KernelError, PeftLinearError
from ..kernels.module_kernels import ModuleKernels
from ..kernels.tensor_files import LazyBlocks, ScaledBlocks
from .problem import Problem


BATCH_SIZE = 8


@dataclass(frozen=True)
class AdamScales:
    """`s_m`, the root mean square of the loss gradient in one parameter of a module, which Adam divides its steps by.

    `s_m = sqrt(E‖g_m‖²/P_m)`, with g_m the gradient of the mean loss of a random batch of B examples (drawn without
    replacement) in the parameters of module m at θ0, and P_m their number. With `e_i` the loss gradient of example i
    alone and `K_ij` a block of K_m, `E‖g_m‖² = (1/B)·mean_i e_iᵀK_ii e_i + (1 − 1/B)·mean_{i≠j} e_iᵀK_ij e_j`.
    """

    modules: Mapping[str, float]
    base: float

    @classmethod
    def of(cls, kernels: ModuleKernels, batch_size: int = BATCH_SIZE) -> AdamScales:
        """O(n²) a module.

        P_m counts the entries of the module's weight, d_in·d_out, and those of the head. LoRA has fewer parameters,
        but its A is not fixed: its entries start at about 1/sqrt(3·d_in), and Adam moves each by η a step, so a
        module with many inputs soon moves further than the kernel at B = 0 says. That count agrees better with
        measured training than LoRA's own (docs/decisions/0009). A zero block has the scale 1.

        Raises:
            OutputError: the outputs do not determine a loss.
            KernelError: a block is not finite, or has negative energy, as a sign kernel may.
            PeftLinearError: batch_size < 1.
        """
        if batch_size < 1:
            raise PeftLinearError(f"batch_size must be at least 1, got {batch_size}")
        problem = Problem.of(kernels, ridge=1.0)
        error = problem.error.view(problem.outputs.shape) * problem.num_examples
        sizes = {name: math.prod(shape) for name, shape in kernels.shapes.items()}
        in_base = kernels.base_parameters or sum(sizes.values()) / len(sizes)
        modules = {name: _scale(name, kernels[name], error, batch_size, sizes[name]) for name in kernels.names}
        return cls(modules, _scale("base", kernels.base, error, batch_size, in_base))


def _scale(name: str, gram: Tensor, error: Tensor, batch_size: int, parameters: float) -> float:
    count, outputs = error.shape
    flat = error.reshape(-1)
    blocks = gram.view(count, outputs, count, outputs).diagonal(dim1=0, dim2=2)  # (C, C, N)
    alone = float(torch.einsum("ia,abi,ib->", error, blocks, error))
    together = float(flat @ gram @ flat) - alone
    size = min(batch_size, count)
    energy = alone / count
    if count > 1:
        energy = energy / size + (1 - 1 / size) * together / (count * (count - 1))
    if not math.isfinite(energy):
        raise KernelError(f"the kernel of {name} is not finite; check the model's outputs for NaN or inf")
    if energy < -1e-12 * abs(alone):
        raise KernelError(
            f"the kernel of {name} has gradient energy {energy:.3g}, so it is not J Jᵀ; optimizer='adamw' "
            "needs kernels of compute_ntk, not of compute_sign_kernel"
        )
    return math.sqrt(energy / parameters) if energy > 0 else 1.0


def adam_preconditioned(kernels: ModuleKernels, batch_size: int = BATCH_SIZE) -> ModuleKernels:
    """`K_m/s_m` for every module and the base: the kernels of training with Adam or AdamW.

    Adam divides a parameter's step by the root mean square of its gradient. With one such number for each module, a
    step of learning rate η changes the outputs by `−η Σ_m K_m e/s_m`: gradient descent with the kernel
    `Σ_m K_m/s_m`, at the learning rate that Adam is given. Sets still have the sum of their modules' kernels.

    Args:
        kernels: Of outputs that determine a loss. Lazy kernels stay lazy.
        batch_size: Of the training that is meant: small batches have larger gradients, which Adam divides by.

    Raises:
        OutputError, KernelError, PeftLinearError: as `AdamScales.of`.
    """
    scales = AdamScales.of(kernels, batch_size)
    blocks: Mapping[str, Tensor]
    if isinstance(kernels.blocks, LazyBlocks):
        blocks = ScaledBlocks(kernels.blocks, scales.modules)
    else:
        blocks = {name: block / scales.modules[name] for name, block in kernels.blocks.items()}
    return replace(
        kernels,
        blocks=blocks,
        base=kernels.base / scales.base,
        provenance={**kernels.provenance, "optimizer": "adamw", "batch_size": batch_size},
    )
