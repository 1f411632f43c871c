# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How good the estimates are: random projections of the outputs, draws of LoRA's random A, against exact kernels.

    python examples/benchmarks/ntk_estimates.py --output docs/measurements/ntk_estimates

Model and text are the demo's (MiniLM, topics of Debian packages). Errors are relative, in Frobenius norm, of the
kernel summed over all modules.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path
from statistics import fmean


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import Task, load_task
from torch import Tensor

from peft_linear import ModuleKernels, Spectrum, compute_ntk
from peft_linear.functional.outputs import RandomProjection


def trace_kernel(kernels: ModuleKernels) -> Tensor:
    """Σ_a K_aa, (N, N): the kernel summed over outputs."""
    n, c = kernels.num_examples, kernels.num_outputs
    return kernels.subset().view(n, c, n, c).diagonal(dim1=1, dim2=3).sum(-1)


def error(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).norm() / exact.norm())


def condition_number(gram: Tensor) -> float:
    """With a ridge of 1e-3 mean eigenvalues, so that it says something for singular kernels too."""
    return Spectrum.from_gram(gram, eps=1e-12).condition_number(1e-3 * float(gram.trace()) / len(gram))


def measure(task: Task, examples: int, projections: list[int], draws: list[int], seeds: int) -> dict:
    model, batches = task.new_model(0), task.calibration(examples)
    options = {"always_trained": (), "progress": False}
    projected: dict[int, list[float]] = {k: [] for k in projections}
    for seed in range(seeds):
        exact = trace_kernel(compute_ntk(model, batches, seed=seed, **options))
        for k in projections:
            estimate = compute_ntk(model, batches, outputs=RandomProjection(k), seed=seed, **options)
            projected[k].append(error(trace_kernel(estimate), exact))
    weight = compute_ntk(model, batches, space="weight", **options)
    expected = sum(
        (weight[name] * 16.0**2 / (3 * 8 * weight.shapes[name][0]) for name in weight.names),
        torch.zeros_like(weight.base),
    )
    sketched: dict[int, list[dict[str, float]]] = {}
    for d in draws:
        for s in range(seeds):
            kernels = compute_ntk(model, batches, rank=8, lora_alpha=16, draws=d, seed=s, **options)
            row = {
                "error": error(kernels.subset(), expected),
                "condition_ratio": condition_number(kernels.subset()) / condition_number(expected),
            }
            sketched.setdefault(d, []).append(row)
    return {"projections": projected, "draws": sketched, "rows": weight.outputs.numel()}


def render(found: dict, about: str) -> str:
    lines = ["# How good the estimates are", "", about, "", "| random projections k | error of the trace kernel |"]
    lines += ["|---|---|"]
    lines += [f"| {k} | {100 * fmean(v):.1f} % |" for k, v in found["projections"].items()]
    lines += [
        "",
        "| draws of A (rank 8) | rows | error against its expectation | condition number, estimate / exact |",
    ]
    lines += ["|---|---|---|---|"]
    for d, rows in found["draws"].items():
        errors, ratios = [r["error"] for r in rows], [r["condition_ratio"] for r in rows]
        lines.append(f"| {d} | {8 * d} | {100 * fmean(errors):.1f} % | {fmean(ratios):.2f} |")
    lines += [
        "",
        "The condition number is taken with a ridge of 1e-3 mean eigenvalues. The sketch does not preserve it.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--projections", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    found = measure(load_task(), arguments.examples, arguments.projections, arguments.draws, arguments.seeds)
    about = (
        f"MiniLM (pretrained, a fresh head of 8 logits), {arguments.examples} package descriptions, "
        f"{found['rows']} rows, all linear modules; means over {arguments.seeds} seeds. "
        f"{platform.machine()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
        f"{date.today().isoformat()}. Command: "
        "`python examples/benchmarks/ntk_estimates.py --output docs/measurements/ntk_estimates`"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.output / "README.md").write_text(render(found, about))
    print(render(found, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
