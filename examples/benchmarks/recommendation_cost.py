# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a recommendation costs, in training steps: `compute_ntk` and `recommend`, against LoRA on all linear modules.

    python examples/benchmarks/recommendation_cost.py --output docs/measurements/recommendation_cost

MiniLM on real texts: 64 examples of 8 logits, 37 candidates; the goal is the time of 20 training steps of batch 32. A
GPT-2 (12 layers of width 768, random weights, the full vocabulary) as a language model: 64 examples of 32 tokens, 48
candidates, 30 steps. A language model has one output an example here, the log-likelihood of its tokens: its logits are
50,257 at every position. Training steps and recommendations take turns in one process, so that what else the machine
does meets both. Times are of the processor on a CPU, and by the clock beside them. Peak memory is what a call adds, in
a process of its own. Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/common.py, from wherever this is started

import torch
from common import load_task
from ntk_memory import describe_machine, peak_bytes
from ntk_speed import bert
from peft import LoraConfig, get_peft_model
from recommendation_cost_report import BUDGET, CRITERIA, missed, report, write
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_linear import Recommendation, recommend
from peft_linear.kernels import ModuleKernels
from peft_linear.selection.workflow import look


BATCH = 32

Batch = dict[str, Any]
Looks = tuple[ModuleKernels, tuple[ModuleKernels, ...]]


@dataclass
class Setting:
    """A model with data, and the number of training steps that a recommendation may take as long as."""

    model: nn.Module
    examples: list[Batch]  # that the kernels are computed on
    training: list[Batch]
    outputs: str
    task_type: str
    goal: int
    steps: int = 1  # training steps a round


def minilm() -> Setting:
    task = load_task(max_length=64, limits=(640, 64, 64))
    training = [task.collator(task.train[first : first + BATCH]) for first in range(0, 20 * BATCH, BATCH)]
    examples = task.calibration(64, batch_size=BATCH)
    return Setting(task.new_model(0), examples, training, "logits", "SEQ_CLS", goal=20, steps=5)


def gpt2() -> Setting:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    batches = []
    for _ in range(3):
        ids = torch.randint(2, 50000, (BATCH, 32))
        batches.append({"input_ids": ids, "labels": ids})
    return Setting(model, batches[:2], batches[2:], "log_likelihood", "CAUSAL_LM", goal=30)


def tiny() -> Setting:
    torch.manual_seed(0)
    ids = torch.randint(2, 2000, (10, 8))
    batch = {"input_ids": ids, "labels": torch.arange(10) % 2}
    return Setting(bert(5, 48), [batch], [batch], "logits", "SEQ_CLS", goal=10_000)


CASES: dict[str, Callable[[], Setting]] = {"minilm": minilm, "gpt2": gpt2, "tiny": tiny}


def to(batch: Mapping[str, Any], device: str) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


class Training:
    """LoRA on all linear modules with AdamW, a step at a time, on a model that shares the base's weights."""

    def __init__(self, setting: Setting, rank: int, device: str) -> None:
        memo = {id(parameter): parameter for parameter in setting.model.parameters()}  # shared, not copied
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=setting.task_type)
        self.model = get_peft_model(copy.deepcopy(setting.model, memo), config).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.batches = cycle([to(batch, device) for batch in setting.training])

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(**next(self.batches)).loss.backward()
            self.optimizer.step()


def looks_of(setting: Setting, rank: int, criterion: str) -> Looks:
    """What `recommend_modules` computes for a criterion."""
    arguments = {"rank": rank, "lora_alpha": 2 * rank, "outputs": setting.outputs, "progress": False}
    return look(setting.model, setting.examples, criterion, **arguments)


def choice(looks: Looks, criterion: str) -> Recommendation:
    kernels, heads = looks
    return recommend(kernels, BUDGET, criterion, heads=heads)


