# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which way to choose modules finds those that train best? Every way against really fine-tuned sets of modules.

    python examples/benchmarks/selection.py                                    # everything: many hours of a core
    python examples/benchmarks/selection.py --tasks topics --seeds 0           # a part; what is there is kept
    python examples/benchmarks/selection.py --stages report                    # tables and figure of what there is
    python examples/benchmarks/selection.py --quick --output selection_quick   # every step in seconds

Ground truth: every module alone and some fifty sets are fine-tuned on every task, at one learning rate for all and
with a rate tuned for each on validation data, for a short and a long budget of steps; and once more, longer, in larger
batches, with a tuned rate that decays linearly as the HF Trainer's does. Before training, every criterion and every
rival scores the same modules and sets. Reported: rank correlations, regret of the picks, calibration of predicted
losses, time. The tasks of the family "test" are not to be looked at before a criterion is settled on the others.

Runs are kept in <output>/truth_<task>.jsonl, scores in <output>/scores_<task>.jsonl: a killed measurement goes on, and
several processes may work on different --tasks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/common.py, from wherever this is started

from records import Records, circumstances, read_lines
from selection_analysis import Measured, by_rate, measured
from selection_picks import Chooser, Picks, as_configurations, choose, chosen_before
from selection_report import as_json, draw, rates_section, sections
from selection_scores import DEFAULT, PARAMETERS, SCORE_SEED, Scores, looks_of, measure_scores, table_of
from selection_sets import Configuration, configurations
from selection_tasks import QUICK_SIZES, TASKS, SelectionTask, Sizes
from selection_training import CONSTANT, DECAYED, quick
from selection_truth import ONE_RATE, Truth, measure, measure_at_one_rate

from peft_linear.files import write_text
from peft_linear.report.markdown import markdown_table


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


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    output = Path(options.output)
    for key in options.tasks:
        task = TASKS[key](options.sizes, Path(options.cache))
        sets = configurations(task, options.protocol.rank, options.random_sets)
        train_missing(options, task, output, sets, TRAINING.intersection(options.stages))
        if "scores" in options.stages:
            scored(task, sets, options, output)
        if "picks" in options.stages:
            picked = as_configurations(task, picks_of(task, sets, options, output), sets)
            train_missing(options, task, output, picked, TRAINING.intersection(options.stages) or TRAINING)
    if "report" in options.stages:
        report(options, output)
    return 0


def train_missing(
    options: argparse.Namespace,
    task: SelectionTask,
    output: Path,
    sets: Sequence[Configuration],
    stages: Collection[str],
) -> None:
    """What these of the stages `TRAINING` ask for."""
    truth, decayed = (truth_of(task, options, output, name) for name in (CONSTANT_RATE, DECAYING_RATE))
    if "truth" in stages:
        measure(truth, sets, options.seeds)
    if "one_rate" in stages:
        measure_at_one_rate(truth, sets, options.seeds)
    if "decayed" in stages:
        measure(decayed, sets, options.seeds)
    if "decayed_one_rate" in stages:
        measure_at_one_rate(decayed, sets, options.seeds)


def scored(
    task: SelectionTask, sets: Sequence[Configuration], options: argparse.Namespace, output: Path
) -> tuple[Scores, dict[str, float]]:
    looks = measure_scores(task, sets, SCORE_SEED, options.protocol, score_records(task, options, output))
    seconds = {look: record["seconds"] for look, record in looks.items()}
    return table_of(task, sets, looks, options.protocol.rank), seconds


def picks_of(task: SelectionTask, sets: Sequence[Configuration], options: argparse.Namespace, output: Path) -> Picks:
    table, _ = scored(task, sets, options, output)
    records = score_records(task, options, output)
    return choose(task, table, SCORE_SEED, options.protocol, records, options.selectors)


