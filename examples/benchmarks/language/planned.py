# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What `recommend_modules` decides for a cell, from 32 of its training examples, trained: modules, ranks and rate."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from dataclasses import asdict

from peft_linear import Recommendation, recommend_modules
from peft_linear.selection.training import Training

from .arms import budget_parameters
from .batches import pad
from .plan import Group
from .queue import Bench, record_run
from .run_log import SHIPPED, RunLog
from .training import BATCH, STEPS, train


NAME = "planned"
SHIPPED_PLANS = SHIPPED.with_name("planned.jsonl.gz")
EXAMPLES, ROWS = 32, 8


def train_plans(output: RunLog, plan: Iterable[Group], bench: Bench, limit: int | None = None) -> int:
    """Decides and trains once for each model, task, budget and seed of `plan`; returns how many it trained."""
    count = 0
    with output.locked():
        for group in dict.fromkeys(Group(g.model, g.task, g.budget, NAME, g.seed) for g in plan):
            if output.seen(group):
                continue
            if limit is not None and count >= limit:
                return count
            record_run(output, run_plan(bench, group))
            count += 1
    return count


def run_plan(bench: Bench, group: Group) -> dict:
    bench.prepare(group.model, group.task)
    tokens = bench.tokens[group.task]
    padding = bench.tokenizer.pad_token_id or bench.tokenizer.eos_token_id
    batches = [pad(tokens["train"][start : start + ROWS], padding) for start in range(0, EXAMPLES, ROWS)]
    parameters = budget_parameters(bench.model, group.budget)
    start = time.process_time()
    rec: Recommendation = recommend_modules(
        bench.model,
        batches,
        str(parameters),
        seed=group.seed,
        training=Training(steps=bench.steps, batch_size=BATCH),
        progress=False,
    )
    seconds = time.process_time() - start
    result = train(bench.model, rec.ranks, tokens, rec.learning_rate, group.seed, bench.steps)
    return {
        **asdict(group),
        "rate": rec.learning_rate,
        **result,
        "rate_interval": rec.learning_rate_interval,
        "rule": str(rec.rule),
        "options": {each.label: [each.decrease, *each.difference_interval, each.step_size] for each in rec.options},
        "decision_cpu_seconds": round(seconds, 1),
        "budget_parameters": parameters,
        "steps": STEPS,
        "date": datetime.date.today().isoformat(),
    }
