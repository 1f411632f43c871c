# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Writes summary.md and the compressed runs from what is trained so far; analysis.py makes the regrets."""

from __future__ import annotations

import gzip
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .analysis import ArmResult, Cell, complete_cells, differences, interval, mean, regrets, results
from .plan import FIRST_ARMS, MIDDLE, MODELS, MORE_ARMS, Run
from .planned import NAME as PLANS
from .run_log import SHIPPED, RunLog
from .scores import NAME as SCORES
from .scores import correlations, plans_table
from .tasks import KEPT, TUNING


BUDGETS = ("1/8", "1/2", "1/16")
REFERENCE = "all_linear"
STEP_TIME = "cpu_seconds_per_step"


def write_report(output: Path, shipped: Path = SHIPPED, summary: Path | None = None) -> int:
    """summary.md and runs.jsonl.gz beside the benchmark, from the shipped runs and those in `output`."""
    log = RunLog(output, shipped)
    others = {name: RunLog(output, shipped.with_name(f"{name}.jsonl.gz"), name) for name in (PLANS, SCORES)}
    text = render(log.records, *([*each.records.values()] for each in others.values()))
    files = {shipped: log, **{shipped.with_name(f"{name}.jsonl.gz"): each for name, each in others.items()}}
    for path, each in files.items():
        lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in each.records.values())
        path.write_bytes(gzip.compress(lines.encode("utf-8"), 9, mtime=0))
    (summary or shipped.with_name("summary.md")).write_text(text, encoding="utf-8")
    print(text)
    return 0


def render(records: Mapping[Run, dict], plans: Sequence[dict] = (), scores: Sequence[dict] = ()) -> str:
    parts = [heading(records)]
    for budget in BUDGETS:
        cells = results(records, budget)
        if cells:
            parts.append(budget_section(budget, cells))
            parts += filter(None, (plans_table(plans, cells, budget), correlations(scores, cells, budget)))
    return "\n\n".join(parts) + "\n"


def heading(records: Mapping[Run, dict]) -> str:
    dates = sorted(record["date"] for record in records.values()) or ["no runs"]
    speed = [
        f"{model}: {mean(chosen):.1f} s of processor time a step, {mean(totals):.0f} s a run"
        for model in MODELS
        if (
            chosen := [
                record[STEP_TIME] for run, record in records.items() if run.model == model and STEP_TIME in record
            ]
        )
        and (totals := [record["seconds"] for run, record in records.items() if run.model == model])
    ]
    return "\n".join(
        [
            "# Language bench: results so far",
            "",
            f"{len(records)} runs, {dates[0]} to {dates[-1]}; {machine()}; one thread beside other work: "
            f"{'; '.join(speed) or 'no run yet'}. Command: `python -m examples.benchmarks.language --report`.",
            "",
            "Test loss in nats per label token. Regret: loss minus the cell's best arm. Brackets: 95 % intervals over "
            "cells (model x task). Only cells in which all first arms are trained count; one rate for all arms is "
            f"{', '.join(f'{rate:g} ({model})' for model, rate in MIDDLE.items())}.",
        ]
    )


def machine() -> str:
    return f"{platform.system()} {platform.machine()}, torch {torch.__version__}"


def budget_section(budget: str, cells: Mapping[Cell, Mapping[str, ArmResult]]) -> str:
    complete = complete_cells(cells)
    title = f"## Budget {budget} of all-linear at rank 8 ({len(complete)} complete cells of {len(cells)})"
    tables = [ranking(complete)] if complete else ["No cell is complete yet."]
    tables += [loss_table(model, cells) for model in MODELS if any(cell[0] == model for cell in cells)]
    return "\n\n".join([title, *tables])


def ranking(cells: Mapping[Cell, Mapping[str, ArmResult]]) -> str:
    """Arms by mean regret at tuned rates."""
    tuned, single = regrets(cells, "tuned"), regrets(cells, "one_rate")
    rows = [
        "| arm | cells | regret, tuned | minus all_linear, tuned | regret, one rate | best rates |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for arm in sorted(tuned, key=lambda name: mean(tuned[name].values())):
        rates = Counter(rate for arms in cells.values() if arm in arms for rate in arms[arm].rates)
        shown = ", ".join(f"{rate:g} x {count}" for rate, count in sorted(rates.items()))
        rows.append(
            f"| {arm} | {len(tuned[arm])} | {with_interval(list(tuned[arm].values()))} "
            f"| {with_interval(differences(cells, arm, REFERENCE)) if arm != REFERENCE else '0'} "
            f"| {with_interval(list(single[arm].values()))} | {shown} |"
        )
    return "\n".join(rows)


def with_interval(values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "diverged"
    bounds = interval(finite)
    text = f"{mean(finite):.3f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")
    lost = len(values) - len(finite)
    return text + (f", {lost} diverged" if lost else "")


def loss_table(model: str, cells: Mapping[Cell, Mapping[str, ArmResult]]) -> str:
    """Arms x tasks: the tuned test loss and its rate, the lowest of a task in bold; adapter parameters at the end."""
    tasks = [task for task in (*TUNING, *KEPT) if (model, task) in cells]
    arms = [arm for task in tasks for arm in cells[model, task]]
    known = [*FIRST_ARMS, *MORE_ARMS]
    names = [arm for arm in known if arm in arms] + sorted(set(arms) - set(known))
    rows = [f"| {model} | {' | '.join(tasks)} | parameters |", "|---|" + "--:|" * (len(tasks) + 1)]
    for arm in names:
        row = [cells[model, task].get(arm) for task in tasks]
        shown = [entry(result, cells[model, task]) for result, task in zip(row, tasks, strict=True)]
        parameters = next(result.parameters for result in row if result is not None)
        rows.append(f"| {arm} | {' | '.join(shown)} | {parameters:,} |")
    return "\n".join(rows)


def entry(result: ArmResult | None, arms: Mapping[str, ArmResult]) -> str:
    if result is None:
        return ""
    lowest = min(other.tuned for other in arms.values())
    loss = f"**{result.tuned:.3f}**" if result.tuned == lowest else f"{result.tuned:.3f}"
    return f"{loss} @{'/'.join(f'{rate:g}' for rate in result.rates)}"
