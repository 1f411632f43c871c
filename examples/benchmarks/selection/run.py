# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which way to choose modules finds those that train best? Every way against fine-tuned sets of modules.

    python -m examples.benchmarks.selection                                    # everything: many hours of a core
    python -m examples.benchmarks.selection --tasks topics --seeds 0           # a part; recorded runs are kept
    python -m examples.benchmarks.selection --report-only                      # tables and figures of what is recorded
    python -m examples.benchmarks.selection --quick --output selection_quick   # every step in seconds

Ground truth: every module alone and some fifty sets are fine-tuned on every task, at one learning rate for all and
with a rate tuned for each on validation data, for a short and a long budget of steps; and once more, longer, in larger
batches, with a tuned rate that decays linearly as the HF Trainer's does. Before training, every criterion and every
baseline scores the same modules and sets. Reported: rank correlations, regret of the picks, calibration of predicted
losses, time. Criteria were developed on the tasks of the family "validation" only, those of the family "test" were
kept for the end.

Runs are recorded in truth_<task>.jsonl.gz beside this file, scores in scores_<task>.jsonl.gz: a measurement that was
killed continues where it stopped, and several processes may work on different --tasks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from examples.benchmarks.selection.analysis import by_rate, measured
from examples.benchmarks.selection.figure import draw
from examples.benchmarks.selection.page import summary_page
from examples.benchmarks.selection.picks import Chooser, Picks, as_configurations, choose, chosen_before
from examples.benchmarks.selection.report import Results, View, as_json, report
from examples.benchmarks.selection.scores import (
    DEFAULT,
    PARAMETERS,
    SCORE_SEED,
    Scores,
    measure_scores,
    scorers_of,
    table_of,
)
from examples.benchmarks.selection.sets import Configuration, configurations
from examples.benchmarks.selection.tasks import QUICK_SIZES, TASKS, SelectionTask, Sizes, sizes_for_report
from examples.benchmarks.selection.training import CONSTANT, DECAYED, quick
from examples.benchmarks.selection.truth import ONE_RATE, Truth, measure, measure_at_one_rate
from examples.common.files import save_json, save_text
from examples.common.records import Records, stored_lines
from examples.common.reports import Folders, add_output, circumstances, command_line


MODULE = "examples.benchmarks.selection"
STAGES = ("truth", "one_rate", "decayed", "decayed_one_rate", "scores", "picks", "report")
TRAINING = frozenset(STAGES[:4])  # “picks” trains with those that are asked for beside it, or with all
SHOWN_BY_RATE = (
    DEFAULT,
    "predicted_loss, AdamW (lora, 8 draws)",
    "predicted_loss, AdamW (lora, 8 draws, probed head)",
    "leave_one_out, AdamW (lora, 8 draws)",
    "gradient_energy (lora, 8 draws)",
    "condition_number (lora, 8 draws)",
    PARAMETERS,
)
CONSTANT_RATE, DECAYING_RATE = "constant", "decayed"  # the protocols
VIEWS: dict[str, tuple[str, float | None]] = {  # the protocol and the rate; None: each set's own
    "one_rate": (CONSTANT_RATE, ONE_RATE),
    "tuned": (CONSTANT_RATE, None),
    "decayed_one_rate": (DECAYING_RATE, ONE_RATE),
    "decayed": (DECAYING_RATE, None),
}


SHOWN_FIGURES = ("decayed_one_rate", "decayed")  # in docs/; the others belong to the report at full length


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    for key in options.tasks if set(options.stages) - {"report"} else ():
        task = TASKS[key](options.sizes, Path(options.cache))
        sets = configurations(task, options.protocol.rank, options.random_sets)
        truths = {name: truth_of(task, options, name) for name in options.protocols}
        records = score_records(task, options)
        train_missing(options, truths, sets, TRAINING.intersection(options.stages))
        if "scores" in options.stages:
            scored(task, sets, options, records)
        if "picks" in options.stages:
            picked = as_configurations(task, picks_of(task, sets, options, records), sets)
            train_missing(options, truths, picked, TRAINING.intersection(options.stages) or TRAINING)
        for written in (records, *(truth.records for truth in truths.values())):
            written.pack()
    if "report" in options.stages:
        publish(options)
    return 0


