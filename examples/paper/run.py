# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The experiments of "Linearization Explains Fine-Tuning in Large Language Models" (arXiv 2602.08239), run again.

    python -m examples.paper                                   # MiniLM, shipped texts: an hour on a core
    python -m examples.paper --model roberta-base --task cola  # the paper's model and data, where there is a Hub
    python -m examples.paper --task cola --data my_cola        # the same columns from a file or folder
    python -m examples.paper --quick --output paper_quick      # every step in seconds, too short to mean anything

Experiment A (`--experiment lambda`): λ against ‖θ−θ0‖, the gap to the linearised model, and accuracy. Experiment B
(`--experiment condition`): the condition number of the kernel, and other numbers known before training, against the
final training loss and the accuracy of LoRA on many choices of layers. Recorded runs (runs.jsonl.gz, beside this file
in a folder for each experiment) are not repeated, so that a run that was killed continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from examples.common.records import Records
from examples.common.reports import Folders, circumstances, command_line
from examples.common.tasks import DEMO_MODEL, Task
from examples.paper import condition, condition_report, strength, strength_report
from examples.paper.claims import Experiment, write_report
from examples.paper.figures import draw_condition, draw_lambda
from examples.paper.predictors import layer_choices
from examples.paper.tasks import TASKS, load_paper_task
from examples.paper.training import Protocol, projections_by_layer


MODULE = "examples.paper"
LAMBDAS = (0.0, 0.5, 5.0, 50.0, 500.0, 5e3)  # with the two values that the paper names, 5 and 50
SMALL = {"protocol": Protocol(), "limits": (128, 8, 300), "max_length": 48}
PAPERS = {"protocol": Protocol(batch_size=64, dropout=True), "limits": (None, None, None), "max_length": 512}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    task = load_paper_task(options.model, options.task, options.data, options.max_length, options.limits)
    layers = projections_by_layer(task.new_model(0))
    for name, experiment in {"lambda": run_lambda, "condition": run_condition}.items():
        if options.experiment in (name, "all"):
            folder = experiment(task, layers, options)
            print((folder / "README.md").read_text(encoding="utf-8"))
    return 0


def folders_of(name: str, options: argparse.Namespace) -> Folders:
    """Of one experiment."""
    return Folders.of(f"paper/{name}", name, options.output and options.output / name, options.quick)


def run_lambda(task: Task, layers: Mapping[int, tuple[str, ...]], options: argparse.Namespace) -> Path:
    folders = folders_of("paper_lambda_trained_head" if options.head_epochs else "paper_lambda", options)
    chosen = list(layers) if options.layers is None else options.layers
    unknown = sorted(set(chosen) - set(layers))
    if unknown:
        raise SystemExit(f"the model has no layers {unknown}; there are {list(layers)}")
    names = [name for layer in chosen for name in layers[layer]]
    setting = {**common_setting(task, options), "layers": chosen, "loss": strength.LOSS, "optimizer": "AdamW"}
    setting["head_epochs"] = options.head_epochs or None
    records = Records(folders.runs / "runs.jsonl", setting, ("pulled", "pull", "seed"))
    runs = strength.measure(
        task, names, options.lambdas, options.lambda_seeds, options.protocol, records, options.head_epochs
    )
    records.pack()
    experiment = Experiment(
        title=f"λ against distance, linearity and accuracy: {options.model}, {task.dataset_name}",
        claims=strength_report.claims(runs, len(task.test)),
        figure="λ against distance, gap and accuracy",
        short=strength_report.short_sections(runs),
        sections=strength_report.sections(runs, options.lambda_seeds),
        results=strength_report.summary(runs),
    )
    write_report(folders, experiment, setting | how_it_ran(runs, options.lambda_seeds, options))
    draw_lambda(runs, folders.summary / "figure.png")
    return folders.summary


