# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How good the estimates are: random projections of the outputs, draws of LoRA's random A, against exact kernels.

    python -m examples.benchmarks.ntk_estimates

Model and text are the demo's (MiniLM, topics of Debian packages). Errors are relative, in Frobenius norm, of the
kernel summed over all modules.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from examples.common.files import save_json, save_text
from examples.common.reports import Folders, add_output, as_page, circumstances, command_line, provenance
from examples.common.tasks import Task, load_task
from peft_linear import ModuleKernels, Spectrum, compute_ntk
from peft_linear.functional.outputs import RandomProjection
from peft_linear.report.markdown import markdown_table


MODULE = "examples.benchmarks.ntk_estimates"


def trace_kernel(kernels: ModuleKernels) -> Tensor:
    """Σ_a K_aa, (N, N): the kernel summed over outputs."""
    n, c = kernels.num_examples, kernels.num_outputs
    return kernels.subset().view(n, c, n, c).diagonal(dim1=1, dim2=3).sum(-1)


def error(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).norm() / exact.norm())


def condition_number(gram: Tensor) -> float:
    """With a ridge of 1e-3 mean eigenvalues, so that it says something for singular kernels too."""
    return Spectrum.from_gram(gram, eps=1e-12).condition_number(1e-3 * float(gram.trace()) / len(gram))


def measure(task: Task, examples: int, projections: Sequence[int], draws: Sequence[int], seeds: int) -> dict[str, Any]:
    """Errors of each estimate, one a seed; keys are strings, as JSON has them."""
    model, batches = task.new_model(0), task.calibration(examples)
    options = {"always_trained": (), "progress": False}
    projected: dict[str, list[float]] = {str(k): [] for k in projections}
    for seed in range(seeds):
        exact = trace_kernel(compute_ntk(model, batches, seed=seed, **options))
        for k in projections:
            estimate = compute_ntk(model, batches, outputs=RandomProjection(k), seed=seed, **options)
            projected[str(k)].append(error(trace_kernel(estimate), exact))
    weight = compute_ntk(model, batches, space="weight", **options)
    expected = sum(
        (weight[name] * 16.0**2 / (3 * 8 * weight.shapes[name][0]) for name in weight.names),
        torch.zeros_like(weight.base),
    )
    sketched: dict[str, list[dict[str, float]]] = {}
    for d in draws:
        for s in range(seeds):
            kernels = compute_ntk(model, batches, rank=8, lora_alpha=16, draws=d, seed=s, **options)
            row = {
                "error": error(kernels.subset(), expected),
                "condition_ratio": condition_number(kernels.subset()) / condition_number(expected),
            }
            sketched.setdefault(str(d), []).append(row)
    return {"projections": projected, "draws": sketched, "rows": weight.outputs.numel()}


def report(record: Mapping[str, Any]) -> str:
    """README.md."""
    projections = [(k, f"{100 * fmean(errors):.1f} %") for k, errors in record["projections"].items()]
    draws = [
        (
            d,
            str(8 * int(d)),
            f"{100 * fmean(row['error'] for row in rows):.1f} %",
            f"{fmean(row['condition_ratio'] for row in rows):.2f}",
        )
        for d, rows in record["draws"].items()
    ]
    header = ("draws of A (rank 8)", "rows", "error against its expectation", "condition number, estimate / exact")
    return as_page(
        [
            "# How good the estimates are",
            f"MiniLM (pretrained, a new head of 8 logits), {record['examples']} package descriptions, "
            f"{record['rows']} rows, all linear modules; means over {record['seeds']} seeds.",
            markdown_table(("random projections k", "error of the trace kernel"), projections, right=(0, 1)),
            markdown_table(header, draws, right=range(4)),
            "The condition number is taken with a ridge of 1e-3 mean eigenvalues. The sketch does not preserve it.",
            provenance(record),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--projections", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    add_output(parser)
    options = parser.parse_args(argv)
    found = measure(load_task(), options.examples, options.projections, options.draws, options.seeds)
    command = command_line(MODULE, argv if argv is not None else sys.argv[1:])
    record = {**found, "examples": options.examples, "seeds": options.seeds, **circumstances(command, options.date)}
    folders = Folders.of("benchmarks/ntk_estimates", "ntk_estimates", options.output)
    save_json(folders.runs / "results.json.gz", record)
    save_text(folders.summary / "README.md", report(record))
    print(report(record))
    return 0
