# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Do the criteria rank modules as training does? Every candidate is trained alone; ranks are then compared.

    python -m examples.benchmarks.criteria_vs_training
    python -m examples.benchmarks.criteria_vs_training --dataset debian_pairs --output pairs

For each seed (it decides the head's random weights, LoRA's A and the order of the batches) the criteria are computed
from kernels of calibration examples before training, and compared with the test loss after it: Spearman's rank
correlation over the modules, averaged over the seeds, with a bootstrap interval over the modules. A positive number
means that modules which the criterion prefers train better. Recorded runs and scores are not computed again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from examples.benchmarks.criteria_vs_training.figure import draw
from examples.benchmarks.criteria_vs_training.training import ALL_LINEAR, HEAD_ONLY, Protocol, Run, measure
from examples.common.correlation import Correlation, correlate
from examples.common.files import save_json, save_text
from examples.common.records import Records
from examples.common.reports import Folders, add_output, as_page, circumstances, command_line, setting_table
from examples.common.tasks import DEMO_DATASET, DEMO_MODEL, SPLITS, Task, load_task
from peft_linear import compute_ntk
from peft_linear.capture.targets import resolve_always_trained, resolve_targets
from peft_linear.functional.simulation import SMOOTHNESS
from peft_linear.report.markdown import markdown_table
from peft_linear.selection.criteria import CRITERIA, View, applicable_criteria, score_modules
from peft_linear.selection.problem import Problem
from peft_linear.selection.views import default_ridge


MODULE = "examples.benchmarks.criteria_vs_training"
SPACES = ("lora", "weight")

Scores = dict[tuple[str, int], dict[str, dict[str, float]]]  # (space, seed): {criterion: {module: score}}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    folders = Folders.of("benchmarks/criteria_vs_training", "criteria_minilm_topics", options.output)
    protocol = Protocol(steps=options.steps, learning_rate=options.learning_rate)
    data = {"model": options.model, "dataset": options.dataset}
    runs_file = Records(folders.runs / "runs.jsonl", {**data, "protocol": asdict(protocol)}, ("module", "seed"))
    scores_file = Records(folders.runs / "scores.jsonl", {**data, "examples": options.examples}, ("space", "seed"))
    task = load_task(options.model, options.dataset, limits=options.limits)
    model = task.new_model(0)
    modules = list(resolve_targets(model, options.targets, reserved=resolve_always_trained(model)))
    runs = measure(task, modules, options.seeds, protocol, runs_file)
    scores = {
        (space, seed): score(task, seed, space, options, scores_file)
        for seed in options.seeds
        for space in options.spaces
    }
    runs_file.pack()
    scores_file.pack()
    results = analyse(runs, scores, modules, options.seeds)
    noise = seed_agreement(runs, modules, options.seeds)
    write(folders, setting_of(options, protocol, runs), results, noise, runs)
    draw(results, runs, scores, folders.summary / "figure.png")
    print((folders.summary / "README.md").read_text(encoding="utf-8"))
    return 0


def score(
    task: Task, seed: int, space: str, options: argparse.Namespace, records: Records
) -> dict[str, dict[str, float]]:
    """{criterion: {module: score}} of the model of a seed, signed by `utility`: higher is better."""
    if (space, seed) not in records:
        batches = task.calibration(options.examples, seed=seed)
        kernels = compute_ntk(task.new_model(seed), batches, options.targets, space=space, seed=seed)
        rate = kernels.num_examples / SMOOTHNESS["cross_entropy"] / float(kernels.spectrum().eigenvalues[0])
        problem = Problem.of(kernels, default_ridge(kernels), learning_rate=rate)
        scores = {}
        for name in applicable_criteria(problem):
            criterion = CRITERIA[name]
            values = score_modules(View(kernels, problem), criterion)
            scores[name] = {module: criterion.utility(value) for module, value in values.items()}
        scores["parameters"] = {name: float(count) for name, count in kernels.num_parameters.items()}
        records.add({"space": space, "seed": seed, "ridge": problem.ridge, "scores": scores})
    return records[space, seed]["scores"]