def run_condition(task: Task, layers: Mapping[int, tuple[str, ...]], options: argparse.Namespace) -> Path:
    folders = folders_of("paper_condition_number", options)
    setting = {**common_setting(task, options), "calibration_examples": options.examples}
    records = Records(folders.runs / "runs.jsonl", setting, ("choice", "loss", "optimizer", "seed"))
    choices = layer_choices(list(layers), options.choices)
    runs = condition.measure(
        task, layers, choices, options.condition_seeds, options.protocol, options.examples, records
    )
    records.pack()
    tables, within = condition.analyse(runs), condition.analyse(runs, within=True)
    experiment = Experiment(
        title=f"Condition number against the loss that training reached: {options.model}, {task.dataset_name}",
        claims=condition.claims(tables, len(choices)),
        figure="condition number and other predictors against the loss that training reached",
        short=condition_report.short_sections(tables),
        sections=condition_report.sections(runs, tables, within, options.condition_seeds),
        results=condition_report.summary(tables, within),
    )
    setting["choices_of_layers"] = choices
    write_report(folders, experiment, setting | how_it_ran(runs, options.condition_seeds, options))
    draw_condition(runs, tables, folders.summary / "figure.png")
    return folders.summary


def common_setting(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """What results in one folder must have in common."""
    return {
        "model": options.model,
        "task": task.dataset_name,
        "classes": task.labels,
        "examples": {split: len(getattr(task, split)) for split in ("train", "test")},
        "max_length": options.max_length,
        "protocol": asdict(options.protocol),
        "steps": options.protocol.steps(task),
    }


def how_it_ran(runs: Sequence[Mapping[str, Any]], seeds: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    seconds = round(sum(run["seconds"] for run in runs))
    about = circumstances(command_line(MODULE, options.command), options.date)
    return {"seeds": seeds, "seconds": seconds, **about}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEMO_MODEL, help='"minilm", a folder, or a name on the Hub')
    add("--task", default="topics2", choices=TASKS)
    add("--data", help="a file or folder with the columns of --task, in place of the Hub")
    add("--experiment", default="all", choices=("lambda", "condition", "all"))
    add("--output", type=Path, help="a folder with one for each experiment (default: docs/measurements)")
    add("--lambdas", type=float, nargs="+", default=list(LAMBDAS))
    add("--lambda-seeds", type=int, nargs="+", default=[0, 1])
    add("--layers", type=int, nargs="+", help="of experiment A (default: all)")
    add("--head-epochs", type=int, default=0, help="in A, the new head is first trained alone so long")
    add("--choices", type=int, default=24, help="choices of layers in experiment B")
    add("--condition-seeds", type=int, nargs="+", default=[0])
    add("--examples", type=int, default=32, help="calibration examples of the kernel")
    add("--limits", type=count, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"), help='examples to keep; "all"')
    add("--max-length", type=int, help="tokens of an example")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--learning-rate", type=float, help="of AdamW")
    add("--dropout", action=argparse.BooleanOptionalAction)
    add("--quick", action="store_true", help="every step, but too short to mean anything")
    add("--date", help="of the report (default: today)")
    options = parser.parse_args(argv)
    options.command = list(argv if argv is not None else sys.argv[1:])
    if options.quick:
        options.lambdas, options.lambda_seeds, options.condition_seeds = [0.0, 50.0], [0], [0]
        options.choices, options.examples = 3, 8
        options.limits, options.max_length = options.limits or (32, 4, 16), options.max_length or 24
        options.epochs = options.epochs or 1
    defaults = SMALL if TASKS[options.task].shipped or options.quick else PAPERS
    options.limits = options.limits or defaults["limits"]
    options.max_length = options.max_length or defaults["max_length"]
    given = ("epochs", "batch_size", "learning_rate", "dropout")
    changes = {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    options.protocol = replace(defaults["protocol"], **changes)
    return options


def count(text: str) -> int | None:
    """A number, or None for "all"."""
    return None if text == "all" else int(text)
