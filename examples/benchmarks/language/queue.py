# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Works through the plan, one run after the other; stop it at any time and start it again with the same command."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial

from torch import Tensor, nn

from .accuracy import accuracy
from .arms import ArmRequest, budget_parameters, choose_ranks
from .batches import Encoded, encode, pad
from .models import load_language_model
from .plan import Group, Run, best_rate, next_rate
from .run_log import RunLog
from .tasks import load_task
from .training import ALPHA, BATCH, STEPS, mean_loss, train


EXAMPLES, ROWS = 32, 8  # that a decision is made from


class Bench:
    """Holds one model and the tokens of its tasks; loads another one when a run asks for it."""

    def __init__(self, load: Callable = load_language_model, steps: int = STEPS) -> None:
        self.load = load
        self.steps = steps
        self.name: str | None = None
        self.model: nn.Module | None = None
        self.tokens: dict[str, dict[str, list[Encoded]]] = {}
        self.start: dict[str, tuple[float, float]] = {}

    def prepare(self, model: str, task: str) -> None:
        if self.name != model:
            self.model, self.tokenizer = self.load(model)
            self.name, self.tokens, self.start = model, {}, {}
        if task not in self.tokens:
            examples = load_task(task)
            self.tokens[task] = {
                split: [encode(self.tokenizer, example) for example in getattr(examples, split)]
                for split in ("train", "validation", "test")
            }
            losses = [mean_loss(self.model, self.tokens[task][split]) for split in ("validation", "test")]
            self.start[task] = (round(losses[0], 5), round(losses[1], 5))

    def padded(self, task: str) -> list[dict[str, Tensor]]:
        """The first EXAMPLES training examples of a prepared task, as a collator gives them."""
        padding = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
        examples = self.tokens[task]["train"][:EXAMPLES]
        return [pad(examples[start : start + ROWS], padding) for start in range(0, len(examples), ROWS)]

    def run(self, run: Run, with_accuracy: bool = False) -> dict:
        """The record of one run."""
        self.prepare(run.model, run.task)
        parameters = budget_parameters(self.model, run.budget)
        begin = time.perf_counter()
        request = ArmRequest(self.model, parameters, lambda: self.tokens[run.task]["train"], run.seed)
        ranks = choose_ranks(run.arm, request)
        choice = time.perf_counter() - begin
        validation, test = self.start[run.task]
        measure = partial(accuracy, tokenizer=self.tokenizer, task=load_task(run.task)) if with_accuracy else None
        result = train(self.model, ranks, self.tokens[run.task], run.rate, run.seed, self.steps, measure)
        return {
            **asdict(run),
            **result,
            "start_validation_loss": validation,
            "start_test_loss": test,
            "modules": len(ranks),
            "ranks": sorted(set(ranks.values())),
            "budget_parameters": parameters,
            "choice_seconds": round(choice, 2),
            "scaling": f"{ALPHA}/r of each module",
            "steps": self.steps,
            "batch": BATCH,
            "date": datetime.date.today().isoformat(),
        }


def work(log: RunLog, plan: Iterable[Group], bench: Bench, limit: int | None = None) -> int:
    """Trains what is not there yet, at most `limit` runs; returns how many it trained."""
    count = 0
    with log.locked():
        for group in plan:
            while (rate := next_rate(group.model, log.seen(group))) is not None:
                if limit is not None and count >= limit:
                    return count
                record_run(log, bench.run(Run(**asdict(group), rate=rate)))
                count += 1
    return count


def count_right_answers(log: RunLog, plan: Iterable[Group], bench: Bench, limit: int | None = None) -> int:
    """Trains complete groups of verifiable tasks again at their best rate, with accuracy, into accuracy.jsonl."""
    answers = RunLog(log.path.parent, shipped=None, name="accuracy")
    count = 0
    with answers.locked():
        for group in plan:
            seen = log.seen(group)
            if load_task(group.task).verify is None or next_rate(group.model, seen) is not None or answers.seen(group):
                continue
            if limit is not None and count >= limit:
                return count
            record_run(answers, bench.run(Run(**asdict(group), rate=best_rate(seen)), with_accuracy=True))
            count += 1
    return count


def fill(log: RunLog, groups: Iterable[Group], record_of: Callable[[Group], dict], limit: int | None = None) -> int:
    """Makes the record of every group that has none yet, at most `limit`; returns how many it made."""
    count = 0
    with log.locked():
        for group in dict.fromkeys(groups):
            if log.seen(group):
                continue
            if limit is not None and count >= limit:
                return count
            record_run(log, record_of(group))
            count += 1
    return count


def record_run(log: RunLog, record: dict) -> None:
    log.append(record)
    shown = ("model", "task", "budget", "arm", "seed", "rate", "validation_loss", "test_loss", "accuracy", "seconds")
    print(json.dumps({key: record[key] for key in shown if key in record}), flush=True)
