# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Do the modules that the default takes train better than those of rivals, on tasks that nobody has chosen?

    python examples/benchmarks/selection_fresh.py                                   # everything: hours of a core
    python examples/benchmarks/selection_fresh.py --tasks text_0 vision_1           # a part; what is there is kept
    python examples/benchmarks/selection_fresh.py --stages report                   # of what there is
    python examples/benchmarks/selection_fresh.py --quick --output fresh_quick      # every step in seconds

The tasks of `selection.py` were in view while the default was settled. These are drawn by a number: the sections of
the archive and how many, the number of examples, the digits a vision transformer has seen, its depth, the section a
language model learns. Every selector takes modules within five budgets; what it takes is trained as in `selection.py`
with a rate that decays linearly, the same for all. Compared are test losses, task by task.

Runs are kept in <output>/truth_<task>.jsonl, what selectors take in <output>/scores_<task>.jsonl: a killed measurement
goes on, and several processes may work on different --tasks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/common.py, from wherever this is started

import numpy as np
from figure_style import INK, finish
from matplotlib.figure import Figure
from records import Records, circumstances
from selection_analysis import Mean, mean_over_tasks
from selection_fresh_tasks import KINDS, fresh_task
from selection_picks import (
    AVOIDING,
    FREELY,
    RANDOM,
    RANDOM_DRAWS,
    RECOMMENDED,
    as_configurations,
    choose,
    chosen_before,
)
from selection_scores import SCORE_SEED, measure_scores, table_of
from selection_sets import ALL_LINEAR, FRACTIONS, HEAD_ONLY, Configuration, configurations
from selection_tasks import QUICK_SIZES, SelectionTask, Sizes
from selection_training import DECAYED, quick
from selection_truth import ONE_RATE, Truth, measure_at_one_rate

from peft_linear.files import write_text
from peft_linear.report.markdown import markdown_table
from peft_linear.selection.avoided import AVOIDED


SCORED = ("fisher", "page", "gora", "eva")
DRAWS = tuple(f"{RANDOM} {draw}" for draw in range(RANDOM_DRAWS))
SELECTORS = (RECOMMENDED, FREELY, *SCORED, AVOIDING.format("fisher"), "qv", "mlp_only", *DRAWS)
COMPARED = (*SELECTORS[: -len(DRAWS)], RANDOM)  # the mean of the draws
TASKS = (*(f"text_{n}" for n in range(5)), *(f"vision_{n}" for n in range(8)), "language_0")
STAGES = ("train", "report")
ALL_BUT_AVOIDED = "all linear, without the pooler"
TICKS = (-0.3, -0.1, -0.03, 0.0, 0.03, 0.1, 0.3, 1.0)  # of the figure, nats
QUARTER = f"{FRACTIONS[-1]:.0%} of the parameters"
COLORS = {"text": "#30638e", "vision": "#d1495b", "language": "#edae49"}
KEPT = ("task", "look", "seed")

Losses = dict[str, dict[str, float]]  # selector -> budget -> test loss, the mean over seeds


@dataclass(frozen=True)
class Finished:
    """One task, and what the selectors' modules reach."""

    task: SelectionTask
    losses: Losses
    references: dict[str, float]  # set -> test loss of what needs no choice

    @property
    def kind(self) -> str:
        return self.task.key.partition("_")[0]

    def excess(self, selector: str, other: str) -> float:
        """Loss of one selector's modules above that of another's, the mean over budgets."""
        return statistics.fmean(
            self.losses[selector][words] - self.losses[other][words] for words in self.losses[other]
        )

    def regret(self, selector: str) -> float:
        """Loss above the least of all selectors, the mean over budgets."""
        of = self.losses
        return statistics.fmean(of[selector][w] - min(losses[w] for losses in of.values()) for w in of[selector])


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    found = []
    for key in options.tasks:
        task = fresh_task(key)(options.sizes, Path(options.cache))
        finished = measured(task, options)
        if finished is None:
            print(f"{key}: not finished, left out", file=sys.stderr)
        else:
            found.append(finished)
    if "report" in options.stages:
        report(found, options)
    return 0


def measured(task: SelectionTask, options: argparse.Namespace) -> Finished | None:
    """Chooses and trains what is missing, if “train” is among the stages; None where something is missing then."""
    output, setting = Path(options.output), {"protocol": options.protocol.setting(), "sizes": asdict(options.sizes)}
    records = Records(output / f"scores_{task.key}.jsonl", setting, KEPT)
    if "train" in options.stages:
        singles = [c for c in configurations(task, options.protocol.rank, 0) if c.single]
        looks = measure_scores(
            task, singles, SCORE_SEED, options.protocol, records, [f"rival {name}" for name in SCORED]
        )
        table = table_of(task, singles, looks, options.protocol.rank)
        choose(task, table, SCORE_SEED, options.protocol, records, SELECTORS)
    picks = chosen_before(task, SELECTORS, SCORE_SEED, records)
    references = references_of(task)
    sets = [*references, *as_configurations(task, picks, references)]
    if not all(modules for of in picks.values() for modules in of.values()):  # nothing of its kind fits
        sets.append(Configuration(HEAD_ONLY, ()))
    truth = Truth.at(output / f"truth_{task.key}.jsonl", task, options.protocol, options.sizes)
    if "train" in options.stages:
        measure_at_one_rate(truth, sets, options.seeds)
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
    """All linear modules; and all but those that the default leaves for last, where there are such."""
    names = tuple(task.modules)
    kept = tuple(name for name in names if not set(AVOIDED) & set(name.split(".")))
    found = [Configuration(ALL_LINEAR, names), Configuration(ALL_BUT_AVOIDED, kept)]
    return found if kept != names else found[:1]


