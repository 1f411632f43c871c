# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Do the criteria rank modules as training does? Every candidate is trained alone; ranks are then compared.

    python examples/benchmarks/criteria_vs_training.py --output docs/measurements/criteria_minilm_topics
    python examples/benchmarks/criteria_vs_training.py --dataset debian_pairs --output pairs

For each seed (it decides the head's random weights, LoRA's A and the order of the batches) the criteria are computed
from kernels of calibration examples before training, and compared with the test loss after it: Spearman's rank
correlation over the modules, averaged over the seeds, with a bootstrap interval over the modules. A positive number
means that what the criterion calls better trains better. Finished work is kept: runs.jsonl and scores.jsonl grow, and
what they hold is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/common.py, from wherever this is started

import torch
from common import DEMO_DATASET, DEMO_MODEL, SPLITS, Task, load_task
from correlation import Correlation, correlate
from criteria_figure import draw
from single_modules import ALL_LINEAR, HEAD_ONLY, Protocol, Run, measure

from peft_linear import compute_ntk
from peft_linear.capture.targets import resolve_always_trained, resolve_targets
from peft_linear.functional.simulation import SMOOTHNESS
from peft_linear.report.markdown import markdown_table
from peft_linear.selection.criteria import CRITERIA, applicable_criteria, score_modules
from peft_linear.selection.problem import Problem
from peft_linear.selection.recommend import default_ridge


SPACES = ("lora", "weight")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = Path(options.output)
    protocol = Protocol(steps=options.steps, learning_rate=options.learning_rate)
    task = load_task(options.model, options.dataset, limits=options.limits)
    model = task.new_model(0)
    modules = list(resolve_targets(model, options.targets, reserved=resolve_always_trained(model)))
    runs = measure(task, modules, options.seeds, protocol, output / "runs.jsonl")
    scores = score(task, options.seeds, options.examples, options.targets, options.spaces, output / "scores.jsonl")
    results = analyse(runs, scores, modules, options.seeds)
    noise = seed_agreement(runs, modules, options.seeds)
    write(output, options, protocol, results, noise, runs)
    draw(results, runs, scores, output / "figure.png")
    print((output / "README.md").read_text(encoding="utf-8"))
    return 0


def score(
    task: Task, seeds: Sequence[int], examples: int, targets: str, spaces: Sequence[str], path: Path
) -> dict[tuple[str, int], dict[str, dict[str, float]]]:
    """{(space, seed): {criterion: {module: score}}} of the model of each seed, `utility` signed: higher is better."""
    found = {}
    if path.is_file():
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = {(r["space"], r["seed"]): r["scores"] for r in records if r["examples"] == examples}
    for seed in seeds:
        batches = task.calibration(examples, seed=seed)
        for space in spaces:
            if (space, seed) in found:
                continue
            kernels = compute_ntk(task.new_model(seed), batches, targets, space=space, seed=seed)
            rate = kernels.num_examples / SMOOTHNESS["cross_entropy"] / float(kernels.spectrum().eigenvalues[0])
            problem = Problem.of(kernels, default_ridge(kernels), learning_rate=rate)
            scores = {}
            for name in applicable_criteria(problem):
                criterion = CRITERIA[name]
                values = score_modules(kernels, criterion, problem)
                scores[name] = {module: criterion.utility(value) for module, value in values.items()}
            scores["parameters"] = {name: float(count) for name, count in kernels.num_parameters.items()}
            with path.open("a", encoding="utf-8") as lines:
                record = {"space": space, "seed": seed, "examples": examples, "ridge": problem.ridge, "scores": scores}
                lines.write(json.dumps(record) + "\n")
            found[space, seed] = scores
    return {key: value for key, value in found.items() if key[0] in spaces and key[1] in seeds}


def analyse(
    runs: Sequence[Run], scores: Mapping, modules: Sequence[str], seeds: Sequence[int]
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


def write(
    output: Path,
    options: argparse.Namespace,
    protocol: Protocol,
    results: Mapping[str, Mapping[str, Correlation]],
    noise: Correlation | None,
    runs: Sequence[Run],
) -> None:
    """results.json and README.md: the table, and everything that is needed to repeat it."""
    setting = {
        "model": options.model,
        "dataset": options.dataset,
        "protocol": asdict(protocol),
        "seeds": options.seeds,
        "calibration_examples": options.examples,
        "command": "python examples/benchmarks/criteria_vs_training.py " + " ".join(options.command),
        "date": options.date or date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads used",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "seconds_of_training": round(sum(run.seconds for run in runs)),
    }
    record = {
        **setting,
        "agreement_of_seeds": noise and asdict(noise),
        "spearman": {space: {name: asdict(c) for name, c in of.items()} for space, of in results.items()},
    }
    (output / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    names = list(results[next(iter(results))])
    rows = [(f"`{name}`", *(str(of[name]) for of in results.values())) for name in names]
    table = markdown_table(
        ("criterion", *(f'space="{space}"' for space in results)), rows, right=range(1, 1 + len(results))
    )
    losses = [
        (words, *(f"{run.test_loss:.3f}" for run in sorted(runs, key=lambda r: r.seed) if run.module == label))
        for words, label in (("head only", HEAD_ONLY), ("all modules", ALL_LINEAR))
    ]
    ceiling = (
        f"The losses of one seed rank those of another with {noise}: a criterion can hardly do better."
        if noise
        else ""
    )
    text = [
        f"# Criteria against training: {options.model}, {options.dataset}",
        "Spearman's rank correlation between what a criterion says of a module before training and the test loss "
        "after training LoRA on that module alone (and the head); mean over seeds, 95 % bootstrap interval over "
        "modules. Positive: what the criterion prefers trains better.",
        table,
        ceiling,
        "![rank correlations](figure.png)",
        markdown_table(("test loss", *(f"seed {seed}" for seed in options.seeds)), losses, right=(1, 2)),
        "## Setting",
        markdown_table(("", ""), [(key, str(value)) for key, value in setting.items()]),
        "Runs are in runs.jsonl, the scores of every module in scores.jsonl (signed so that higher is better).",
    ]
    (output / "README.md").write_text("\n\n".join(part for part in text if part) + "\n", encoding="utf-8")


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
    parser.add_argument("--date", help="of the report (default: today)")
    parser.add_argument("--output", default="docs/measurements/criteria_minilm_topics")
    options = parser.parse_args(argv)
    options.command = list(argv if argv is not None else sys.argv[1:])
    return options


if __name__ == "__main__":
    sys.exit(main())
