# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`compute_ntk`: the neural tangent kernel of a model's modules, before training, one block a module."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal, overload

import torch
from torch import nn

from ..functional.gram import DEFAULT_MAX_BYTES
from ..kernels import ModuleKernels
from .batches import read_batches
from .engine.fingerprint import fingerprint
from .engine.memory import parse_memory
from .engine.processes import Team
from .engine.run import Result, Run
from .engine.run_folder import RunFolder
from .outputs import OutputKind
from .passes import no_gradient
from .request import Prepared, Request
from .targets import Targets, base_model, linear_shape
from .terms import Space


@overload
def compute_ntk(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: Targets = ...,
    space: Space = ...,
    rank: int = ...,
    lora_alpha: float = ...,
    draws: int = ...,
    outputs: OutputKind = ...,
    always_trained: Sequence[str] | None = ...,
    seed: int = ...,
    progress: bool = ...,
    *,
    num_projections: int = ...,
    kernel: Literal["gradient", "sign"] = ...,
    product_dtype: torch.dtype | None = ...,
    max_bytes: int = ...,
    max_memory: int | str | None = ...,
    folder: str | os.PathLike | None = ...,
    distributed: bool = ...,
) -> ModuleKernels: ...


@overload
def compute_ntk(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: Targets = ...,
    space: Literal["lora"] = ...,
    *,
    rank: Sequence[int],
    lora_alpha: float = ...,
    draws: int = ...,
    outputs: OutputKind = ...,
    always_trained: Sequence[str] | None = ...,
    seed: int = ...,
    progress: bool = ...,
    num_projections: int = ...,
    kernel: Literal["gradient", "sign"] = ...,
    product_dtype: torch.dtype | None = ...,
    max_bytes: int = ...,
    max_memory: int | str | None = ...,
    folder: str | os.PathLike | None = ...,
    distributed: bool = ...,
) -> dict[int, ModuleKernels]: ...


def compute_ntk(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: Targets = "all-linear",
    space: Space = "lora",
    rank: int | Sequence[int] = 8,
    lora_alpha: float = 16.0,
    draws: int = 1,
    outputs: OutputKind = "logits",
    always_trained: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    num_projections: int = 16,
    kernel: Literal["gradient", "sign"] = "gradient",
    product_dtype: torch.dtype | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    max_memory: int | str | None = None,
    folder: str | os.PathLike | None = None,
    distributed: bool = True,
) -> ModuleKernels | dict[int, ModuleKernels]:
    """The empirical NTK `K_m = J_m J_mᵀ` of every target module m at the model's present parameters.

    One forward and C backward passes a batch give the rows of every module at once, through hooks on the unmodified
    model; there is no loop over examples and no parameter gradient is computed. The result is exact: it agrees with a
    Jacobian taken example by example up to rounding. With random A (space="lora") it is exact for *that* A.

    Args:
        model: a PreTrainedModel, a PeftModel, or any nn.Module called with keyword arguments; left as it was found
            (mode, requires_grad, gradients, hooks, random state). Dropout is off while we look.
        batches: dict batches, as a DataLoader gives them; read once, before any work. Labels ("labels" or "label")
            are kept and used where `outputs` needs them.
        targets: "all-linear", a regular expression for full names, or a list of names and suffixes; peft's own rules.
        space: which parameters of a module count: "lora" (a fresh adapter, B = 0; a layer that carries an active LoRA
            adapter counts with its own A, B and scaling), "weight" (the full matrix, which says where an
            adapter belongs whatever its A; `num_parameters` are still those of LoRA at `rank`), "rows" or "columns"
            (the first `rank` of them), "bias".
        rank, lora_alpha: of the adapter under consideration; its scaling is lora_alpha / rank. Several ranks, such as
            rank=(4, 8, 16), share the passes and the products of the largest (space="lora" only), for A of a lower
            rank is the first rows of A of a higher one.
        draws: draws of LoRA's random A taken in the same pass; blocks are their mean, `kernels.spread` is the
            relative standard deviation between them. The mean estimates (lora_alpha²/(3·rank·d_in)) · K_weight.
        outputs: "logits" (C = number of labels), "label_logit", "margin", "log_likelihood", "random_projection"
            (C = num_projections) or "loss"; see `peft_linear.capture.outputs`.
        always_trained: names of modules trained in full whatever is chosen; their kernel is `kernels.base`. Default:
            `modules_to_save` of a PeftModel, the task head of a plain model. Pass () for none.
        seed: of A and of random projections.
        progress: show progress bars.
        num_projections: outputs of "random_projection".
        kernel: "gradient", or "sign" for `(J sign(J)ᵀ + sign(J) Jᵀ)/2`, the symmetrised kernel of sign descent, which
            Adam's first steps are near to (Malladi et al., arXiv 2210.05643). It is not positive semidefinite, so it
            has no `spectrum()` and no ridge regression, and it depends on the parametrisation.
        product_dtype: torch.float64 multiplies the rows of a float32 model in float64. Default: in their own dtype
            (float32 for models in half precision), at most 4,096 products in one sum and all other sums in float64,
            which is about twice as fast and tells eigenvalues down to about 1e-7·λ1 from rounding
            (`Spectrum.noise_floor` follows); with torch.float64, down to about 1e-12·λ1.
        max_bytes: bound on the temporary memory of one Gram product.
        max_memory: bytes, or a size like "4GB" or "512MiB", that the computation may keep (in each process): rows of
            all batches, products at work and finished blocks together; more goes to files. It covers neither the
            model, nor the batches, nor what a single batch needs (its activations and rows). At least about 27·n²
            bytes; where the blocks do not fit, the result is lazy (see ModuleKernels). None: no limit.
        folder: keeps rows and finished blocks here, checksummed, so that a run that was killed goes on where it
            stopped when it is called again with the same arguments, and gives the same kernels to the bit. Holds the
            kernels at the end (`ModuleKernels.load(folder)`); of several ranks, those of rank 8 in the folder
            "rank-8" in it. Default: memory, or a temporary folder.
        distributed: where several processes run (under `accelerate launch` or torchrun), divide the work among them:
            every process then has to call this with the same model and the same batches (not its own shard), and all
            get the same kernels. They need a file system in common, with `folder` on it or, on a single machine, the
            system's temporary folder. False: this process works alone.

    Returns:
        ModuleKernels with float64 (n, n) blocks on the CPU, n = N·C. Where `rank` is a sequence, a dict of them by
        rank, in its order: each what a call with that rank alone returns, up to rounding. A module that carries an
        adapter keeps its own rank, and has the same block in all of them.

    Raises:
        TargetError: unknown or unusable targets, candidates that take no gradient, examples that cannot be told apart.
        OutputError: labels missing or out of range, outputs that are not finite or of the wrong shape.
        PeftLinearError: no batches, arguments out of range, too little memory, processes with different data.
        FileError: `folder` holds the run of something else, or cannot be used.
        ProcessError: another process failed or died.

    Cost: (1 forward + C backward passes to the lowest target) of N examples, N·C·T·rank·d_out multiplications a
    module for the rows, and n²·rank·d_out for its Gram matrix (d_in in place of rank for space="weight").

    Source: *Linearization Explains Fine-Tuning in Large Language Models* (arXiv 2602.08239), section 4; the
    factorisation of a linear layer's per-example gradient is Goodfellow's (arXiv 1510.01799).
    """
    request = Request(
        targets=targets,
        space=space,
        rank=rank,
        lora_alpha=lora_alpha,
        draws=draws,
        outputs=outputs,
        always_trained=always_trained,
        seed=seed,
        num_projections=num_projections,
        kernel=kernel,
        product_dtype=product_dtype,
    )
    limit = parse_memory(max_memory)
    prepared = request.prepare(model)
    needs_labels = prepared.job.function.needs_labels
    team = Team.assemble() if distributed else Team()
    store = RunFolder(team, folder)
    try:
        read = team.each(
            "reading the batches", lambda: read_batches(batches, model, needs_labels, f"outputs={outputs!r}")
        )
        run = Run(replace(prepared.job, batches=read), request.folders, team, store, limit, max_bytes, progress)
        if store.kept or team.size > 1:
            store.open(team.gather("taking checksums", lambda: fingerprint(model, read, prepared.arguments)))
        kernels = run.load() if run.is_finished() else _complete(run, request, prepared)
        return {one: kernels[one] for one in request.ranks} if request.by_rank else kernels[request.ranks[0]]
    except BaseException:
        store.discard()
        raise


