# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Do ranks by effective dimension train better than one rank for all modules, and than those that EVA distributes?

    python -m examples.benchmarks.adaptive_ranks                               # all of it: an hour of a core
    python -m examples.benchmarks.adaptive_ranks --tasks digits --seeds 0      # a part; recorded runs are kept
    python -m examples.benchmarks.adaptive_ranks --quick --output ranks_quick  # every step in seconds

Every linear module is adapted, with three ways to share out the same parameters: the uniform rank, the ranks of
`to_config(r="adaptive")`, and the ranks of peft's own EVA (its initialisation is not used, so that ranks alone
differ; its parameters are as many as it makes them). Trained as the selection benchmark's last view: learning rate
tuned for each arm on validation data with the first seed, decaying linearly. Runs are recorded in
truth_<task>.jsonl.gz beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.benchmarks.selection.scores import SCORE_SEED, count_examples
from examples.benchmarks.selection.sets import Configuration
from examples.benchmarks.selection.tasks import QUICK_SIZES, TASKS, SelectionTask, Sizes
from examples.benchmarks.selection.training import DECAYED, Protocol, quick
from examples.benchmarks.selection.truth import Truth, measure
from examples.common.files import save_json, save_text
from examples.common.reports import Folders, add_output, as_page, circumstances, command_line, setting_table
from peft_linear import compute_ntk
from peft_linear.report.markdown import markdown_table
from peft_linear.selection import default_ridge, distribute_ranks, effective_dimensions, model_scores


MODULE = "examples.benchmarks.adaptive_ranks"
ARMS = ("uniform", "adaptive", "EVA")
RANKS = (2, 4)


def arms(task: SelectionTask, rank: int, protocol: Protocol) -> dict[str, dict[str, int]]:
    """{arm: {module: rank}} for the parameters of this uniform rank; modules of rank 0 are left out."""
    model = task.make_model(SCORE_SEED)
    batches = task.calibration(count_examples(task, model), SCORE_SEED)
    alpha = protocol.lora_alpha / protocol.rank * rank  # the same scaling at every rank
    kernels = compute_ntk(
        model, batches, rank=rank, lora_alpha=alpha, outputs=task.outputs, seed=SCORE_SEED, progress=False
    )
    dimensions = effective_dimensions(kernels, kernels.names, default_ridge(kernels))
    by_eva = model_scores("eva", model, batches, rank=rank, lora_alpha=alpha, seed=SCORE_SEED)
    return {
        "uniform": dict.fromkeys(task.modules, rank),
        "adaptive": distribute_ranks(dimensions, kernels.shapes, task.parameters(list(task.modules), rank)),
        "EVA": {name: int(value) for name, value in by_eva.items() if value},
    }


def configurations(task: SelectionTask, ranks: Sequence[int], protocol: Protocol) -> dict[str, Configuration]:
    found = {}
    for rank in ranks:
        for arm, of_modules in arms(task, rank, protocol).items():
            names = tuple(name for name in task.modules if name in of_modules)
            key = f"rank {rank}, {arm}"
            found[key] = Configuration(key, names, tuple(of_modules[name] for name in names))
    return found


def parameters(task: SelectionTask, configuration: Configuration) -> int:
    assert configuration.ranks is not None
    pairs = zip(configuration.modules, configuration.ranks, strict=True)
    return sum(task.parameters([name], rank) for name, rank in pairs)


def row_of(truth: Truth, configuration: Configuration, seeds: Sequence[int]) -> dict[str, Any] | None:
    """What one arm reached; None where runs are missing."""
    losses = truth.losses(configuration, seeds)
    if losses is None:
        return None
    (steps,) = truth.protocol.steps
    assert configuration.ranks is not None
    return {
        "parameters": parameters(truth.task, configuration),
        "ranks": [min(configuration.ranks), max(configuration.ranks)],
        "modules": len(configuration.modules),
        "losses": losses[steps],
    }


def report(results: Mapping[str, Mapping[str, Mapping[str, Any]]], setting: Mapping[str, Any]) -> str:
    """Tables in Markdown; differences to the uniform rank are paired by seed."""
    parts = ["# Ranks by effective dimension against a uniform rank and EVA's"]
    for task, rows in results.items():
        body = []
        for key, row in rows.items():
            uniform = rows.get(f"{key.split(', ')[0]}, uniform")
            difference = "–"
            if uniform is not None and uniform is not row:
                apart = [a - b for a, b in zip(row["losses"], uniform["losses"], strict=True)]
                difference = f"{statistics.fmean(apart):+.3f} ± {spread(apart)}"
            low, high = row["ranks"]
            body.append(
                (
                    key,
                    f"{row['parameters']:,}",
                    f"{low} to {high}" if low != high else str(low),
                    str(row["modules"]),
                    f"{statistics.fmean(row['losses']):.3f} ± {spread(row['losses'])}",
                    difference,
                )
            )
        seeds = len(next(iter(rows.values()))["losses"])
        header = ("arm", "parameters", "ranks", "modules", "test loss", "difference to the uniform rank")
        parts += [f"## {task}, {seeds} seeds", markdown_table(header, body, right=range(1, 6))]
    parts += [
        "Mean ± standard deviation over seeds; differences are of the same seed.",
        "## Setting",
        setting_table(setting),
    ]
    return as_page(parts)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.stdev(values):.3f}" if len(values) > 1 else "?"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "topics"], choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first tunes the learning rates")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="uniform ranks")
    parser.add_argument("--cache", type=Path, default=Path("build/models"))
    parser.add_argument("--quick", action="store_true", help="every step, but too short to mean anything")
    add_output(parser)
    options = parser.parse_args(argv)
    folders = Folders.of("benchmarks/adaptive_ranks", "adaptive_ranks", options.output, options.quick)
    sizes, protocol = Sizes(), DECAYED
    if options.quick:
        sizes, protocol = QUICK_SIZES, quick(DECAYED)
        options.ranks, options.seeds = options.ranks[:1], options.seeds[:2]
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for key in options.tasks:
        task = TASKS[key](sizes, options.cache)
        truth = Truth.at(folders.runs / f"truth_{key}.jsonl", task, protocol, sizes)
        of_arms = configurations(task, options.ranks, protocol)
        measure(truth, of_arms.values(), options.seeds)
        truth.records.pack()
        rows = {name: row_of(truth, configuration, options.seeds) for name, configuration in of_arms.items()}
        results[key] = {name: row for name, row in rows.items() if row is not None}
    command = command_line(MODULE, argv if argv is not None else sys.argv[1:])
    about = {"protocol": protocol.setting(), "sizes": asdict(sizes), **circumstances(command, options.date)}
    text = report(results, about)
    save_text(folders.summary / "README.md", text)
    save_json(folders.full / "results.json", {**about, "results": results})
    print(text)
    return 0
