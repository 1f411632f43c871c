# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Loss curves predicted before training, and measured ones: MiniLM on topics of Debian packages, at several λ.

    python -m examples.benchmarks.predicted_curves
    python -m examples.benchmarks.predicted_curves --report-only              # report and figures of what is recorded
    python -m examples.benchmarks.predicted_curves --quick --output curves    # every step in seconds

For the modules that the demo recommends, the linearised model is trained with SGD in kernel space and with AdamW on
the Jacobian's rows; then ProximalLoRA (not selective) is trained with the same batches and learning rates. The report
shows both on one plot, the linearization gap, and how well the gap predicts the error of the prediction.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from examples.benchmarks.predicted_curves.figure import draw, draw_thresholds
from examples.benchmarks.predicted_curves.report import report
from examples.benchmarks.predicted_curves.training import Method, Protocol, prepare, run
from examples.common.files import read_json, save_json, save_text
from examples.common.reports import Folders, add_output, circumstances, command_line
from examples.common.tasks import DEMO_DATASET, DEMO_MODEL, Task, load_task
from peft_linear import compute_ntk, recommend
from peft_linear.selection.baselines.by_kernels import query_value


MODULE = "examples.benchmarks.predicted_curves"
PULLS = (0.0, 0.8, 3.2, 12.8, 51.2)  # λ·Σ_t η_t: over the run, exp(−that) of a displacement without gradient is left


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    folders = Folders.of("benchmarks/predicted_curves", "predicted_curves", options.output, options.quick)
    file = folders.runs / "results.json.gz"
    if not options.report_only:
        save_json(file, measure(options))
    publish(read_json(file), folders)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Predicts and trains everything."""
    began = time.perf_counter()
    task = load_task(options.model, options.dataset, limits=(options.train, 16, options.held_out))
    protocol = Protocol(options.steps, options.batch_size, options.evaluate_every, rank=8, seed=options.seed)
    modules = options.modules or recommended(task, protocol.seed, options.calibration)
    problem = prepare(task, tuple(modules), protocol)
    print(problem.train, *modules, sep="\n")
    methods = make_methods(options, protocol)
    seconds = {"before_training": time.perf_counter() - began}
    runs = []
    with tqdm(total=protocol.steps * sum(len(method.ridges) for method in methods), unit="step") as bar:
        for method in methods:
            for ridge in method.ridges:
                done = run(problem, method, ridge, protocol, bar)
                bar.write(f"{method.label}, λ = {ridge:g}: {done.report['verdict']}")
                runs.append(done)
    seconds["all"] = time.perf_counter() - began
    return {
        "model": options.model,
        "dataset": options.dataset,
        "modules": list(modules),
        "train_examples": len(task.train),
        "held_out_examples": len(task.test),
        "protocol": vars(protocol),
        "methods": [
            {"key": m.key, "label": m.label, "learning_rate": m.learning_rate, "ridges": m.ridges} for m in methods
        ],
        "sums_of_learning_rates": {m.key: protocol.sum_of_rates(m) for m in methods},
        "runs": [done.to_dict() for done in runs],
        "seconds": {name: round(value) for name, value in seconds.items()},
        **circumstances(command_line(MODULE, options.command), options.date),
    }


def publish(record: Mapping[str, Any], folders: Folders) -> None:
    """Figures and report."""
    text = report(record)
    save_text(folders.summary / "README.md", text)
    draw(record, folders.summary / "figure.png")
    draw_thresholds(record, folders.summary / "gap.png")
    print(text)


def recommended(task: Task, seed: int, examples: int) -> tuple[str, ...]:
    """What the demo recommended when this was first measured: as many parameters as query and value take."""
    kernels = compute_ntk(task.new_model(seed), task.calibration(examples), progress=False)
    baseline = [name for name in kernels.names if name in query_value(kernels)]
    budget = str(sum(kernels.num_parameters[name] for name in baseline))
    return recommend(kernels, budget, criterion="gradient_energy").modules


def make_methods(options: argparse.Namespace, protocol: Protocol) -> list[Method]:
    """λ of each optimizer so that the pull over the run, λ·Σ η, is the same for both."""
    methods = []
    for key, label, rate, optimizer, arguments in (
        ("adamw", "AdamW", options.adamw_rate, torch.optim.AdamW, {"weight_decay": 0.0}),
        ("sgd", "SGD", options.sgd_rate, torch.optim.SGD, {}),
    ):
        bare = Method(key, label, rate, optimizer, arguments, ())
        ridges = tuple(float(f"{pull / protocol.sum_of_rates(bare):.2g}") for pull in options.pulls)
        methods.append(Method(key, label, rate, optimizer, arguments, ridges))
    return methods


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--dataset", default=DEMO_DATASET)
    parser.add_argument("--modules", nargs="+", help="default: what the demo recommends")
    parser.add_argument("--calibration", type=int, default=64, help="examples that the recommendation is made on")
    parser.add_argument("--train", type=int, default=128, help="examples")
    parser.add_argument("--held-out", type=int, default=128, help="examples")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--evaluate-every", type=int, default=20)
    parser.add_argument("--adamw-rate", type=float, default=1e-3)
    parser.add_argument("--sgd-rate", type=float, default=0.2)
    parser.add_argument("--pulls", type=float, nargs="+", default=PULLS, help="λ times the sum of the learning rates")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    parser.add_argument("--report-only", action="store_true", help="report and figures of what is recorded")
    parser.add_argument("--quick", action="store_true", help="two modules, a few examples and steps, two λ")
    options = parser.parse_args(argv)
    options.command = list(argv if argv is not None else sys.argv[1:])
    if options.quick:
        options.train = options.held_out = 16
        options.steps, options.evaluate_every, options.batch_size = 4, 2, 8
        options.pulls = (0.0, 4.0)
        layer = "bert.encoder.layer.5"
        options.modules = [f"{layer}.attention.self.value", f"{layer}.output.dense"]
    return options