def compared(found: Sequence[Finished]) -> dict[str, tuple[Mean, Mean, int]]:
    """{selector: its regret, its excess over the default, tasks in which the default is better}, least regret first.

    Regret and excess are means over tasks.
    """
    rows = {}
    for name in COMPARED:
        excess = [of.excess(name, RECOMMENDED) for of in found]
        rows[name] = (
            mean_over_tasks([[of.regret(name)] for of in found]),
            mean_over_tasks([[value] for value in excess]),
            sum(value > 0 for value in excess),
        )
    return dict(sorted(rows.items(), key=lambda item: item[1][0].mean))


def table(found: Sequence[Finished]) -> str:
    rows = [
        (f"`{name}`", str(regret), "–" if name == RECOMMENDED else str(excess), f"{better} of {len(found)}")
        for name, (regret, excess, better) in compared(found).items()
    ]
    header = ("selector", "regret (nats)", "loss above the default's (nats)", "tasks in which the default is better")
    return markdown_table(header, rows, right=(1, 2, 3))


def report(found: Sequence[Finished], options: argparse.Namespace) -> None:
    """Tables, figure and every number of the finished tasks."""
    if not found:
        raise SystemExit("nothing is finished, so there is nothing to report")
    output, command = (
        Path(options.output),
        " ".join(["python examples/benchmarks/selection_fresh.py", *options.command]),
    )
    setting = {
        "protocol": options.protocol.setting(),
        "learning rate": ONE_RATE,
        "sizes": asdict(options.sizes),
        "seeds": options.seeds,
        **circumstances(command, options.date),
    }
    kinds = [kind for kind in KINDS if any(of.kind == kind for of in found)]
    text = [
        "# What selectors take, trained, on tasks that are drawn by a number",
        "![loss of every selector's modules above the default's](figure.png)",
        "Regret: test loss of a selector's modules above the least of all selectors' within the same budget. Loss "
        "above the default's: of the same task and budget. Both are means over budgets, then tasks, with 95 % "
        "bootstrap intervals over tasks from three on; in the figure a dot is a task and a bar the interval.",
        f"## All {len(found)} tasks",
        table(found),
    ]
    for kind in kinds if len(kinds) > 1 else ():
        text += [f"## {kind.capitalize()}", table([of for of in found if of.kind == kind])]
    shown = (RECOMMENDED, "fisher", "page", "eva", "qv", RANDOM)
    rows = [
        (
            of.task.key,
            of.task.words,
            *(f"{of.references[key]:.3f}" if key in of.references else "–" for key in (ALL_LINEAR, ALL_BUT_AVOIDED)),
            f"{of.losses[RECOMMENDED][QUARTER]:.3f}",
            *(f"{of.regret(name):.3f}" for name in shown),
        )
        for of in found
    ]
    losses = (ALL_LINEAR, ALL_BUT_AVOIDED, f"the default's {QUARTER}")
    header = ("task", "what", *(f"loss: {name}" for name in losses), *(f"regret: `{name}`" for name in shown))
    text += [
        "## Task by task",
        markdown_table(header, rows, right=range(2, len(header))),
        "## Setting",
        markdown_table(("", ""), [(name, str(value)) for name, value in setting.items()]),
    ]
    draw(found, output / "figure.png")
    write_text(output / "README.md", "\n\n".join(text) + "\n")
    tasks = {of.task.key: {"words": of.task.words, "losses": of.losses, "references": of.references} for of in found}
    write_text(output / "results.json", json.dumps({**setting, "tasks": tasks}, indent=1) + "\n")


def draw(found: Sequence[Finished], path: Path) -> None:
    """A dot for each task: what a selector's modules lose against the default's."""
    names = [name for name in compared(found) if name != RECOMMENDED]
    figure = Figure(figsize=(10, 1.6 + 0.4 * len(names)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    rows = np.arange(len(names))
    for kind, color in COLORS.items():
        for number, of in enumerate(of for of in found if of.kind == kind):
            values = [of.excess(name, RECOMMENDED) for name in names]
            label = kind if number == 0 else None
            axes.plot(values, rows, "o", color=color, alpha=0.6, markersize=6, linewidth=0, label=label)
    for row, name in enumerate(names):
        mean = compared(found)[name][1]
        axes.plot([mean.low, mean.high], [row, row], color=INK, linewidth=2)
        axes.plot([mean.mean], [row], "|", color=INK, markersize=16, markeredgewidth=2)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.05)
    axes.set_xticks(TICKS, [f"{value:+g}" if value else "0" for value in TICKS])
    axes.minorticks_off()
    axes.set_yticks(rows, [name.replace("_", " ") for name in names], fontsize=10, color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    finish(axes, "Test loss above the default's (nats)")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(COLORS))
    figure.savefig(path, dpi=130)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(TASKS), help="such as text_3: the kind and the number that draws it")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--output", default="docs/measurements/selection_fresh")
    add("--cache", default="build/selection", help="where models that are pretrained here are kept")
    add("--stages", nargs="+", default=STAGES, choices=STAGES, help="“report” alone chooses and trains nothing")
    add("--quick", action="store_true", help="every step, but too short to mean anything")
    add("--date", help="of the report (default: today)")
    options = parser.parse_args(argv)
    options.command = list(argv if argv is not None else sys.argv[1:])
    options.sizes, options.protocol = Sizes(), DECAYED
    if options.quick:
        options.sizes, options.protocol = QUICK_SIZES, replace(quick(DECAYED), rank=2)
    return options


if __name__ == "__main__":
    sys.exit(main())
