# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Works through the plan, one run after the other; stop it at any time and start it again with the same command."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from torch import nn

from examples.benchmarks.language.batches import Encoded, encode
from examples.benchmarks.language.models import load_language_model
from examples.benchmarks.language.run_log import RecordLog
from examples.benchmarks.language.tasks import load_task
from examples.benchmarks.language.training import BATCH, STEPS

from . import loss_terms, penalties, starts  # noqa: F401  they register their arms
from .arms import Request, make_arm
from .measures import Measures
from .plan import FIELDS, RANK, RATES, Run
from .texts import encode_texts, human_eval, reference_texts, retained_texts
from .training import train_and_measure


SHIPPED = Path(__file__).parent / "runs.jsonl.gz"
TEST = 64  # test examples
KEPT_STATISTICS = ("function_reference", "base_states")  # small; the others go with their model


class Bench:
    """Holds one model, what is known of its tasks, and the statistics of the reference texts."""

    def __init__(self, load: Callable = load_language_model, steps: int = STEPS) -> None:
        self.load = load
        self.steps = steps
        self.name: str | None = None
        self.model: nn.Module | None = None
        self.memos: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, tuple[dict[str, list[Encoded]], Measures]] = {}

    def prepare(self, model: str, task: str) -> None:
        if self.name != model:
            if self.name is not None:
                memo = self.memos[self.name]
                self.memos[self.name] = {name: memo[name] for name in KEPT_STATISTICS if name in memo}
            self.model, self.tokenizer = self.load(model)
            self.name, self.tasks = model, {}
            self.memos.setdefault(model, {})
            self.reference, self.held_out = (encode_texts(self.tokenizer, texts) for texts in reference_texts())
            self.human_eval = human_eval(self.tokenizer)
        if task not in self.tasks:
            examples = load_task(task)
            tokens = {
                split: [encode(self.tokenizer, example) for example in getattr(examples, split)]
                for split in ("train", "validation", "test")
            }
            retained = {kind: encode_texts(self.tokenizer, texts) for kind, texts in retained_texts(task).items()}
            self.tasks[task] = tokens, Measures(self.model, retained, tokens["test"][:TEST], self.human_eval)

    def run(self, run: Run) -> dict:
        """The record of one run."""
        self.prepare(run.model, run.task)
        tokens, measures = self.tasks[run.task]
        rate = RATES[run.model]
        rate_sum = rate * sum(1 - step / self.steps for step in range(self.steps))
        request = Request(
            self.model,
            run.strength,
            run.seed,
            self.steps,
            rate_sum,
            self.reference,
            self.held_out,
            self.memos[run.model],
        )
        result = train_and_measure(make_arm(run.arm, request), tokens["train"], tokens["validation"], measures, rate)
        return {
            **asdict(run),
            **result,
            **measures.start(),
            "rate": rate,
            "rank": RANK,
            "steps": self.steps,
            "batch": BATCH,
            "date": datetime.date.today().isoformat(),
        }


def open_log(folder: Path, shipped: Path | None = SHIPPED) -> RecordLog:
    return RecordLog(folder, shipped, "runs", FIELDS)


def work(log: RecordLog, plan: Iterable[Run], bench: Bench, limit: int | None = None) -> int:
    """Trains what is not there yet, at most `limit` runs; returns how many it trained."""
    count = 0
    with log.locked():
        for run in plan:
            if astuple(run) in log.records:
                continue
            if limit is not None and count >= limit:
                break
            record = bench.run(run)
            log.append(record)
            print(json.dumps(shown(record)), flush=True)
            count += 1
    return count


def shown(record: dict) -> dict:
    full = record["scales"]["1"]
    kept = {name: full[name] for name in ("test_loss", "kl_descriptions", "kl_code", "kl_far")}
    times = {name: record[name] for name in ("cpu_seconds_per_step", "preparation_cpu_seconds", "peak_mib", "seconds")}
    return {**{name: record[name] for name in FIELDS}, **kept, **times}