def analyse(
    runs: Sequence[Run], scores: Scores, modules: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[str, Correlation]]:
    """{space: {criterion: correlation with the test loss}}, best criterion first."""
    quality = {(run.module, run.seed): -run.test_loss for run in runs}
    truth = [[quality[module, seed] for module in modules] for seed in seeds]
    results: dict[str, dict[str, Correlation]] = {}
    for space in dict.fromkeys(space for space, _ in scores):
        of_space = {
            name: correlate([[scores[space, seed][name][module] for module in modules] for seed in seeds], truth)
            for name in scores[space, seeds[0]]
        }
        results[space] = dict(sorted(of_space.items(), key=lambda item: -item[1].mean))
    return results


def seed_agreement(runs: Sequence[Run], modules: Sequence[str], seeds: Sequence[int]) -> Correlation | None:
    """How well the losses of one seed rank those of the next: no criterion can be expected to do better."""
    quality = {(run.module, run.seed): -run.test_loss for run in runs}
    table = [[quality[module, seed] for module in modules] for seed in seeds]
    return correlate(table[:-1], table[1:]) if len(seeds) > 1 else None


def setting_of(options: argparse.Namespace, protocol: Protocol, runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that is needed to repeat the measurement."""
    return {
        "model": options.model,
        "dataset": options.dataset,
        "protocol": asdict(protocol),
        "seeds": options.seeds,
        "calibration_examples": options.examples,
        **circumstances(command_line(MODULE, options.command), options.date),
        "seconds_of_training": round(sum(run.seconds for run in runs)),
    }


def write(
    folders: Folders,
    setting: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Correlation]],
    noise: Correlation | None,
    runs: Sequence[Run],
) -> None:
    """results.json, and README.md with the table."""
    record = {
        **setting,
        "agreement_of_seeds": noise and asdict(noise),
        "spearman": {space: {name: asdict(c) for name, c in of.items()} for space, of in results.items()},
    }
    save_json(folders.full / "results.json", record)
    names = list(results[next(iter(results))])
    rows = [(f"`{name}`", *(str(of[name]) for of in results.values())) for name in names]
    header = ("criterion", *(f'space="{space}"' for space in results))
    losses = [
        (words, *(f"{run.test_loss:.3f}" for run in sorted(runs, key=lambda r: r.seed) if run.module == label))
        for words, label in (("head only", HEAD_ONLY), ("all modules", ALL_LINEAR))
    ]
    ceiling = f"The losses of one seed rank those of another with {noise}: an upper bound for every criterion."
    text = [
        f"# Criteria against training: {setting['model']}, {setting['dataset']}",
        "Spearman's rank correlation between a criterion's score of a module before training and the test loss after "
        "training LoRA on that module alone (and the head); mean over seeds, 95 % bootstrap interval over modules. "
        "Positive: modules that the criterion prefers train better.",
        markdown_table(header, rows, right=range(1, len(header))),
        ceiling if noise else "",
        "![rank correlations](figure.png)",
        markdown_table(("test loss", *(f"seed {seed}" for seed in setting["seeds"])), losses, right=(1, 2)),
        "## Setting",
        setting_table(setting),
        "Beside the program are runs.jsonl.gz and scores.jsonl.gz (signed so that higher is better).",
    ]
    save_text(folders.summary / "README.md", as_page(text))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--dataset", default=DEMO_DATASET)
    parser.add_argument("--targets", default="all-linear", help="candidates, as compute_ntk takes them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=Protocol.steps)
    parser.add_argument("--learning-rate", type=float, default=Protocol.learning_rate)
    parser.add_argument("--examples", type=int, default=64, help="calibration examples of the kernels")
    parser.add_argument("--spaces", nargs="+", default=SPACES, choices=SPACES)
    parser.add_argument(
        "--limits", type=int, nargs=3, default=(None, None, None), metavar=tuple(s.upper() for s in SPLITS)
    )
    add_output(parser)
    options = parser.parse_args(argv)
    options.command = list(argv if argv is not None else sys.argv[1:])
    return options
