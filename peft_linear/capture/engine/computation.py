# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""From a prepared request to its kernels: batches are read, the run is resumed or made, the result is described."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from ...functional.gram import DEFAULT_MAX_BYTES
from ...kernels import ModuleKernels
from ..adaptable import facts_for_peft
from ..batches import read_batches
from ..job import Job, Prepared
from ..passes import no_gradient
from ..resources import Resources
from ..self_check import self_check
from ..step_cost import counted_step
from ..targets import base_model
from .fingerprint import fingerprint
from .processes import Team
from .run import Result, Run
from .run_folder import RunFolder


PRODUCT_BYTES = DEFAULT_MAX_BYTES  # of temporary memory for one product, where max_memory allows as much


def compute_kernels(
    prepared: Prepared, batches: Iterable[Mapping[str, Any]], resources: Resources
) -> dict[int, ModuleKernels]:
    """The kernels at every rank of the request, ascending. Raises what `compute_ntk` does."""
    job, arguments = prepared.job, prepared.arguments | {"precision": str(resources.precision)}
    team = Team.assemble() if resources.distributed else Team()
    store = RunFolder(team, resources.folder)
    try:
        needs_labels, what = job.function.output.needs_labels, f"outputs={arguments['outputs']!r}"
        read = team.each("reading the batches", lambda: read_batches(batches, job.model, needs_labels, what))
        job = replace(job, batches=read, precision=resources.precision)
        run = Run(job, prepared.folders, team, store, resources.memory_limit, PRODUCT_BYTES, resources.progress)
        if store.kept or team.size > 1:
            store.open(team.gather("taking checksums", lambda: fingerprint(job.model, read, arguments)))
        if run.is_finished():
            return run.load()
        check = team.each("checking the gradients", lambda: _self_check(job, resources.check))
        return _complete(run, prepared, *check)
    except BaseException:
        store.discard()
        raise
    finally:
        store.release()


def _self_check(job: Job, mode: str) -> tuple[dict[str, Any], torch.dtype | None]:
    with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
        return self_check(job, mode)


def _complete(
    run: Run, prepared: Prepared, check: dict[str, Any], dtype: torch.dtype | None
) -> dict[int, ModuleKernels]:
    """Computes what is missing; the kernels by rank, and in the folder if there is one."""
    job = run.job
    with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
        result = run.complete()
    if len(next(iter(result.of_rank.values())).zero) == len(job.candidates):
        raise no_gradient(job.candidates, job.function.output.name)
    result.record["check"] = check
    result.record["step_cost"] = counted_step(
        job.model, job.batches[0], job.candidates, prepared.arguments["always_trained"]
    )
    if dtype is not None and torch.finfo(dtype).eps > torch.finfo(getattr(torch, _dtype_of(job))).eps:
        result.record["dtype"] = str(dtype)  # less precise than the weights: autocast
    kernels = {rank: _kernels_of_rank(rank, result, job, prepared) for rank in result.of_rank}
    finished = {folder: (kernels[rank], result.of_rank[rank].files) for rank, folder in prepared.folders.items()}
    run.team.each("finishing", lambda: run.folder.finish(finished))
    return kernels


def _kernels_of_rank(rank: int, result: Result, job: Job, prepared: Prepared) -> ModuleKernels:
    found, arguments = result.of_rank[rank], prepared.arguments
    ranks = {"ranks": arguments["rank"]} if isinstance(arguments["rank"], list) else {}
    return ModuleKernels(
        blocks=found.blocks,
        base=result.base,
        outputs=result.outputs,
        labels=result.labels,
        num_parameters=prepared.num_parameters(rank),
        shapes={name: layer.shape for name, layer in job.candidates.items()},
        output_kind=arguments["outputs"],
        space=arguments["space"],
        rank=rank,
        lora_alpha=float(arguments["lora_alpha"]),
        spread=found.spread,
        provenance={
            **_describe(job),
            "seed": arguments["seed"],
            "draws": arguments["draws"],
            **ranks,
            "kernel": arguments["kernel"],
            "always_trained": arguments["always_trained"],
            "no_gradient": found.zero,
            "peft": facts_for_peft(base_model(job.model), job.candidates, arguments["always_trained"]),
            "ways": found.methods,
            **result.record,
        },
        base_parameters=prepared.in_head,
    )


def _dtype_of(job: Job) -> str:
    """The name of the dtype of the model's weights."""
    parameters = base_model(job.model).parameters()
    return str(next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)).removeprefix("torch.")


def _describe(job: Job) -> dict[str, Any]:
    """Of the model, the precision and the machine. "product_dtype" is `Resources.precision`, by its name in files."""
    root = base_model(job.model)
    config = getattr(root, "config", None)
    dtype = getattr(torch, _dtype_of(job))
    return {
        "model_class": type(root).__name__,
        "model": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(dtype),
        "product_dtype": str(job.precision or (torch.float64 if dtype == torch.float64 else torch.float32)),
        "device": str(job.device),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
