# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How well the decrease by one Adam step orders the arms, beside the losses that they were trained to."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from scipy.stats import spearmanr

from peft_linear.capture.request import KernelRequest
from peft_linear.capture.trial import Trial
from peft_linear.selection.one_step import first_order, score_options
from peft_linear.selection.options import Option

from .analysis import ArmResult, Cell
from .arms import ArmRequest, budget_parameters, candidates, choose_ranks
from .plan import FIRST_ARMS, MORE_ARMS, Group
from .queue import Bench
from .run_log import SHIPPED as SHIPPED_RUNS


NAME = "scores"
SHIPPED = SHIPPED_RUNS.with_name("scores.jsonl.gz")


def score_cell(bench: Bench, group: Group) -> dict:
    """The scores of all arms in one cell."""
    bench.prepare(group.model, group.task)
    model = bench.model
    parameters = budget_parameters(model, group.budget)
    arms = [Option(arm, choose_ranks(arm, ArmRequest(model, parameters))) for arm in (*FIRST_ARMS, *MORE_ARMS)]
    layers = KernelRequest(targets=[candidate.name for candidate in candidates(model)]).layers(model)
    trial = Trial.of(model, layers, bench.padded(group.task), max(rank for arm in arms for rank in arm.ranks.values()))
    costs = {name: sum(layer.shape) for name, layer in layers.items()}
    with trial.running() as run:
        gradients = run.gradients(trial.batches[0::2])
        scores = score_options(run, arms, gradients, trial.batches[1::2], run.losses(trial.batches[1::2]), costs)
        slopes = [sum(first_order(gradients, arm.ranks, trial.lora_alpha).values()) for arm in arms]
    return {
        **asdict(group),
        "rate": 0.0,
        "validation_loss": None,
        "scores": {
            score.label: {"decrease": score.decrease, "size": score.step_size, "first_order": slope}
            for score, slope in zip(scores, slopes, strict=True)
        },
        "date": datetime.date.today().isoformat(),
    }


def correlations(records: Iterable[dict], cells: Mapping[Cell, Mapping[str, ArmResult]], budget: str) -> str:
    """A table: Spearman's correlation of two scores with the gain of the arms, tuned and at one rate."""
    rows = [
        "| cell | arms | one step: tuned | one step: one rate | first order: tuned | first order: one rate |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for record in records:
        found = cells.get((record["model"], record["task"]), {})
        arms = [arm for arm in record["scores"] if arm in found]
        if record["budget"] != budget or len(arms) < 4:
            continue
        gains = {which: [-getattr(found[arm], which) for arm in arms] for which in ("tuned", "one_rate")}
        values = {score: [record["scores"][arm][score] for arm in arms] for score in ("decrease", "first_order")}
        shown = [f"{spearmanr(values[score], gains[which])[0]:.2f}" for score in values for which in gains]
        rows.append(f"| {record['model']}, {record['task']} | {len(arms)} | {' | '.join(shown)} |")
    if len(rows) == 2:
        return ""
    title = "Rank correlation of two scores with minus the test loss, at tuned rates and at one rate"
    return f"{title}:\n\n" + "\n".join(rows)


def plans_table(records: Iterable[dict], cells: Mapping[Cell, Mapping[str, ArmResult]], budget: str) -> str:
    """What `recommend_modules` decided, trained, beside all linear modules and the best arm at their tuned rates."""
    rows = [
        "| cell | plan | rate [interval] | test loss | all_linear | best arm | minus all_linear | minus best |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for record in records:
        arms = cells.get((record["model"], record["task"]), {})
        if record["budget"] != budget or "all_linear" not in arms:
            continue
        best = min(arms, key=lambda arm: arms[arm].tuned)
        low, high = record["rate_interval"]
        loss, reference, least = record["test_loss"], arms["all_linear"].tuned, arms[best].tuned
        rows.append(
            f"| {record['model']}, {record['task']} | {record['rule']} | {record['rate']:.2g} [{low:.2g}, {high:.2g}] "
            f"| {loss:.3f} | {reference:.3f} | {best} {least:.3f} | {loss - reference:+.3f} | {loss - least:+.3f} |"
        )
    return "" if len(rows) == 2 else "Plans of `recommend_modules` from 32 examples:\n\n" + "\n".join(rows)
