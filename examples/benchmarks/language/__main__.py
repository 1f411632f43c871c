# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The language bench's command.

    python -m examples.benchmarks.language             train what is not there yet, until stopped
    python -m examples.benchmarks.language --kept      the two kept tasks, once everything is decided
    python -m examples.benchmarks.language --accuracy  train again at the best rates and count right answers
    python -m examples.benchmarks.language --planned   decide by `recommend_modules`, and train that
    python -m examples.benchmarks.language --scores    how one Adam step orders the arms
    python -m examples.benchmarks.language --report    tables from the runs that are there

Results are in build/language_bench; started again, the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/language_bench"), help="folder of runs.jsonl")
    parser.add_argument("--kept", action="store_true", help="train the kept tasks")
    parser.add_argument("--limit", type=int, help="stop after so many runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--model", help="the runs of this model alone")
    parser.add_argument("--task", help="the runs of this task alone")
    parser.add_argument("--accuracy", action="store_true", help="right answers of the tasks that have one")
    parser.add_argument("--planned", action="store_true", help="train what recommend_modules decides for each cell")
    parser.add_argument("--scores", action="store_true", help="score all arms by one Adam step")
    parser.add_argument("--budget", default="1/8", help="of --planned and --scores: 1/8, 1/2 or 1/16")
    parser.add_argument("--report", action="store_true", help="write summary.md and the compressed runs")
    arguments = parser.parse_args(argv)
    if arguments.report:
        from .report import write_report

        return write_report(arguments.output)

    import torch

    from .plan import groups
    from .queue import Bench, count_right_answers, work
    from .run_log import RunLog

    torch.set_num_threads(arguments.threads)
    plan = [
        group
        for group in groups(arguments.kept)
        if arguments.model in (None, group.model) and arguments.task in (None, group.task)
    ]
    if arguments.planned or arguments.scores:
        from . import planned, scores
        from .queue import fill

        made, record_of = (planned, planned.run_plan) if arguments.planned else (scores, scores.score_cell)
        cells = [
            replace(group, arm=made.NAME) for group in plan if group.budget == arguments.budget and group.seed == 0
        ]
        log = RunLog(arguments.output, made.SHIPPED, made.NAME)
        print(f"{fill(log, cells, partial(record_of, Bench()), arguments.limit)} cells done")
        return 0
    step = count_right_answers if arguments.accuracy else work
    print(f"{step(RunLog(arguments.output), plan, Bench(), arguments.limit)} runs trained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
