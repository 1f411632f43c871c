# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a recommendation costs, in training steps: `compute_ntk` and `recommend`, against LoRA on all linear modules.

    python -m examples.benchmarks.recommendation_cost

MiniLM on real texts: 64 examples of 8 logits, 37 candidates; the goal is the time of 20 training steps of batch 32. A
GPT-2 (12 layers of width 768, random weights, the full vocabulary) as a language model: 64 examples of 32 tokens, 48
candidates, 30 steps. A language model has one output an example here, the log-likelihood of its tokens: its logits are
50,257 at every position. Training steps and recommendations take turns in one process, so that other load on the
machine affects both. Times are of the processor on a CPU, and by the clock beside them. Peak memory is what a call
adds, in a process of its own. Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from examples.benchmarks.recommendation_cost.report import BUDGET, CRITERIA, missed, report, write
from examples.common.machine import added_mebibytes, number_of_new_process, synchronise
from examples.common.models import bert, copy_sharing_weights
from examples.common.reports import Folders, add_output, circumstances, command_line
from examples.common.tasks import load_task
from examples.common.training import trained_parameters
from peft_linear import Recommendation, Resources, recommend
from peft_linear.kernels import ModuleKernels
from peft_linear.selection.request import ModuleRequest


MODULE = "examples.benchmarks.recommendation_cost"
BATCH = 32

Batch = dict[str, Any]
Kernels = tuple[ModuleKernels, tuple[ModuleKernels, ...]]  # of the model, and of its loss with each head


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
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=setting.task_type)
        self.model = get_peft_model(copy_sharing_weights(setting.model), config).train()
        self.optimizer = torch.optim.AdamW(trained_parameters(self.model), lr=1e-4)
        self.batches = cycle([to(batch, device) for batch in setting.training])

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(**next(self.batches)).loss.backward()
            self.optimizer.step()


def kernels_of(setting: Setting, rank: int, criterion: str) -> Kernels:
    """What `recommend_modules` computes for a criterion."""
    kernels = {"rank": rank, "lora_alpha": 2.0 * rank, "outputs": setting.outputs}
    request = ModuleRequest(budget=1, criterion=criterion, kernels=kernels, resources=Resources(progress=False))
    return request.compute_kernels(setting.model, setting.examples)


def choice(computed: Kernels, criterion: str) -> Recommendation:
    kernels, heads = computed
    return recommend(kernels, BUDGET, criterion, heads=heads)


def timed(function: Callable[..., Any], *arguments: Any, device: str) -> tuple[float, float, Any]:
    """Seconds of the processor (on a GPU: of the clock), seconds of the clock, and what the function returned."""
    synchronise(device)
    clock, processor = time.perf_counter(), time.process_time()
    result = function(*arguments)
    synchronise(device)
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
    measured: dict[str, list[tuple[float, float]]] = {key: [] for key in keys}

    def steps() -> None:
        *seconds, _ = timed(training.run, setting.steps, device=device)
        measured["step"].append((seconds[0] / setting.steps, seconds[1] / setting.steps))

    def recommendation() -> ModuleKernels:
        for name in CRITERIA:
            *seconds, computed = timed(kernels_of, setting, rank, name, device=device)
            measured[f"kernels, {name}"].append((seconds[0], seconds[1]))
            *seconds, _ = timed(choice, computed, name, device=device)
            measured[name].append((seconds[0], seconds[1]))
        return computed[0]

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
        "seconds": {name: statistics.median(cpu for cpu, _ in values) for name, values in measured.items()},
        "in_steps": {name: ratios(measured, name, clock=0) for name in CRITERIA},
        "in_steps_by_the_clock": {name: ratios(measured, name, clock=1) for name in CRITERIA},
    }


def ratios(measured: Mapping[str, Sequence[tuple[float, float]]], criterion: str, clock: int) -> dict[str, float]:
    """Kernels and choice in training steps of the same round: median, least and most over rounds."""
    values = [
        (kernels[clock] + choice[clock]) / step[clock]
        for kernels, choice, step in zip(
            measured[f"kernels, {criterion}"], measured[criterion], measured["step"], strict=True
        )
    ]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def print_peak(case: str, what: str, rank: int, device: str) -> None:
    """MiB that a training step or a recommendation adds to what the process holds before it."""
    setting = build(case, device)
    if what == "step":
        training = Training(setting, rank, device)
    action = (lambda: training.run(1)) if what == "step" else (lambda: choice(kernels_of(setting, rank, what), what))
    print(added_mebibytes(action, device))


def peak_mebibytes(case: str, what: str, rank: int, device: str) -> float:
    return number_of_new_process(MODULE, "--peak-of", case, what, "--rank", str(rank), "--device", device)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.peak_of:
        print_peak(*options.peak_of, options.rank, options.device)
        return 0
    about = circumstances(command_line(MODULE, argv if argv is not None else sys.argv[1:]), options.date)
    of_case = {"rounds": options.rounds, "rank": options.rank, "command": about.pop("command")}
    results: dict[str, Any] = {"note": options.note, **about, "cases": {}}
    folders = Folders.of("benchmarks/recommendation_cost", "recommendation_cost", options.output)
    for case in options.cases:
        row = of_case | measure(case, options.rounds, options.rank, options.device)
        if "memory" in options.measure:
            kinds = ("step", CRITERIA[0])
            row["peak_mebibytes"] = {what: peak_mebibytes(case, what, options.rank, options.device) for what in kinds}
        results["cases"][case] = row
        write(results, folders)  # after each case, so that one that fails loses no other
    print(report(results))
    for line in missed(results):
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed(results) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["minilm", "gpt2"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--measure", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--note", default="", help="what a reader should know of the machine; goes into the report")
    add_output(parser)
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "WHAT"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)