def train_missing(
    options: argparse.Namespace, truths: dict[str, Truth], sets: Sequence[Configuration], stages: Collection[str]
) -> None:
    """Trains what these of the stages `TRAINING` ask for."""
    constant, decayed = truths[CONSTANT_RATE], truths[DECAYING_RATE]
    if "truth" in stages:
        measure(constant, sets, options.seeds)
    if "one_rate" in stages:
        measure_at_one_rate(constant, sets, options.seeds)
    if "decayed" in stages:
        measure(decayed, sets, options.seeds)
    if "decayed_one_rate" in stages:
        measure_at_one_rate(decayed, sets, options.seeds)


def scored(
    task: SelectionTask, sets: Sequence[Configuration], options: argparse.Namespace, records: Records
) -> tuple[Scores, dict[str, float]]:
    """The table of all scores, and the seconds of each scorer."""
    found = measure_scores(task, sets, SCORE_SEED, options.protocol, records)
    seconds = {scorer: record["seconds"] for scorer, record in found.items()}
    return table_of(task, sets, found, options.protocol.rank), seconds


def picks_of(
    task: SelectionTask, sets: Sequence[Configuration], options: argparse.Namespace, records: Records
) -> Picks:
    table, _ = scored(task, sets, options, records)
    return choose(task, table, SCORE_SEED, options.protocol, records, options.selectors)


def collect(options: argparse.Namespace) -> Results:
    """What is recorded of the tasks whose single modules, at least, are trained."""
    views = {name: View(options.protocols[protocol].steps) for name, (protocol, _) in VIEWS.items()}
    rates: dict[str, Any] = {}
    for key in options.tasks:
        task = TASKS[key](sizes_for_report(options.sizes), Path(options.cache))
        sets = configurations(task, options.protocol.rank, options.random_sets)
        records = score_records(task, options)
        if not all((key, scorer, SCORE_SEED) in records for scorer in scorers_of(task)):
            print(f"{key}: not scored, left out", file=sys.stderr)
            continue
        table, seconds = scored(task, sets, options, records)
        chosen = chosen_before(task, Chooser(task, table, SCORE_SEED, options.protocol).selectors, SCORE_SEED, records)
        truths = {name: truth_of(task, options, name) for name in options.protocols}
        rates[key] = by_rate(truths[CONSTANT_RATE], sets, table, SHOWN_BY_RATE, options.seeds[0])
        for name, (protocol, rate) in VIEWS.items():
            found = view_of(truths[protocol], sets, options.seeds, rate, chosen)
            if found is None:
                print(f"{key}: too little is trained, left out of “{name}”", file=sys.stderr)
                continue
            seeds, trained, all_sets = found
            if trained:
                views[name].picks[key] = trained
            views[name].tasks.append(measured(truths[protocol], all_sets, seeds, table, seconds, rate))
    if not any(view.tasks for view in views.values()):
        raise SystemExit("nothing is finished, so there is nothing to report")
    return Results(views, rates)


def view_of(
    truth: Truth, sets: Sequence[Configuration], seeds: Sequence[int], rate: float | None, chosen: Picks
) -> tuple[Sequence[int], Picks, list[Configuration]] | None:
    """Seeds, trained picks and all sets of a task at one rate, or the tuned ones; None where too little is trained."""
    finished = most_seeds(truth, sets, seeds, rate)
    if not finished:
        return None
    trained = {name: of for name, of in chosen.items() if is_trained(truth, {name: of}, sets, finished, rate)}
    return finished, trained, [*sets, *as_configurations(truth.task, trained, sets)]


