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
"""`compute_ntk`: the neural tangent kernel of a model's modules, before training, one block a module."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import nn

from ..errors import PeftLinearError
from ..functional.gram import DEFAULT_MAX_BYTES
from ..kernels import ModuleKernels
from .batches import read_batches
from .fingerprint import fingerprint
from .memory import parse_memory
from .outputs import OutputFunction, OutputKind, label_shift
from .parameters import split_parameters
from .passes import Job, no_gradient
from .processes import Team
from .run import Run
from .run_folder import RunFolder
from .targets import Targets, base_model, linear_shape, resolve_always_trained, resolve_targets
from .terms import Space, check_adapter_arguments, linear_parameter_terms, module_terms


def compute_ntk(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: Targets = "all-linear",
    space: Space = "lora",
    rank: int = 8,
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
) -> ModuleKernels:
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
            adapter counts with its own A, B and scaling), "weight" (the full matrix), "rows" or "columns" (the first
            `rank` of them), "bias".
        rank, lora_alpha: of the adapter under consideration; its scaling is lora_alpha / rank.
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
            kernels at the end (`ModuleKernels.load(folder)`). Default: memory, or a temporary folder.
        distributed: where several processes run (under `accelerate launch` or torchrun), divide the work among them:
            every process then has to call this with the same model and the same batches (not its own shard), and all
            get the same kernels. They need a file system in common, with `folder` on it or, on a single machine, the
            system's temporary folder. False: this process works alone.

    Returns:
        ModuleKernels with float64 (n, n) blocks on the CPU, n = N·C.

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
    check_adapter_arguments(space, rank, lora_alpha, draws)
    if kernel not in ("gradient", "sign"):
        raise PeftLinearError(f'kernel must be "gradient" or "sign", got {kernel!r}')
    if product_dtype not in (None, torch.float32, torch.float64):
        raise PeftLinearError(f"product_dtype must be None, torch.float32 or torch.float64, got {product_dtype!r}")
    limit = parse_memory(max_memory)
    function = OutputFunction(
        outputs, shift=label_shift(base_model(model)), num_projections=num_projections, seed=seed
    )
    head = resolve_always_trained(model, always_trained)
    chosen = resolve_targets(model, targets, reserved=head)
    head_linear, head_other = split_parameters(head)
    terms, num_parameters = {}, {}
    for name, module in chosen.items():
        terms[name], num_parameters[name] = module_terms(name, module, space, rank, lora_alpha, draws, seed)
    terms |= {name: linear_parameter_terms(module) for name, module in head_linear.items()}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    asked = {
        "targets": list(chosen),
        "always_trained": sorted(head),
        "space": space,
        "rank": rank,
        "lora_alpha": lora_alpha,
        "draws": draws,
        "outputs": outputs,
        "num_projections": num_projections,
        "kernel": kernel,
        "product_dtype": str(product_dtype),
        "seed": seed,
    }

    team = Team.assemble() if distributed else Team()
    store = RunFolder(team, folder)
    try:
        read = team.each(
            "reading the batches", lambda: read_batches(batches, model, function.needs_labels, f"outputs={outputs!r}")
        )
        signed = kernel == "sign"
        job = Job(model, chosen, head_linear, head_other, terms, read, function, device, signed, product_dtype)
        run = Run(job, team, store, limit, max_bytes, progress)
        if store.kept or team.size > 1:
            store.open(team.gather("taking checksums", lambda: fingerprint(model, read, asked)))
            if run.is_finished():
                return run.load()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            result = run.complete()
        if len(result.zero) == len(chosen):
            raise no_gradient(chosen, outputs)
        kernels = ModuleKernels(
            blocks=result.blocks,
            base=result.base,
            outputs=result.outputs,
            labels=result.labels,
            num_parameters=num_parameters,
            shapes={name: linear_shape(module) for name, module in chosen.items()},  # type: ignore[misc]
            output_kind=outputs,
            space=space,
            rank=rank,
            lora_alpha=float(lora_alpha),
            spread=result.spread,
            provenance={
                **_describe(model, device, product_dtype),
                "seed": seed,
                "draws": draws,
                "kernel": kernel,
                "always_trained": sorted(head),
                "no_gradient": result.zero,
                **result.record,
            },
        )
        team.each("finishing", lambda: store.finish(kernels, result.files))
        return kernels
    except BaseException:
        store.discard()
        raise
    finally:
        team.disband()


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
