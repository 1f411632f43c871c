# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of `compute_ntk` against its floor and its peers, as ratios within one run.

The floor is one forward and C backward passes with respect to activations: what no method that differentiates the
network can do without. Peers: torch.func's Jacobian contraction over the adapter's parameters alone (best chunk size),
the authors' way (example by example, over all parameters, keeping the adapter's), nngeometry's and TRAK's Jacobians.

    pip install -e '.[bench]' && pip install --no-deps nngeometry
    python examples/benchmarks/ntk_speed.py --output docs/measurements/ntk_speed
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from ntk_memory import peak_bytes
from ntk_peers import PEERS, Case, find_best_chunk
from ntk_speed_report import DRAWS, FLOOR, OURS, STEP, table, write
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from peft_linear import compute_ntk
from peft_linear.capture.layers import layer_of
from peft_linear.capture.recorder import recording
from peft_linear.capture.targets import resolve_targets


def bert(layers=6, width=384) -> torch.nn.Module:
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * width,
        vocab_size=2000,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def gpt2(layers=12, width=768) -> torch.nn.Module:
    config = GPT2Config(
        vocab_size=2000,
        n_embd=width,
        n_layer=layers,
        n_head=12,
        num_labels=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2ForSequenceClassification(config)


def llama_1b() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_labels=2,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


CASES: dict[str, tuple[Callable, int, int]] = {  # model, N, T
    "bert-32x128": (bert, 32, 128),
    "bert-128x32": (bert, 128, 32),
    "gpt2-8x64": (gpt2, 8, 64),
    "llama1b-16x128": (llama_1b, 16, 128),  # on a GPU only
    "tiny": (lambda: bert(2, 48), 4, 8),
}
ON_CPU = ("bert-32x128", "bert-128x32", "gpt2-8x64")


def build(name: str, space: str, device: str) -> Case:
    factory, n, t = CASES[name]
    torch.manual_seed(0)
    model = factory().to(device).eval()
    ids = torch.randint(2, 2000, (n, t), device=device)
    return Case(model, {"input_ids": ids}, space, tuple(resolve_targets(model)), rank=8, lora_alpha=16.0)


def floor(case: Case) -> None:
    """One forward pass and C backward passes to the output of the lowest target, nothing kept."""
    name, module = next(iter(resolve_targets(case.model).items()))
    with recording(case.model, {name: layer_of(name, module)}) as recorder:
        outputs = case.model(**case.batch).logits
        for a in range(outputs.shape[1]):
            recorder.backward(outputs[:, a].sum(), a + 1 < outputs.shape[1], lambda *_: None)


def ours(case: Case, draws: int = 1) -> torch.Tensor:
    kernels = compute_ntk(
        case.model,
        [case.batch],
        space=case.space,
        rank=case.rank,
        lora_alpha=case.lora_alpha,
        draws=draws,
        always_trained=(),
        progress=False,
    )
    return kernels.subset()


def ours_draws(case: Case) -> torch.Tensor | None:
    """A mean over 16 draws of A in the same passes; no peer takes it. None where there is no A."""
    return ours(case, draws=16) if case.space == "lora" else None


def training_step(case: Case) -> None:
    """Forward and backward with all adapters, the memory to compare with."""
    model = case.peft_model()
    model.train()
    model(**case.batch).logits.square().mean().backward()


METHODS: dict[str, Callable[[Case], torch.Tensor | None]] = {
    FLOOR: floor,
    OURS: ours,
    DRAWS: ours_draws,
    STEP: training_step,
    **PEERS,
}
TIMED = (OURS, DRAWS, *PEERS)
SLOW = 12  # times the floor


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(method: Callable, case: Case, device: str) -> tuple[float, torch.Tensor | None]:
    synchronise(device)
    start = time.perf_counter()
    result = method(case)
    synchronise(device)
    return time.perf_counter() - start, result


def describe(error: Exception) -> str:
    return "out of memory" if "memory" in str(error) else f"{type(error).__name__}: {error}"[:200]


def limit_memory(fraction: float = 0.8) -> None:
    """What needs more than this part of the machine's memory fails, instead of being killed with all of us."""
    limit = int(fraction * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def time_case(name: str, space: str, methods: Sequence[str], rounds: int, device: str) -> dict[str, dict]:
    """Medians over rounds of each method's time over the floor's in the same round; kernels checked against ours."""
    case = build(name, space, device)
    floor(case)
    reference = ours(case)
    if "torch.func" in methods:
        find_best_chunk(case)
    rows: dict[str, dict] = {}
    ratios: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        base, _ = timed(floor, case, device)
        seconds.setdefault(FLOOR, []).append(base)
        for method in methods:
            if rows.get(method, {}).get("error") or (number and seconds.get(method, [0.0])[0] > SLOW * base):
                continue  # what takes very long is timed once
            try:
                taken, kernel = timed(METHODS[method], case, device)
            except Exception as error:
                rows[method] = {"error": describe(error)}
                continue
            if kernel is None:
                continue
            ratios.setdefault(method, []).append(taken / base)
            seconds.setdefault(method, []).append(taken)
            difference = float((kernel.double().cpu() - reference).norm() / reference.norm())
            rows[method] = {"difference": difference}
    rows[FLOOR] = {"ratio": 1.0}
    for method, values in ratios.items():
        rows[method] |= {"ratio": statistics.median(values), "low": min(values), "high": max(values)}
    for method, values in seconds.items():
        rows[method]["seconds"] = statistics.median(values)
        rows[method]["rounds"] = len(values)
    return rows


def peak_megabytes(name: str, space: str, method: str, device: str) -> float | None:
    """Peak memory of one call in a process of its own, less what the process holds before it."""
    command = [sys.executable, __file__, "--peak-of", name, space, method, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else None


def print_peak(name: str, space: str, method: str, device: str) -> None:
    case = build(name, space, device)
    if method in (STEP, *PEERS):
        case.peft_model()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        METHODS[method](case)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        before = peak_bytes()
        METHODS[method](case)
        print((peak_bytes() - before) / 2**20)


def command(arguments: list[str]) -> str:
    """This run, but for where it writes."""
    kept, skip = ["python", "examples/benchmarks/ntk_speed.py"], False
    for argument in arguments:
        if argument != "--output" and not skip:
            kept.append(argument)
        skip = argument == "--output"
    return " ".join(kept)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=None)
    parser.add_argument("--spaces", nargs="+", default=["lora", "weight"])
    parser.add_argument("--methods", nargs="+", choices=TIMED, default=TIMED)
    parser.add_argument("--measure", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None, help="folder for results.json and README.md")
    parser.add_argument("--peak-of", nargs=3, metavar=("CASE", "SPACE", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak_of:
        print_peak(*arguments.peak_of, arguments.device)
        return 0
    limit_memory()
    names = arguments.cases or (ON_CPU if arguments.device == "cpu" else [n for n in CASES if n != "tiny"])
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    results: dict = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {machine}",
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "commands": [],
        "cases": {},
    }
    earlier = arguments.output / "results.json" if arguments.output else None
    if earlier and earlier.exists():  # of the other measurement, or of other cases
        found = json.loads(earlier.read_text())
        results["cases"], results["commands"] = found["cases"], found["commands"]
    results["commands"].append(command(argv if argv is not None else sys.argv[1:]))
    for name in names:
        for space in arguments.spaces:
            rows = results["cases"].setdefault(f"{name}/{space}", {})
            if "time" in arguments.measure:
                for method, row in time_case(
                    name, space, arguments.methods, arguments.rounds, arguments.device
                ).items():
                    rows.setdefault(method, {}).update(row)
            if "memory" in arguments.measure:
                for method in (*arguments.methods, STEP):
                    applies = method != DRAWS or space == "lora"
                    if applies and "error" not in rows.get(method, {}):
                        peak = peak_megabytes(name, space, method, arguments.device)
                        rows.setdefault(method, {})["peak"] = peak
            print(table({f"{name}/{space}": rows}), flush=True)
            if arguments.output:
                write(results, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
