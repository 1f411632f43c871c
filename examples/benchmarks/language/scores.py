# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How well the decrease by one Adam step orders the arms, beside the losses that they were trained to."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping

from scipy.stats import spearmanr

from peft_linear.capture.request import KernelRequest
from peft_linear.capture.trial import Trial
from peft_linear.selection.one_step import first_order, score_options
from peft_linear.selection.options import Option

from .analysis import ArmResult, Cell
from .arms import ArmRequest, budget_parameters, candidates, choose_ranks
from .batches import pad
from .plan import FIRST_ARMS, MORE_ARMS, RATES, Group
from .planned import EXAMPLES, ROWS
from .queue import Bench, record_run
from .run_log import SHIPPED, RunLog


NAME = "scores"
SHIPPED_SCORES = SHIPPED.with_name("scores.jsonl.gz")


def score_arms(output: RunLog, plan: Iterable[Group], bench: Bench, limit: int | None = None) -> int:
    """One record for each model, task and budget of `plan`; returns how many were made."""
    count = 0
    with output.locked():
        for group in dict.fromkeys(Group(g.model, g.task, g.budget, NAME, 0) for g in plan):
            if output.seen(group):
                continue
            if limit is not None and count >= limit:
                return count
            record_run(output, score_cell(bench, group))
            count += 1
    return count


def score_cell(bench: Bench, group: Group) -> dict:
    bench.prepare(group.model, group.task)
    model = bench.model
    parameters = budget_parameters(model, group.budget)
    arms = [Option(arm, choose_ranks(arm, ArmRequest(model, parameters))) for arm in (*FIRST_ARMS, *MORE_ARMS)]
    padding = bench.tokenizer.pad_token_id or bench.tokenizer.eos_token_id
    tokens = bench.tokens[group.task]["train"]
    batches = [pad(tokens[start : start + ROWS], padding) for start in range(0, EXAMPLES, ROWS)]
    layers = KernelRequest(targets=[candidate.name for candidate in candidates(model)]).layers(model)
    trial = Trial.of(model, layers, batches, max(rank for arm in arms for rank in arm.ranks.values()))
    costs = {name: sum(layer.shape) for name, layer in layers.items()}
    with trial.running() as run:
        gradients = run.gradients(trial.batches[0::2])
        scores = score_options(run, arms, gradients, trial.batches[1::2], costs)
        slopes = [sum(first_order(gradients, arm.ranks, trial.lora_alpha).values()) for arm in arms]
    return {
        "model": group.model,
        "task": group.task,
        "budget": group.budget,
        "arm": NAME,
        "seed": 0,
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
    title = f"Rank correlation of two scores with minus the test loss (one rate: {RATES[1]:g})"
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
