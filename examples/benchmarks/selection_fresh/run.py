# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Do the modules that the default chooses train better than those of baselines, on tasks sampled with fixed seeds?

    python -m examples.benchmarks.selection_fresh                                   # everything: hours of a core
    python -m examples.benchmarks.selection_fresh --tasks text_0 vision_1           # a part; recorded runs are kept
    python -m examples.benchmarks.selection_fresh --report-only                     # of what is recorded
    python -m examples.benchmarks.selection_fresh --quick --output fresh_quick      # every step in seconds

The default was developed on tasks of the benchmark `selection`. These tasks are sampled with a fixed seed each, after
the method was frozen: the sections of the archive and their number, the number of examples, the digits a vision
transformer was pretrained on, its depth, the section a language model learns. Every selector chooses modules within
five budgets; its choice is trained as in `selection` with a rate that decays linearly, the same for all. Compared are
test losses, task by task.

Runs are recorded in truth_<task>.jsonl.gz beside this file, choices in scores_<task>.jsonl.gz: a measurement that was
killed continues where it stopped, and several processes may work on different --tasks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from examples.benchmarks.selection.picks import RANDOM, as_configurations, choose, chosen_before
from examples.benchmarks.selection.scores import SCORE_SEED, measure_scores, table_of
from examples.benchmarks.selection.sets import ALL_LINEAR, HEAD_ONLY, Configuration, configurations
from examples.benchmarks.selection.tasks import QUICK_SIZES, SelectionTask, Sizes, sizes_for_report
from examples.benchmarks.selection.training import DECAYED, quick
from examples.benchmarks.selection.truth import ONE_RATE, Truth, measure_at_one_rate
from examples.benchmarks.selection_fresh.compared import DRAWS, SCORED, SELECTORS, WITHOUT_EXCLUDED, Finished
from examples.benchmarks.selection_fresh.figure import draw
from examples.benchmarks.selection_fresh.report import as_json, report, summary_page
from examples.benchmarks.selection_fresh.tasks import fresh_task
from examples.common.files import save_json, save_text
from examples.common.records import Records
from examples.common.reports import Folders, add_output, circumstances, command_line
from peft_linear.selection.exclusion import DEFAULT_EXCLUDE


MODULE = "examples.benchmarks.selection_fresh"
TASKS = (*(f"text_{n}" for n in range(5)), *(f"vision_{n}" for n in range(8)), "language_0")
STAGES = ("train", "report")
KEPT = ("task", "scorer", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    found = []
    for key in options.tasks:
        sizes = options.sizes if "train" in options.stages else sizes_for_report(options.sizes)
        task = fresh_task(key)(sizes, Path(options.cache))
        finished = measured(task, options)
        if finished is None:
            print(f"{key}: not finished, left out", file=sys.stderr)
        else:
            found.append(finished)
    if "report" in options.stages:
        publish(found, options)
    return 0


def measured(task: SelectionTask, options: argparse.Namespace) -> Finished | None:
    """Chooses and trains what is missing, if “train” is among the stages; None where something is missing then."""
    runs, setting = options.folders.runs, {"protocol": options.protocol.setting(), "sizes": asdict(options.sizes)}
    records = Records(runs / f"scores_{task.key}.jsonl", setting, KEPT)
    if "train" in options.stages:
        singles = [c for c in configurations(task, options.protocol.rank, 0) if c.single]
        wanted = [f"baseline {name}" for name in SCORED]
        scored = measure_scores(task, singles, SCORE_SEED, options.protocol, records, wanted)
        table = table_of(task, singles, scored, options.protocol.rank)
        choose(task, table, SCORE_SEED, options.protocol, records, SELECTORS)
    picks = chosen_before(task, SELECTORS, SCORE_SEED, records)
    references = references_of(task)
    sets = [*references, *as_configurations(task, picks, references)]
    if not all(modules for of in picks.values() for modules in of.values()):  # nothing of its kind fits
        sets.append(Configuration(HEAD_ONLY, ()))
    truth = Truth.at(runs / f"truth_{task.key}.jsonl", task, options.protocol, options.sizes)
    if "train" in options.stages:
        measure_at_one_rate(truth, sets, options.seeds)
        records.pack()
        truth.records.pack()
    if set(picks) != set(SELECTORS) or not all(truth.finished(c, options.seeds, ONE_RATE) for c in sets):
        return None
    (steps,) = options.protocol.steps
    reached = {
        c.modules: statistics.fmean(truth.losses(c, options.seeds, rate=ONE_RATE)[steps])  # type: ignore[index]
        for c in sets
    }
    order = list(task.modules)
    losses = {
        name: {words: reached[tuple(sorted(modules, key=order.index))] for words, modules in of.items()}
        for name, of in picks.items()
    }
    draws = [losses.pop(name) for name in DRAWS]
    losses[RANDOM] = {words: statistics.fmean(draw[words] for draw in draws) for words in draws[0]}
    return Finished(task, losses, {c.key: reached[c.modules] for c in references})


def references_of(task: SelectionTask) -> list[Configuration]:
    """All linear modules; and all but those that the default excludes, where there are such."""
    names = tuple(task.modules)
    kept = tuple(name for name in names if not set(DEFAULT_EXCLUDE) & set(name.split(".")))
    found = [Configuration(ALL_LINEAR, names), Configuration(WITHOUT_EXCLUDED, kept)]
    return found if kept != names else found[:1]


def publish(found: Sequence[Finished], options: argparse.Namespace) -> None:
    """Summary, figure, the report at full length, and every number of the finished tasks."""
    if not found:
        raise SystemExit("nothing is finished, so there is nothing to report")
    setting = {
        "protocol": options.protocol.setting(),
        "learning rate": ONE_RATE,
        "sizes": asdict(options.sizes),
        "seeds": options.seeds,
        **circumstances(command_line(MODULE, options.command), options.date),
    }
    save_text(options.folders.summary / "README.md", summary_page(found, setting))
    draw(found, options.folders.summary / "figure.png")
    save_text(options.folders.full / "report.md", report(found, setting))
    save_json(options.folders.full / "results.json", as_json(found, setting))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(TASKS), help="such as text_3: the kind and the seed")
    add("--seeds", type=int, nargs="+", default=[0])
    add_output(parser)
    add("--cache", default="build/models", help="where models that are pretrained here are kept")
    add("--stages", nargs="+", default=STAGES, choices=STAGES)
    add("--report-only", action="store_true", help="choose and train nothing: the same as --stages report")
    add("--quick", action="store_true", help="every step, but too short to mean anything")
    options = parser.parse_args(argv)
    options.folders = Folders.of("benchmarks/selection_fresh", "selection_fresh", options.output, options.quick)
    options.stages = ("report",) if options.report_only else options.stages
    options.command = list(argv if argv is not None else sys.argv[1:])
    options.sizes, options.protocol = Sizes(), DECAYED
    if options.quick:
        options.sizes, options.protocol = QUICK_SIZES, replace(quick(DECAYED), rank=2)
    return options
