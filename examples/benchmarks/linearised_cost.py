# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a training step of the linearised model costs, in LoRA steps: time and peak memory, as ratios within one run.

    python examples/benchmarks/linearised_cost.py --output docs/measurements/linearised_cost

A step is forward and backward pass and AdamW's step on LoRA (r = 8) on all linear modules, in float32. Steps of both
kinds alternate, and the time is the median of their paired ratios: processor time on a CPU, which what else runs on
the machine hardly moves. Memory is what steps add at their peak, each kind in processes of its own. The linear model
has no dropout, so it is compared with LoRA without; with the dropout of the model's config, LoRA's own step is dearer.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ntk_memory import peak_bytes
from ntk_speed import CASES, synchronise
from peft import LoraConfig, get_peft_model

from peft_linear import linearize
from peft_linear.report.markdown import markdown_table


LORA, DROPOUT, LINEARISED = "LoRA", "LoRA with dropout", "linearised"
KINDS = (LORA, LINEARISED, DROPOUT)
TIME_GOAL, MEMORY_GOAL = 2.5, 2.0  # × a LoRA step
EVERYDAY = ("bert-32x128", "gpt2-8x64")


def make_step(case: str, kind: str, device: str) -> Callable[[], None]:
    """A function that takes one training step, with its own model and optimizer."""
    factory, examples, tokens = CASES[case]
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(factory().to(device), config)
    trained = linearize(model) if kind == LINEARISED else model.train(kind == DROPOUT)
    batch = {
        "input_ids": torch.randint(2, 2000, (examples, tokens), device=device),
        "labels": torch.arange(examples, device=device) % 2,
    }
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        trained(**batch).loss.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronise(device)
    start = clock()
    step()
    synchronise(device)
    return clock() - start


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
    peaks = {kind: statistics.median(peak(case, kind, device) for _ in range(repeats)) for kind in KINDS}
    return {
        "peak_mib": peaks,
        "memory_ratio": peaks[LINEARISED] / peaks[LORA],
        "memory_ratio_with_dropout": peaks[LINEARISED] / peaks[DROPOUT],
    }


def peak(case: str, kind: str, device: str) -> float:
    command = [sys.executable, __file__, "--peak-of", case, kind, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {kind} on {case} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def print_peak(case: str, kind: str, device: str) -> None:
    """MiB that two steps add at their peak (the second one has the optimizer's state beside it)."""
    step = make_step(case, kind, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = peak_bytes()
    step()
    step()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()
    print((after - before) / 2**20)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.peak_of:
        print_peak(*options.peak_of, options.device)
        return 0
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    record = {
        "cases": {},
        "rounds": options.rounds,
        "repeats": options.repeats,
        "command": "python examples/benchmarks/linearised_cost.py "
        + " ".join(argv if argv is not None else sys.argv[1:]),
        "date": options.date or date.today().isoformat(),
        "machine": f"{platform.machine()}, {machine}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    for case in options.cases:
        row = time_case(case, options.rounds, options.device)
        row |= memory_case(case, options.repeats, options.device)
        record["cases"][case] = row
        print(f"{case}: {row['time_ratio']:.2f} × the time, {row['memory_ratio']:.2f} × the memory", flush=True)
    text = report(record)
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (options.output / "README.md").write_text(text, encoding="utf-8")
    return 0


def report(record: dict) -> str:
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
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    text = [
        "# Cost of a step of the linearised model",
        "A training step of `linearize(model)` against one of the model itself without dropout: LoRA of rank 8 on all "
        "linear modules, AdamW, float32. `bert-32x128` has 6 layers of width 384 and a batch of 32 × 128 tokens, "
        f"`gpt2-8x64` 12 layers of width 768 and 8 × 64 tokens. Medians over {record['rounds']} pairs of steps; the "
        f"memory that steps add at their peak, median of {record['repeats']} process(es).",
        markdown_table(header, rows, right=range(1, len(header))),
        f"Against a LoRA step with dropout as the config has it: {'; '.join(beside)}.",
        f"`{record['command']}`, {record['date']}, {record['machine']}, {versions}.",
    ]
    return "\n\n".join(text) + "\n"


def _reached(reached: bool) -> str:
    return "yes" if reached else "no"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=EVERYDAY)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="processes for each measurement of memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--date", help="of the report (default: today)")
    parser.add_argument("--output", type=Path, help="folder for results.json and README.md")
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "KIND"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