def report(options: argparse.Namespace, output: Path) -> None:
    """Tables and the figure of the tasks whose single modules, at least, are trained."""
    found: dict[str, list[Measured]] = {view: [] for view in VIEWS}
    picks: dict[str, dict[str, Picks]] = {view: {} for view in VIEWS}  # where all of them are trained
    rates: dict[str, Any] = {}
    for key in options.tasks:
        task = TASKS[key](options.sizes, Path(options.cache))
        sets = configurations(task, options.protocol.rank, options.random_sets)
        records = score_records(task, options, output)
        if not all((key, look, SCORE_SEED) in records for look in looks_of(task)):
            print(f"{key}: not scored, left out", file=sys.stderr)
            continue
        table, seconds = scored(task, sets, options, output)
        chosen = chosen_before(task, Chooser(task, table, SCORE_SEED, options.protocol).selectors, SCORE_SEED, records)
        truths = {name: truth_of(task, options, output, name) for name in options.protocols}
        rates[key] = by_rate(truths[CONSTANT_RATE], sets, table, SHOWN_BY_RATE, options.seeds[0])
        for view, (protocol, rate) in VIEWS.items():
            truth = truths[protocol]
            seeds = most_seeds(truth, sets, options.seeds, rate)
            if not seeds:
                print(f"{key}: too little is trained, left out of “{view}”", file=sys.stderr)
                continue
            trained = {
                name: of for name, of in chosen.items() if is_trained(truth, task, {name: of}, sets, seeds, rate)
            }
            picked = as_configurations(task, trained, sets)
            if trained:
                picks[view][key] = trained
            found[view].append(measured(truth, [*sets, *picked], seeds, table, seconds, rate))
    if not any(found.values()):
        raise SystemExit("nothing is finished, so there is nothing to report")
    command = " ".join(["python examples/benchmarks/selection.py", *options.command])
    setting = {
        **setting_of(options),
        "protocol with decay": options.protocols[DECAYING_RATE].setting(),
        "one learning rate": ONE_RATE,
        "hours of training": round(hours(options, output), 2),
        **circumstances(command, options.date),
    }
    text = ["# Ways to choose modules against what training reaches"]
    for view, of_view in found.items():
        if of_view:
            steps = options.protocols[VIEWS[view][0]].steps
            text += sections(of_view, picks[view], steps, view)
            draw(of_view, steps, output / f"{view}.png")
    text += [
        rates_section(rates),
        "## Setting",
        markdown_table(("", ""), [(name, str(value)) for name, value in setting.items()]),
    ]
    write_text(output / "README.md", "\n\n".join(text) + "\n")
    results = {
        **setting,
        "by_rate": rates,
        **{
            view: as_json(of_view, picks[view], options.protocols[VIEWS[view][0]].steps)
            for view, of_view in found.items()
        },
    }
    write_text(output / "results.json", json.dumps(results, indent=1) + "\n")


def is_trained(
    truth: Truth,
    task: SelectionTask,
    picks: Picks,
    sets: Sequence[Configuration],
    seeds: Sequence[int],
    rate: float | None,
) -> bool:
    """Whether what a selector takes is trained for every budget, as a set of its own or one measured anyway."""
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


def hours(options: argparse.Namespace, output: Path) -> float:
    """Of all training runs that are on disk."""
    files = [truth_file(output, key, protocol) for key in options.tasks for protocol in options.protocols]
    return sum(line.get("seconds", 0.0) for file in files for line in read_lines(file)) / 3600


def truth_of(task: SelectionTask, options: argparse.Namespace, output: Path, protocol: str) -> Truth:
    return Truth.at(truth_file(output, task.key, protocol), task, options.protocols[protocol], options.sizes)


def truth_file(output: Path, key: str, protocol: str) -> Path:
    suffix = "" if protocol == CONSTANT_RATE else f"_{protocol}"
    return output / f"truth_{key}{suffix}.jsonl"


def score_records(task: SelectionTask, options: argparse.Namespace, output: Path) -> Records:
    return Records(output / f"scores_{task.key}.jsonl", setting_of(options), ("task", "look", "seed"))


def setting_of(options: argparse.Namespace) -> dict[str, Any]:
    return {"protocol": options.protocol.setting(), "sizes": asdict(options.sizes)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first tunes the learning rates")
    add("--random-sets", type=int, default=6, help="of each size")
    add("--output", default="docs/measurements/selection")
    add("--cache", default="build/selection", help="where models that are pretrained here are kept")
    add("--stages", nargs="+", default=STAGES, choices=STAGES, help="“report” alone trains and scores nothing")
    add(
        "--selectors",
        nargs="+",
        help="those that pick in the stage “picks” (default: all)",
    )
    add("--quick", action="store_true", help="every step, but too short to mean anything")
    add("--date", help="of the report (default: today)")
    options = parser.parse_args(argv)
    options.command = list(argv if argv is not None else sys.argv[1:])
    options.sizes, options.protocols = Sizes(), {CONSTANT_RATE: CONSTANT, DECAYING_RATE: DECAYED}
    if options.quick:
        options.sizes = QUICK_SIZES
        options.protocols = {name: replace(quick(of), rank=2) for name, of in options.protocols.items()}
        options.seeds, options.random_sets = options.seeds[:2], 1
    options.protocol = options.protocols[CONSTANT_RATE]  # what the scores know of training
    return options


if __name__ == "__main__":
    sys.exit(main())