def _complete(run: Run, request: Request, prepared: Prepared) -> dict[int, ModuleKernels]:
    """Computes what is missing; the kernels by rank, and in the folder if there is one."""
    device = run.job.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        result = run.complete()
    if len(result.of_rank[request.ranks[0]].zero) == len(run.job.candidates):
        raise no_gradient(run.job.candidates, request.outputs)
    kernels = {rank: _kernels_of_rank(rank, result, request, prepared) for rank in result.of_rank}
    finished = {request.folders[rank]: (kernels[rank], result.of_rank[rank].files) for rank in kernels}
    run.team.each("finishing", lambda: run.folder.finish(finished))
    return kernels


def _kernels_of_rank(rank: int, result: Result, request: Request, prepared: Prepared) -> ModuleKernels:
    job, found = prepared.job, result.of_rank[rank]
    ranks = {"ranks": sorted(request.ranks)} if request.by_rank else {}
    return ModuleKernels(
        blocks=found.blocks,
        base=result.base,
        outputs=result.outputs,
        labels=result.labels,
        num_parameters=prepared.num_parameters(rank, max(request.ranks)),
        shapes={name: linear_shape(module) for name, module in job.candidates.items()},  # type: ignore[misc]
        output_kind=request.outputs,
        space=request.space,
        rank=rank,
        lora_alpha=float(request.lora_alpha),
        spread=found.spread,
        provenance={
            **_describe(job.model, job.device, request.product_dtype),
            "seed": request.seed,
            "draws": request.draws,
            **ranks,
            "kernel": request.kernel,
            "always_trained": prepared.arguments["always_trained"],
            "no_gradient": found.zero,
            "ways": found.ways,
            **result.record,
        },
        base_parameters=prepared.in_head,
    )


def _describe(model: nn.Module, device: torch.device, product_dtype: torch.dtype | None) -> dict[str, Any]:
    root = base_model(model)
    config = getattr(root, "config", None)
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
    return {
        "model_class": type(root).__name__,
        "model": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(dtype),
        "product_dtype": str(product_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)),
        "device": str(device),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