def timed(function: Callable[..., Any], *arguments: Any, device: str) -> tuple[float, float, Any]:
    """Seconds of the processor (on a GPU: of the clock), seconds of the clock, and what the function returned."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock, processor = time.perf_counter(), time.process_time()
    result = function(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    processor, clock = time.process_time() - processor, time.perf_counter() - clock
    return clock if device == "cuda" else processor, clock, result


def build(case: str, device: str) -> Setting:
    setting = CASES[case]()
    setting.model = setting.model.to(device).eval()
    setting.examples = [to(batch, device) for batch in setting.examples]
    return setting


def measure(case: str, rounds: int, rank: int, device: str) -> dict[str, Any]:
    """Times over rounds, each of training steps and a recommendation; first one or the other comes first."""
    setting = build(case, device)
    training = Training(setting, rank, device)
    training.run(1)
    keys = ["step", *CRITERIA, *(f"kernels, {name}" for name in CRITERIA)]
    seen: dict[str, list[tuple[float, float]]] = {key: [] for key in keys}

    def steps() -> None:
        *seconds, _ = timed(training.run, setting.steps, device=device)
        seen["step"].append((seconds[0] / setting.steps, seconds[1] / setting.steps))

    def recommendation() -> ModuleKernels:
        for name in CRITERIA:
            *seconds, looks = timed(looks_of, setting, rank, name, device=device)
            seen[f"kernels, {name}"].append((seconds[0], seconds[1]))
            *seconds, _ = timed(choice, looks, name, device=device)
            seen[name].append((seconds[0], seconds[1]))
        return looks[0]

    for number in range(rounds):
        if number % 2:
            kernels = recommendation()
            steps()
        else:
            steps()
            kernels = recommendation()
    return {
        "candidates": len(kernels),
        "examples": kernels.num_examples,
        "outputs": kernels.num_outputs,
        "output_kind": kernels.output_kind,
        "goal_steps": setting.goal,
        "seconds": {name: statistics.median(cpu for cpu, _ in values) for name, values in seen.items()},
        "in_steps": {name: ratios(seen, name, clock=0) for name in CRITERIA},
        "in_steps_by_the_clock": {name: ratios(seen, name, clock=1) for name in CRITERIA},
    }


def ratios(seen: Mapping[str, Sequence[tuple[float, float]]], criterion: str, clock: int) -> dict[str, float]:
    """Kernels and choice in training steps of the same round: median, least and most over rounds."""
    values = [
        (kernels[clock] + choice[clock]) / step[clock]
        for kernels, choice, step in zip(seen[f"kernels, {criterion}"], seen[criterion], seen["step"], strict=True)
    ]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def print_peak(case: str, what: str, rank: int, device: str) -> None:
    """MiB that a training step or a recommendation adds to what the process holds before it."""
    setting = build(case, device)
    if what == "step":
        training = Training(setting, rank, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else peak_bytes()
    if what == "step":
        training.run(1)
    else:
        choice(looks_of(setting, rank, what), what)
    print(((torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()) - before) / 2**20)


def peak_megabytes(case: str, what: str, rank: int, device: str) -> float:
    command = [sys.executable, __file__, "--peak-of", case, what, "--rank", str(rank), "--device", device]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["minilm", "gpt2"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--measure", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--note", default="", help="what a reader should know of the machine; goes into the report")
    parser.add_argument("--output", type=Path, help="folder of results.json and README.md")
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peak_of:
        print_peak(*options.peak_of, options.rank, options.device)
        return 0
    given = argv if argv is not None else sys.argv[1:]
    about = {
        "rounds": options.rounds,
        "rank": options.rank,
        "command": shlex.join(["python", "examples/benchmarks/recommendation_cost.py", *given]),
    }
    results: dict[str, Any] = {
        "note": options.note,
        "date": date.today().isoformat(),
        "machine": describe_machine() if options.device == "cpu" else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "cases": {},
    }
    for case in options.cases:
        row = about | measure(case, options.rounds, options.rank, options.device)
        if "memory" in options.measure:
            kinds = ("step", CRITERIA[0])
            row["peak_mebibytes"] = {what: peak_megabytes(case, what, options.rank, options.device) for what in kinds}
        results["cases"][case] = row
        if options.output:  # after each case, so that one that fails loses no other
            write(results, options.output)
    print(report(results))
    for line in missed(results):
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
