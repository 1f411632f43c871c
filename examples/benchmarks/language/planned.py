# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What `recommend_modules` decides for a cell, from 32 of its training examples, trained: modules, ranks and rate."""

from __future__ import annotations

import datetime
import time
from dataclasses import asdict

from peft_linear import Recommendation, recommend_modules
from peft_linear.selection.training import Training

from .arms import budget_parameters
from .plan import Group
from .queue import Bench
from .run_log import SHIPPED as SHIPPED_RUNS
from .training import BATCH, train


NAME = "planned"
SHIPPED = SHIPPED_RUNS.with_name("planned.jsonl.gz")


def run_plan(bench: Bench, group: Group) -> dict:
    """The record of one decision and its training."""
    bench.prepare(group.model, group.task)
    parameters = budget_parameters(bench.model, group.budget)
    start = time.process_time()
    rec: Recommendation = recommend_modules(
        bench.model,
        bench.padded(group.task),
        str(parameters),
        seed=group.seed,
        training=Training(steps=bench.steps, batch_size=BATCH),
        progress=False,
    )
    seconds = time.process_time() - start
    result = train(bench.model, rec.ranks, bench.tokens[group.task], rec.learning_rate, group.seed, bench.steps)
    return {
        **asdict(group),
        "rate": rec.learning_rate,
        **result,
        "rate_interval": rec.learning_rate_interval,
        "rule": str(rec.rule),
        "options": {each.label: [each.decrease, *each.difference_interval, each.step_size] for each in rec.options},
        "decision_cpu_seconds": round(seconds, 1),
        "budget_parameters": parameters,
        "steps": bench.steps,
        "date": datetime.date.today().isoformat(),
    }
