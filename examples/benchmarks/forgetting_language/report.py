# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Writes the page and the figure of what is trained so far, and keeps the runs beside the benchmark."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from examples.common.figure_style import INK, finish, save
from examples.common.files import save_text
from examples.common.reports import as_page, circumstances, provenance
from peft_linear.report.markdown import markdown_table

from .analysis import (
    KINDS,
    NO_LADDER,
    SHARES,
    Cell,
    cells_of,
    explained,
    interval,
    ladders,
    least_kl,
    log_ratios,
    reaches_below,
)
from .plan import DECIDING, LORA, OTHERS
from .queue import SHIPPED, open_log


PAGE = Path(__file__).parents[3] / "docs" / "measurements" / "forgetting_language"
OURS = "pull_function"
LABELS = {
    LORA: "LoRA, scaled down afterwards",
    "pull_function": "pull in function space",
    "pull_delta": "pull in delta space",
    "pull_factors": "pull in factor space",
    "kl": "KL to the base in the loss",
    "ewc_lora": "EWC-LoRA",
    "replay": "replay",
    "lower_rate": "lower learning rate",
    "early_stopping": "early stopping",
    "weight_decay": "weight decay",
    "lalora_kfac": "LaLoRA, block K-FAC",
    "lalora_diagonal": "LaLoRA, diagonal",
    "masked_kl": "Mask-the-Target KL",
    "replay_kl": "replay and KL",
    "projection_decay": "Selective Projection Decay",
    "corda": "CorDA",
    "lora_null": "LoRA-Null",
    "stm": "likely tokens only (STM)",
    "kl_budget": "budget of KL, function space",
}
PREDICTORS = {
    "function_distance": "distance in function space",
    "delta_distance": "‖ΔW‖",
    "kl_task_answers": "KL on the new task's answers",
    "kl_task_prompts": "KL on the new task's prompts",
}


def write_report(output: Path, shipped: Path = SHIPPED, page: Path = PAGE) -> int:
    """README.md and figure.png in `page`, and the runs, those that were shipped before and those in `output`."""
    log = open_log(output, shipped)
    records = list(log.records.values())
    text = render(records)
    lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    shipped.write_bytes(gzip.compress(lines.encode("utf-8"), 9, mtime=0))
    save_text(page / "README.md", text)
    draw(records, page / "figure.png")
    print(text)
    return 0


def render(records: Sequence[Mapping]) -> str:
    cells = cells_of(records)
    date = max((record["date"] for record in records), default=None)
    source = circumstances("python -m examples.benchmarks.forgetting_language --report", date)
    return as_page(
        [
            "# What a language model forgets, at the same gain",
            introduction(records, cells),
            "![KL from the base model against the test loss, by arm](figure.png)",
            "## Function space against the other ways",
            comparison(cells),
            "## Every cell",
            *[section(model, task, cells) for model, task in dict.fromkeys((c.model, c.task) for c in cells)],
            "## Budgets of KL",
            budgets(records),
            "## What predicts forgetting",
            predictors(records),
            "## Cost",
            costs(records),
            not_run(records),
            provenance(source),
        ]
    )


def introduction(records: Sequence[Mapping], cells: Mapping[Cell, Sequence[Mapping]]) -> str:
    steps = max((record["steps"] for record in records), default=0)
    counts = ", ".join(f"{c.model} {c.task} (seed {c.seed}): {len(runs)} runs" for c, runs in cells.items())
    return (
        f"{len(records)} runs of {steps} steps of 4 examples, AdamW with linear decay, LoRA of rank 4 on all linear "
        f"modules. {counts or 'No cell is complete.'}\n\n"
        "Gain is the reduction of the test loss, as a share of plain LoRA's in the same cell. Forgotten is KL(base ‖ "
        "tuned) in nats a token on texts that no arm trains on or takes as reference: package descriptions in English "
        "(the reference's kind), Python code, and e-mails (far). Arms with a reference read 64 descriptions. Between "
        "the strengths of an arm log KL is interpolated; ≤ where its strongest still keeps more of the gain. All arms "
        "have LoRA's learning rate, which was not tuned for any of them."
    )


def comparison(cells: Mapping[Cell, Sequence[Mapping]]) -> str:
    """KL of ours over KL of each other arm at two shares of the gain."""
    rows = []
    columns = [*((kind, 0.97) for kind in KINDS), *((kind, 0.9) for kind in KINDS)]
    for arm in LABELS:
        if arm in (OURS, "kl_budget"):
            continue
        found = [list(log_ratios(cells, OURS, arm, kind, share).values()) for kind, share in columns]
        rows.append((LABELS[arm], *map(_ratio, found)))
    header = ("against", *(f"{kind}, {share:.0%}" for kind, share in columns))
    return (
        "KL of the pull in function space divided by that of the other arm, at 97 and 90 % of LoRA's gain: geometric "
        "mean over the cells in which the other arm has a strength that keeps less (their number), Student's 95 % "
        "interval where there are three. Below 1 it forgets less.\n\n"
        + markdown_table(header, [row for row in rows if any(cell != "–" for cell in row[1:])], right=range(1, 7))
    )


def _ratio(logs: Sequence[float]) -> str:
    if not logs:
        return "–"
    text = f"{math.exp(statistics.fmean(logs)):.2f} ({len(logs)})"
    bounds = interval(logs)
    return text if bounds is None else f"{text} [{math.exp(bounds[0]):.2f}, {math.exp(bounds[1]):.2f}]"


