# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The command of the forgetting benchmark on language models.

    python -m examples.benchmarks.forgetting_language             train what is not there yet, until stopped
    python -m examples.benchmarks.forgetting_language --report    summary, figure and compressed runs of what is there

Results are in build/forgetting_language; started again, the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/forgetting_language"), help="folder of runs.jsonl")
    parser.add_argument("--limit", type=int, help="stop after so many runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--steps", type=int, help="steps of a try in an --output of its own; default: 60")
    parser.add_argument("--model", help="the runs of this model alone")
    parser.add_argument("--task", help="the runs of this task alone")
    parser.add_argument("--arm", help="the runs of this arm alone")
    parser.add_argument("--report", action="store_true", help="write summary.md, the figure and the compressed runs")
    arguments = parser.parse_args(argv)
    if arguments.report:
        from .report import write_report

        return write_report(arguments.output)

    import torch

    from .plan import runs
    from .queue import SHIPPED, Bench, open_log, work

    torch.set_num_threads(arguments.threads)
    wanted = [
        run
        for run in runs()
        if arguments.model in (None, run.model)
        and arguments.task in (None, run.task)
        and arguments.arm in (None, run.arm)
    ]
    bench = Bench() if arguments.steps is None else Bench(steps=arguments.steps)
    log = open_log(arguments.output, SHIPPED if arguments.steps is None else None)
    print(f"{work(log, wanted, bench, arguments.limit)} runs trained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
