# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a training step of the linearised model costs, in LoRA steps: time and peak memory, as ratios within one run.

    python -m examples.benchmarks.linearised_cost

A step is forward and backward pass and AdamW's step on LoRA (r = 8) on all linear modules, in float32. Steps of both
kinds alternate, and the time is the median of their paired ratios: processor time on a CPU, which what else runs on
the machine hardly moves. Memory is what steps add at their peak, each kind in processes of its own. The linear model
has no dropout, so it is compared with LoRA without; with the dropout of the model's config, LoRA's own step is more
expensive.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from examples.common.files import save_json, save_text
from examples.common.machine import added_mebibytes, clock, number_of_new_process
from examples.common.models import CLASSIFIERS
from examples.common.reports import Folders, add_output, as_page, circumstances, command_line, provenance
from examples.common.training import trained_parameters
from peft_linear import linearize
from peft_linear.report.markdown import markdown_table


MODULE = "examples.benchmarks.linearised_cost"
LORA, DROPOUT, LINEARISED = "LoRA", "LoRA with dropout", "linearised"
KINDS = (LORA, LINEARISED, DROPOUT)
TIME_GOAL, MEMORY_GOAL = 2.5, 2.0  # × a LoRA step
DEFAULT_CASES = ("bert-32x128", "gpt2-8x64")


def make_step(case: str, kind: str, device: str) -> Callable[[], None]:
    """A function that takes one training step, with its own model and optimizer."""
    factory, examples, tokens = CLASSIFIERS[case]
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(factory().to(device), config)
    trained = linearize(model) if kind == LINEARISED else model.train(kind == DROPOUT)
    batch = {
        "input_ids": torch.randint(2, 2000, (examples, tokens), device=device),
        "labels": torch.arange(examples, device=device) % 2,
    }
    optimizer = torch.optim.AdamW(trained_parameters(trained), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        trained(**batch).loss.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    start = clock(device)
    step()
    return clock(device) - start


def time_case(case: str, rounds: int, device: str) -> dict[str, Any]:
    """Medians over the rounds; a round takes a step of each kind, in turn the one and the other first."""
    steps = {kind: make_step(case, kind, device) for kind in KINDS}
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            taken[kind].append(seconds(steps[kind], device))
    ratios = {
        kind: [linear / lora for linear, lora in zip(taken[LINEARISED], taken[kind], strict=True)]
        for kind in (LORA, DROPOUT)
    }
    return {
        "seconds": {kind: statistics.median(values) for kind, values in taken.items()},
        "time_ratio": statistics.median(ratios[LORA]),
        "time_ratio_low": min(ratios[LORA]),
        "time_ratio_high": max(ratios[LORA]),
        "time_ratio_with_dropout": statistics.median(ratios[DROPOUT]),
    }


def memory_case(case: str, repeats: int, device: str) -> dict[str, Any]:
    """Medians over processes."""

    def peak(kind: str) -> float:
        return number_of_new_process(MODULE, "--peak-of", case, kind, "--device", device)

    peaks = {kind: statistics.median(peak(kind) for _ in range(repeats)) for kind in KINDS}
    return {
        "peak_mib": peaks,
        "memory_ratio": peaks[LINEARISED] / peaks[LORA],
        "memory_ratio_with_dropout": peaks[LINEARISED] / peaks[DROPOUT],
    }


def print_peak(case: str, kind: str, device: str) -> None:
    """MiB that two steps add at their peak (the second one has the optimizer's state beside it)."""
    step = make_step(case, kind, device)
    print(added_mebibytes(lambda: (step(), step()), device))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.peak_of:
        print_peak(*options.peak_of, options.device)
        return 0
    given = argv if argv is not None else sys.argv[1:]
    record: dict[str, Any] = {
        "cases": {},
        "rounds": options.rounds,
        "repeats": options.repeats,
        **circumstances(command_line(MODULE, given), options.date),
    }
    for case in options.cases:
        row = time_case(case, options.rounds, options.device)
        row |= memory_case(case, options.repeats, options.device)
        record["cases"][case] = row
        print(f"{case}: {row['time_ratio']:.2f} × the time, {row['memory_ratio']:.2f} × the memory", flush=True)
    text = report(record)
    print(text)
    folders = Folders.of("benchmarks/linearised_cost", "linearised_cost", options.output)
    save_json(folders.runs / "results.json.gz", record)
    save_text(folders.summary / "README.md", text)
    return 0


def report(record: Mapping[str, Any]) -> str:
    """README.md."""
    header = (
        "model, batch", "time of a LoRA step", "linearised", "ratio", "lowest to highest", f"at most {TIME_GOAL:g}",
        "peak of a LoRA step", "linearised", "ratio", f"at most {MEMORY_GOAL:g}",
    )  # fmt: skip
    rows, beside = [], []
    for case, row in record["cases"].items():
        rows.append(
            (
                case,
                f"{row['seconds'][LORA]:.2f} s",
                f"{row['seconds'][LINEARISED]:.2f} s",
                f"{row['time_ratio']:.2f}",
                f"{row['time_ratio_low']:.2f} to {row['time_ratio_high']:.2f}",
                _reached(row["time_ratio"] <= TIME_GOAL),
                f"{row['peak_mib'][LORA]:.0f} MiB",
                f"{row['peak_mib'][LINEARISED]:.0f} MiB",
                f"{row['memory_ratio']:.2f}",
                _reached(row["memory_ratio"] <= MEMORY_GOAL),
            )
        )
        ratios = row["time_ratio_with_dropout"], row["memory_ratio_with_dropout"]
        beside.append(f"{case} {ratios[0]:.2f} × the time and {ratios[1]:.2f} × the memory")
    return as_page(
        [
            "# Cost of a step of the linearised model",
            "A training step of `linearize(model)` against one of the model itself without dropout: LoRA of rank 8 "
            "on all linear modules, AdamW, float32. `bert-32x128` has 6 layers of width 384 and a batch of 32 × 128 "
            f"tokens, `gpt2-8x64` 12 layers of width 768 and 8 × 64 tokens. Medians over {record['rounds']} pairs of "
            f"steps; the memory that steps add at their peak, median of {record['repeats']} process(es).",
            markdown_table(header, rows, right=range(1, len(header))),
            f"Against a LoRA step with dropout as the config has it: {'; '.join(beside)}.",
            provenance(record),
        ]
    )


def _reached(reached: bool) -> str:
    return "yes" if reached else "no"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CLASSIFIERS, default=DEFAULT_CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="processes for each measurement of memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_output(parser)
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "KIND"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)
