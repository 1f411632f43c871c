# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`compute_ntk`: the neural tangent kernel of a model's modules, before training, one block a module.

`compute_ntk_at_ranks` is the same at several ranks of the adapter, `compute_sign_kernel` the kernel of sign descent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..functional.outputs import Outputs
from ..kernels import ModuleKernels
from .adapter_spaces import Space
from .keywords import with_progress
from .request import KernelRequest
from .resources import DEFAULT_RESOURCES, Resources
from .targets import Targets


@with_progress
def compute_ntk(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: Targets = KernelRequest.targets,
    space: Space = KernelRequest.space,
    rank: int = KernelRequest.rank,
    lora_alpha: float = KernelRequest.lora_alpha,
    draws: int = KernelRequest.draws,
    outputs: Outputs = KernelRequest.outputs,
    always_trained: Sequence[str] | None = KernelRequest.always_trained,
    seed: int = KernelRequest.seed,
    resources: Resources = DEFAULT_RESOURCES,
) -> ModuleKernels:
    """The empirical NTK `K_m = J_m J_mᵀ` of every target module m at the model's present parameters.

    One forward and C backward passes a batch give the rows of every module at once, through hooks on the unmodified
    model; there is no loop over examples and no parameter gradient is computed. The result is exact: it agrees with a
    Jacobian taken example by example up to rounding. With random A (space="lora") it is exact for *that* A.

    Args:
        model: a PreTrainedModel, a PeftModel, or any nn.Module called with keyword arguments; left as it was found
            (mode, requires_grad, gradients, hooks, random state). Dropout is off during the computation.
        batches: dict batches, as a DataLoader gives them; read once, before any work. Labels ("labels" or "label")
            are kept and used where `outputs` needs them.
        targets: "all-linear", a regular expression for full names, or a list of names and suffixes; peft's own rules.
        space: which parameters of a module count: "lora" (a fresh adapter, B = 0; a layer that carries an active LoRA
            adapter counts with its own A, B and scaling), "weight" (the full matrix, which says where an adapter
            belongs independently of its A; `num_parameters` are still those of LoRA at `rank`), "rows" or "columns"
            (the first `rank` of them), "bias".
        rank, lora_alpha: of the adapter under consideration; its scaling is lora_alpha / rank.
        draws: draws of LoRA's random A taken in the same pass; blocks are their mean, `kernels.spread` is the
            relative standard deviation between them. The mean estimates (lora_alpha²/(3·rank·d_in)) · K_weight.
        outputs: "logits" (C = number of labels), "label_logit", "margin", "log_likelihood", "random_projection"
            (C = 16) or "loss", or an object such as `RandomProjection(32)`; see `peft_linear.functional.outputs`.
        always_trained: names of modules that are trained in full with every choice; their kernel is `kernels.base`.
            Default: `modules_to_save` of a PeftModel, the task head of a plain model. Pass () for none.
        seed: of A and of random projections.
        resources: memory, folder, processes, precision and progress; see `Resources`. `progress=False` alone is short
            for `resources=Resources(progress=False)`.

    Returns:
        ModuleKernels with float64 (n, n) blocks on the CPU, n = N·C.

    Raises:
        TargetError: unknown or unusable targets, candidates that take no gradient, examples that cannot be told apart.
        OutputError: labels missing or out of range, outputs that are not finite or of the wrong shape.
        PeftLinearError: no batches, arguments out of range, too little memory, processes with different data.
        FileError: the folder holds the run of something else, or cannot be used.
        ProcessError: another process failed or died.

    Cost: (1 forward + C backward passes to the lowest target) of N examples, N·C·T·rank·d_out multiplications a
    module for the rows, and n²·rank·d_out for its Gram matrix (d_in in place of rank for space="weight").

    Source: *Linearization Explains Fine-Tuning in Large Language Models* (arXiv 2602.08239), section 4; the
    factorisation of a linear layer's per-example gradient is Goodfellow's (arXiv 1510.01799).
    """
    request = KernelRequest(targets, space, rank, lora_alpha, draws, outputs, always_trained, seed)
    return request.compute(model, batches, resources)


@with_progress
def compute_ntk_at_ranks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    ranks: Sequence[int],
    targets: Targets = KernelRequest.targets,
    lora_alpha: float = KernelRequest.lora_alpha,
    draws: int = KernelRequest.draws,
    outputs: Outputs = KernelRequest.outputs,
    always_trained: Sequence[str] | None = KernelRequest.always_trained,
    seed: int = KernelRequest.seed,
    resources: Resources = DEFAULT_RESOURCES,
) -> dict[int, ModuleKernels]:
    """The LoRA kernels of adapters of several ranks, from the passes and the products of the largest.

    A of a lower rank is the first rows of A of a higher one, so the Gram matrix of rank r is a partial sum of that of
    rank R > r, times the ratio of the scalings, (R/r)².

    Args:
        ranks: different ranks, such as (4, 8, 16).
        model, batches, targets, lora_alpha, draws, outputs, always_trained, seed, resources: as for `compute_ntk`;
            the scaling at rank r is lora_alpha / r.

    Returns:
        ModuleKernels by rank, in the order of `ranks`: each what `compute_ntk` with that rank returns, up to rounding.
        A module that carries an adapter keeps its own rank, and has the same block in all of them.

    Raises:
        PeftLinearError: `ranks` are not different positive integers; and all that `compute_ntk` raises.

    Cost: that of `compute_ntk` at the largest rank, and (ranks + 3)·8n² bytes where there are several draws.
    """
    request = KernelRequest(
        targets,
        lora_alpha=lora_alpha,
        draws=draws,
        outputs=outputs,
        always_trained=always_trained,
        seed=seed,
    )
    return request.compute_at_ranks(model, batches, ranks, resources)


@with_progress
def compute_sign_kernel(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: Targets = KernelRequest.targets,
    space: Space = KernelRequest.space,
    rank: int = KernelRequest.rank,
    lora_alpha: float = KernelRequest.lora_alpha,
    draws: int = KernelRequest.draws,
    outputs: Outputs = KernelRequest.outputs,
    always_trained: Sequence[str] | None = KernelRequest.always_trained,
    seed: int = KernelRequest.seed,
    resources: Resources = DEFAULT_RESOURCES,
) -> ModuleKernels:
    """`(J sign(J)ᵀ + sign(J) Jᵀ)/2` of every target module: the symmetrised kernel of sign descent.

    Adam's first steps are near to sign descent (Malladi et al., arXiv 2210.05643). The kernel is not positive
    semidefinite, so it has no `spectrum()` and no ridge regression, and it depends on the parametrisation.
    `predict_training` takes it to approximate training with Adam.

    Args:
        model, batches, targets, space, rank, lora_alpha, draws, outputs, always_trained, seed, resources: as for
            `compute_ntk`.

    Raises:
        As `compute_ntk`.

    Cost: as `compute_ntk`, but twice the multiplications of the Gram matrices, and Jacobian rows are always formed.
    """
    request = KernelRequest(targets, space, rank, lora_alpha, draws, outputs, always_trained, seed)
    return request.compute_sign(model, batches, resources)