def publish(options: argparse.Namespace) -> None:
    """Summary and figures, the report at full length, and every number."""
    results = collect(options)
    setting = {
        **setting_of(options),
        "protocol with decay": options.protocols[DECAYING_RATE].setting(),
        "one learning rate": ONE_RATE,
        "hours of training": round(hours(options), 2),
        **circumstances(command_line(MODULE, options.command), options.date),
    }
    for name, view in results.views.items():
        if view.tasks:
            folder = options.folders.summary if name in SHOWN_FIGURES else options.folders.full
            folder.mkdir(parents=True, exist_ok=True)
            draw(view.tasks, view.steps, folder / f"{name}.png")
    save_text(options.folders.summary / "README.md", summary_page(results, setting, SHOWN_FIGURES))
    save_text(options.folders.full / "report.md", report(results, setting))
    save_json(options.folders.full / "results.json", as_json(results, setting))


def is_trained(
    truth: Truth, picks: Picks, sets: Sequence[Configuration], seeds: Sequence[int], rate: float | None
) -> bool:
    """Whether a selector's choices are trained for every budget, as sets of their own or ones measured anyway."""
    task = truth.task
    taken = {tuple(name for name in task.modules if name in chosen) for of in picks.values() for chosen in of.values()}
    own = as_configurations(task, picks, sets)
    return all(truth.finished(c, seeds, rate) for c in [*own, *(c for c in sets if c.modules in taken)])


def most_seeds(truth: Truth, sets: Sequence[Configuration], seeds: Sequence[int], rate: float | None) -> Sequence[int]:
    """As many seeds as are finished for all sets that the first is; none unless that is so for the single modules."""
    started = [c for c in sets if truth.finished(c, seeds[:1], rate)]
    if not all(c in started for c in sets if c.single):
        return ()
    counts = range(len(seeds), 0, -1)
    return next(seeds[:count] for count in counts if all(truth.finished(c, seeds[:count], rate) for c in started))


def hours(options: argparse.Namespace) -> float:
    """Of all recorded training runs."""
    files = [truth_file(options, key, protocol) for key in options.tasks for protocol in options.protocols]
    return sum(line.get("seconds", 0.0) for file in files for line in stored_lines(file)) / 3600


def truth_of(task: SelectionTask, options: argparse.Namespace, protocol: str) -> Truth:
    return Truth.at(truth_file(options, task.key, protocol), task, options.protocols[protocol], options.sizes)


def truth_file(options: argparse.Namespace, key: str, protocol: str) -> Path:
    suffix = "" if protocol == CONSTANT_RATE else f"_{protocol}"
    return options.folders.runs / f"truth_{key}{suffix}.jsonl"


def score_records(task: SelectionTask, options: argparse.Namespace) -> Records:
    return Records(options.folders.runs / f"scores_{task.key}.jsonl", setting_of(options), ("task", "scorer", "seed"))


def setting_of(options: argparse.Namespace) -> dict[str, Any]:
    return {"protocol": options.protocol.setting(), "sizes": asdict(options.sizes)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first tunes the learning rates")
    add("--random-sets", type=int, default=6, help="of each size")
    add_output(parser)
    add("--cache", default="build/models", help="where models that are pretrained here are kept")
    add("--stages", nargs="+", default=STAGES, choices=STAGES)
    add("--report-only", action="store_true", help="train and score nothing: the same as --stages report")
    add(
        "--selectors",
        nargs="+",
        help="those that pick in the stage “picks” (default: all)",
    )
    add("--quick", action="store_true", help="every step, but too short to mean anything")
    options = parser.parse_args(argv)
    options.folders = Folders.of("benchmarks/selection", "selection", options.output, options.quick)
    options.stages = ("report",) if options.report_only else options.stages
    options.command = list(argv if argv is not None else sys.argv[1:])
    options.sizes, options.protocols = Sizes(), {CONSTANT_RATE: CONSTANT, DECAYING_RATE: DECAYED}
    if options.quick:
        options.sizes = QUICK_SIZES
        options.protocols = {name: replace(quick(of), rank=2) for name, of in options.protocols.items()}
        options.seeds, options.random_sets = options.seeds[:2], 1
    options.protocol = options.protocols[CONSTANT_RATE]  # what the scores know of training
    return options
