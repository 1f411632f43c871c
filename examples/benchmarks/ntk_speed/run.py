# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of `compute_ntk` against its lower bound and other implementations, as ratios within one run.

The lower bound ("floor") is one forward and C backward passes with respect to activations, which every method that
differentiates the network needs. Other implementations ("peers"): torch.func's Jacobian contraction over the adapter's
parameters alone (best chunk size), the authors' way (example by example, over all parameters, keeping the adapter's),
nngeometry's and TRAK's Jacobians.

    pip install -e '.[bench]' && pip install --no-deps nngeometry
    python -m examples.benchmarks.ntk_speed
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from examples.benchmarks.ntk_speed.peers import PEERS, Case, find_best_chunk
from examples.benchmarks.ntk_speed.report import DRAWS, FLOOR, OURS, STEP, report, table
from examples.common.files import read_json, save_json, save_text
from examples.common.machine import added_mebibytes, number_of_new_process, synchronise
from examples.common.models import CLASSIFIERS
from examples.common.reports import Folders, add_output, circumstances, command_line
from peft_linear import compute_ntk
from peft_linear.capture.layers import layer_of
from peft_linear.capture.recorder import recording
from peft_linear.capture.targets import resolve_targets


MODULE = "examples.benchmarks.ntk_speed"
ON_CPU = ("bert-32x128", "bert-128x32", "gpt2-8x64")


def build(name: str, space: str, device: str) -> Case:
    factory, n, t = CLASSIFIERS[name]
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
    """A mean over 16 draws of A in the same passes; no other implementation has it. None where there is no A."""
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


def timed(method: Callable, case: Case, device: str) -> tuple[float, torch.Tensor | None]:
    synchronise(device)
    start = time.perf_counter()
    result = method(case)
    synchronise(device)
    return time.perf_counter() - start, result


def describe(error: Exception) -> str:
    return "out of memory" if "memory" in str(error) else f"{type(error).__name__}: {error}"[:200]


def limit_memory(fraction: float = 0.8) -> None:
    """A method that needs more than this part of the memory fails; otherwise the system would kill the benchmark."""
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


def peak_mebibytes(name: str, space: str, method: str, device: str) -> float | None:
    """Peak memory of one call in a process of its own, less what the process holds before it; None where it fails."""
    try:
        return number_of_new_process(MODULE, "--peak-of", name, space, method, "--device", device)
    except RuntimeError:
        return None


def print_peak(name: str, space: str, method: str, device: str) -> None:
    case = build(name, space, device)
    if method in (STEP, *PEERS):
        case.peft_model()
    print(added_mebibytes(lambda: METHODS[method](case), device))


def measure(
    rows: dict[str, dict[str, Any]], name: str, space: str, what: Sequence[str], options: argparse.Namespace
) -> None:
    """Adds to `rows` the time and the memory of every method on one case."""
    if "time" in what:
        for method, row in time_case(name, space, options.methods, options.rounds, options.device).items():
            rows.setdefault(method, {}).update(row)
    if "memory" in what:
        for method in (*options.methods, STEP):
            applies = method != DRAWS or space == "lora"
            if applies and "error" not in rows.get(method, {}):
                rows.setdefault(method, {})["peak"] = peak_mebibytes(name, space, method, options.device)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.peak_of:
        print_peak(*options.peak_of, options.device)
        return 0
    limit_memory()
    names = options.cases or (ON_CPU if options.device == "cpu" else [name for name in CLASSIFIERS if name != "tiny"])
    command = command_line(MODULE, argv if argv is not None else sys.argv[1:])
    folders = Folders.of("benchmarks/ntk_speed", "ntk_speed", options.output)
    file = folders.runs / "results.json.gz"
    earlier = read_json(file) if file.exists() else {}  # of the other measurement, or of other cases
    results: dict[str, Any] = {
        **circumstances(command, options.date),
        "rounds": options.rounds,
        "commands": [*earlier.get("commands", []), command],
        "cases": earlier.get("cases", {}),
    }
    for name in names:
        for space in options.spaces:
            rows = results["cases"].setdefault(f"{name}/{space}", {})
            measure(rows, name, space, options.measure, options)
            print(table({f"{name}/{space}": rows}), flush=True)
            save_json(file, results)  # after each case, so that one that is killed loses no other
            save_text(folders.summary / "README.md", report(results))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CLASSIFIERS, default=None)
    parser.add_argument("--spaces", nargs="+", default=["lora", "weight"])
    parser.add_argument("--methods", nargs="+", choices=TIMED, default=TIMED)
    parser.add_argument("--measure", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_output(parser)
    parser.add_argument("--peak-of", nargs=3, metavar=("CASE", "SPACE", "METHOD"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)
