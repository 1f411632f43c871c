# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Is the cost model right? LoRA steps of fifteen sets of modules, predicted and measured.

    python -m examples.benchmarks.step_cost

Steps are whole: forward and backward pass of peft's LoRA, AdamW, zero_grad. The sets take turns, so that other load on
the machine affects all of them; times are of the processor on a CPU (one thread), of the clock on a GPU, medians over
rounds, relative to the all-linear step at rank 8. Memory is what autograd keeps between forward and backward pass: the
different storages it saves, without parameters, which is exact. Exits with 1 where a prediction is more than 15 % off.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from examples.benchmarks.step_cost.cases import MODELS, Ranks, batch, sets
from examples.benchmarks.step_cost.report import missed, report
from examples.common.files import save_json, save_text
from examples.common.machine import clock
from examples.common.models import copy_sharing_weights
from examples.common.reports import circumstances, command_line
from examples.common.training import trained_parameters
from peft_linear.capture.step_cost import step_record
from peft_linear.recommendation.cost import StepCost


MODULE = "examples.benchmarks.step_cost"
CASES = ("smollm2-135m", "llama", "gpt2", "llama@128", "llama+checkpointing")
TOKENS = 64


class Step:
    """LoRA training of one set, a step at a time, on a model that shares the base's weights."""

    def __init__(self, base: nn.Module, ranks: Ranks, inputs: Mapping[str, Tensor], checkpointing: bool) -> None:
        rank = next(iter(ranks.values()))
        config = LoraConfig(r=rank, lora_alpha=16, target_modules=list(ranks), task_type="CAUSAL_LM")
        self.model = get_peft_model(copy_sharing_weights(base), config).train()
        if checkpointing:
            layers = self.model.get_base_model()
            layers.gradient_checkpointing_enable({"use_reentrant": False})
            layers.disable_input_require_grads()
        self.inputs = inputs
        self.optimizer = torch.optim.AdamW(trained_parameters(self.model), lr=1e-5)

    def run(self) -> None:
        self.model(**self.inputs).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept_bytes(self) -> int:
        """Of the different storages that autograd saves, without parameters and buffers."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(**self.inputs).loss
        del loss
        return sum(storages.values())


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """{set: seconds, bytes, and the counts behind both predictions}."""
    name, tokens, checkpointing = parse_case(case)
    base = MODELS[name]().to(options.device)
    inputs = batch(base, options.examples, tokens)
    cost = StepCost.from_record(step_record(base, inputs)).with_checkpointing(checkpointing)
    chosen = sets(cost)
    steps = {key: Step(base, ranks, inputs, checkpointing) for key, ranks in chosen.items()}
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for step in steps.values():
        step.run()
    for number in range(options.rounds):
        for key in list(steps)[:: -1 if number % 2 else 1]:
            start = clock(options.device)
            steps[key].run()
            seconds[key].append(clock(options.device) - start)
    rows = {}
    for key, ranks in chosen.items():
        work = cost.work(ranks)
        rows[key] = {
            "modules": len(ranks),
            "seconds": statistics.median(seconds[key]),
            "spread": (max(seconds[key]) - min(seconds[key])) / statistics.median(seconds[key]),
            "work": [work.flops, work.moved, work.calls],
            "predicted_time": cost.time(ranks),
            "kept_bytes": None if checkpointing else steps[key].kept_bytes(),
            "predicted_bytes": cost.activations(ranks),
            "memory_share": cost.memory_share(ranks, 8),
        }
    return {"batch": [options.examples, tokens], "sets": rows}


def parse_case(case: str) -> tuple[str, int, bool]:
    """(model, tokens of a text, checkpointing) of "llama", "llama@128" or "llama@64+checkpointing"."""
    place, _, way = case.partition("+")
    name, _, tokens = place.partition("@")
    if name not in MODELS or way not in ("", "checkpointing") or not (tokens or "1").isdigit():
        raise SystemExit(f"cannot read the case {case!r}; models: {', '.join(MODELS)}")
    return name, int(tokens or TOKENS), bool(way)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        **circumstances(command_line(MODULE, argv if argv is not None else sys.argv[1:]), options.date),
        "note": options.note,
        "cases": {},
    }
    for case in options.cases:
        results["cases"][case] = measure(case, options)
        save_json(options.output / "results.json.gz", results)
        save_text(options.output / "summary.md", report(results))
    print(report(results))
    for line in missed(results):
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed(results) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=CASES, help='model, tokens of a text: "llama@128", and "+checkpointing"'
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--note", default="", help="what a reader should know of the machine; goes into the report")
    parser.add_argument("--date", help="of the report (default: today)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for summary.md and records")
    return parser.parse_args(argv)