def section(model: str, task: str, cells: Mapping[Cell, Sequence[Mapping]]) -> str:
    """One table of a model and a task: the mean over seeds of the least KL at each share of the gain."""
    chosen = [runs for cell, runs in cells.items() if (cell.model, cell.task) == (model, task)]
    lora = [next(run for run in runs if run["arm"] == LORA) for runs in chosen]
    loss = statistics.fmean(run["scales"]["1"]["test_loss"] for run in lora)
    start = statistics.fmean(run["start_test_loss"] for run in lora)
    rows = []
    for arm in LABELS:
        if arm in NO_LADDER and arm != LORA:
            continue
        row = [LABELS[arm]]
        for kind, share in [*(("descriptions", share) for share in SHARES), ("code", 0.9), ("far", 0.9)]:
            found = [ladders(runs, kind).get(arm) for runs in chosen]
            values = [least_kl(each, share, arm == LORA) for each in found if each is not None]
            known = [value for value in values if value is not None]
            open_end = any(not reaches_below(each, share, arm == LORA) for each in found if each is not None)
            bound = "≤ " if open_end else ""
            row.append(f"{bound}{statistics.fmean(known):.3g}" if known and len(known) == len(values) else "–")
        rows.append(row)
    header = ("arm", *(f"descriptions, {share:.0%}" for share in SHARES), "code, 90%", "far, 90%")
    full = [run["scales"]["1"] for run in lora]
    plain = ", ".join(f"{statistics.fmean(each[f'kl_{kind}'] for each in full):.3g} ({kind})" for kind in KINDS)
    return (
        f"**{model}, {task}**, {len(chosen)} seed(s): test loss {start:.3f} before, {loss:.3f} with plain LoRA, which "
        f"forgets {plain}.\n\n"
        + markdown_table(header, [row for row in rows if any(cell != "–" for cell in row[1:])], right=range(1, 6))
    )


def budgets(records: Sequence[Mapping]) -> str:
    chosen = [record for record in records if record["arm"] == "kl_budget"]
    if not chosen:
        return "Not run."
    rows = [
        (
            f"{record['model']}, {record['task']}, seed {record['seed']}",
            f"{record['strength']:g}",
            f"{record['held_out_kl']:.4f} ({record['held_out_kl'] / record['strength'] - 1:+.0%})",
            f"{record['scales']['1']['kl_descriptions']:.4f}",
            f"{record['scales']['1']['kl_code']:.4f}",
            f"{record['scales']['1']['test_loss']:.3f}",
        )
        for record in chosen
    ]
    header = ("run", "budget", "on the 16 texts that steer", "other descriptions", "code", "test loss")
    return markdown_table(header, rows, right=range(1, 6))


def predictors(records: Sequence[Mapping]) -> str:
    rows = []
    for name, label in PREDICTORS.items():
        values = [explained(records, name, kind) for kind in KINDS]
        rows.append((label, *("–" if value is None else f"{value:.2f}" for value in values)))
    return (
        "R² of log KL on retained texts by the logarithm of each quantity, over all runs, within cells.\n\n"
        + markdown_table(("quantity", *KINDS), rows, right=range(1, 4))
    )


def costs(records: Sequence[Mapping]) -> str:
    rows = []
    models = dict.fromkeys(record["model"] for record in records)
    for arm in LABELS:
        row = [LABELS[arm] if arm != LORA else "LoRA"]
        for model in models:
            chosen = [record for record in records if (record["arm"], record["model"]) == (arm, model)]
            row.append(
                f"{statistics.median(each['cpu_seconds_per_step'] for each in chosen):.2f} s, "
                f"{statistics.median(each['peak_mib'] for each in chosen):.0f} MiB"
                if chosen
                else "–"
            )
        rows.append(row)
    table = markdown_table(
        ("arm", *models),
        [row for row in rows if any(cell != "–" for cell in row[1:])],
        right=range(1, 1 + len(models)),
    )
    return f"Processor time of a step, and peak memory of the process, medians beside other work.\n\n{table}"


def not_run(records: Iterable[Mapping]) -> str:
    there = {record["arm"] for record in records}
    missing = [LABELS[arm] for arm, _ in (*DECIDING, *OTHERS) if arm not in there]
    return f"Not run yet: {', '.join(dict.fromkeys(missing))}." if missing else "All arms were run."


COLOURS = {
    LORA: "#8a97a1",
    OURS: "#c2410c",
    "pull_delta": "#2563a8",
    "kl": "#3b8f5a",
    "ewc_lora": "#8e5bb5",
    "replay": "#b8891b",
}


def draw(records: Sequence[Mapping], path: Path) -> None:
    """One panel a model and task: KL on code against the test loss, one line an arm, of its first seed."""
    cells = {cell: runs for cell, runs in cells_of(records).items() if cell.seed == 0}
    if not cells:
        return
    columns = min(2, len(cells))
    rows = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(5.6 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (cell, runs) in zip(panels, cells.items(), strict=False):
        for arm, colour in COLOURS.items():
            found = ladders(runs, "code").get(arm)
            if found is None:
                continue
            lora = next(run for run in runs if run["arm"] == LORA)
            start, gain = lora["start_test_loss"], lora["start_test_loss"] - lora["scales"]["1"]["test_loss"]
            points = list(found[0]) if arm == LORA else [run[0] for run in found]
            losses = [start - point.share * gain for point in points]
            axes.plot(losses, [point.kl for point in points], "o-", color=colour, label=LABELS[arm], markersize=4)
        axes.set_yscale("log")
        axes.set_xlabel("test loss of the new task (nats a token)", color=INK)
        axes.set_ylabel("KL(base ‖ tuned) on code", color=INK)
        finish(axes, f"{cell.model}, {cell.task}")
    figure.axes[0].legend(frameon=False, fontsize=9)
    for axes in list(panels):
        axes.set_visible(False)
    save(figure, path)
