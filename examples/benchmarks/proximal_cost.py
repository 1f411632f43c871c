# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the pull of ProximalLoRA costs: a training step against plain LoRA's, and the memory of the anchor.

    python examples/benchmarks/proximal_cost.py --output docs/measurements/proximal_cost

Plain LoRA and every form of ProximalLoRA take turns within each round, in an order that changes from round to round,
on copies that share the base model's weights. Two numbers come of it: the median over rounds of the ratio of whole
steps, and, with less noise, what `optimizer.step()` takes longer as a part of a plain step (forward and backward are
the same). Times are of the processor on a CPU, so that other processes count less, and of the clock on a GPU. Exits
with 1 where a target is missed: 2 % of a step in factor space, 5 % in delta space, memory of one copy of A.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/common.py, from wherever this is started

import torch
from common import DEMO_MODEL, load_quietly
from ntk_memory import describe_machine
from ntk_speed import bert, gpt2
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_linear import ProximalLoraConfig
from peft_linear.report.markdown import markdown_table
from peft_linear.tuners.proximal_lora.state import find_adapters, find_records, live_records


PLAIN = "LoRA"
TARGETS = {"factors": 0.02, "delta": 0.05}  # of the time of a plain step
FORMS = {
    f"{space}, {'selective' if selective else 'always on'}": {"proximal_space": space, "proximal_selective": selective}
    for space in TARGETS
    for selective in (False, True)
}
CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # model, batch, tokens
    "minilm": (lambda: load_quietly(DEMO_MODEL, ("a", "b"))[0], 16, 32),
    "gpt2": (gpt2, 4, 64),
    "tiny": (lambda: bert(2, 48), 4, 8),
}


def build(case: str, rank: int, device: str) -> tuple[dict[str, PeftModel], dict[str, Tensor]]:
    """One model for each form, all on the weights of one base model, and a batch."""
    factory, batch_size, length = CASES[case]
    torch.manual_seed(0)
    base = factory().to(device)
    shared = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    configs = {PLAIN: LoraConfig(**shared)}
    configs |= {form: ProximalLoraConfig(**shared, proximal_lambda=1.0, **fields) for form, fields in FORMS.items()}
    models = {}
    for form, config in configs.items():
        torch.manual_seed(0)
        memo = {id(parameter): parameter for parameter in base.parameters()}  # parameters are shared, not copied
        models[form] = get_peft_model(copy.deepcopy(base, memo), config).train()
    ids = torch.randint(2, 2000, (batch_size, length), device=device)
    return models, {"input_ids": ids, "labels": torch.arange(batch_size, device=device) % 2}


@contextmanager
def alone(model: PeftModel) -> Iterator[None]:
    """No other model's pull is looked for by the optimizer hooks: as in a process that has this model only."""
    before = list(live_records)
    live_records.clear()
    for record in find_records(model):
        live_records.add(record)
    try:
        yield
    finally:
        for record in before:
            live_records.add(record)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def step(
    model: PeftModel, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor], device: str
) -> tuple[float, float]:
    """Seconds of a whole step, and of `optimizer.step()` in it."""
    start = clock(device)
    optimizer.zero_grad()
    model(**batch).loss.backward()
    middle = clock(device)
    optimizer.step()
    end = clock(device)
    return end - start, end - middle


def measure(case: str, rounds: int, rank: int, device: str) -> dict:
    """Ratios of steps and bytes of anchors of one model, over `rounds` rounds after two that are thrown away."""
    models, batch = build(case, rank, device)
    optimizers = {
        form: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for form, model in models.items()
    }
    generator, order = random.Random(0), list(models)
    taken: list[dict[str, tuple[float, float]]] = []
    for _ in range(rounds + 2):
        generator.shuffle(order)
        row = {}
        for form in order:
            with alone(models[form]):
                row[form] = step(models[form], optimizers[form], batch, device)
        taken.append(row)
    taken = taken[2:]
    result: dict = {
        "batch": list(batch["input_ids"].shape),
        "parameters": models[PLAIN].get_base_model().num_parameters(),
        "step_seconds": statistics.median(row[PLAIN][0] for row in taken),
        "forms": {},
    }
    for form, fields in FORMS.items():
        ratios = [row[form][0] / row[PLAIN][0] for row in taken]
        added = [(row[form][1] - row[PLAIN][1]) / result["step_seconds"] for row in taken]
        anchors, factors = anchor_bytes(models[form])
        result["forms"][form] = {
            "ratio": statistics.median(ratios),
            "ratio_quartiles": quartiles(ratios),
            "added": statistics.median(added),
            "added_quartiles": quartiles(added),
            "anchor_bytes": anchors,
            "lora_a_bytes": factors,
            "target": TARGETS[fields["proximal_space"]],
        }
    return result


def quartiles(values: Sequence[float]) -> list[float]:
    return (
        [statistics.quantiles(values, n=4)[0], statistics.quantiles(values, n=4)[2]]
        if len(values) > 1
        else [*values] * 2
    )


def anchor_bytes(model: PeftModel) -> tuple[int, int]:
    """Bytes of memory that anchors keep (a tensor that shares another's memory keeps none), and bytes of all A."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    factors = 0
    for adapter in find_adapters(model):
        for part in adapter.factors():
            factors += part.a.numel() * part.a.element_size()
            for tensor in (part.anchor.a, part.anchor.b):
                if tensor is not None and tensor.untyped_storage().data_ptr() not in own:
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(kept.values()), factors


def missed(results: Mapping) -> list[str]:
    """What is above its target, in words."""
    found = []
    for case, result in results["cases"].items():
        for form, row in result["forms"].items():
            if row["ratio"] - 1 > row["target"]:
                found.append(f"{case}, {form}: {row['ratio'] - 1:+.1%} of a step, at most {row['target']:.0%} wanted")
            if row["anchor_bytes"] > row["lora_a_bytes"]:
                found.append(f"{case}, {form}: anchors of {row['anchor_bytes']} bytes, A has {row['lora_a_bytes']}")
    return found


def report(results: Mapping) -> str:
    """The measurement in Markdown."""
    rows = []
    for case, result in results["cases"].items():
        shape = " x ".join(map(str, result["batch"]))
        for form, row in result["forms"].items():
            low, high = row["ratio_quartiles"]
            added_low, added_high = row["added_quartiles"]
            cells = (
                f"{row['ratio'] - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})",
                f"{row['added']:+.2%} ({added_low:+.2%} to {added_high:+.2%})",
                f"{row['target']:.0%}",
                f"{row['anchor_bytes'] / row['lora_a_bytes']:.2f}",
            )
            rows.append((f"{case}, {shape}, {1000 * result['step_seconds']:.0f} ms", form, *cells))
    header = (
        "model, batch x tokens, plain step",
        "form",
        "step longer by (quartiles)",
        "of that, in optimizer.step()",
        "target",
        "anchor / A",
    )
    outcome = missed(results)
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n\n".join(
        [
            "# Cost of the proximal term",
            f"A training step (AdamW, all linear modules, rank {results['rank']}) against plain LoRA's in the same "
            f"round: medians of {results['rounds']} rounds, with quartiles; memory of the anchors against all A's.",
            markdown_table(header, rows, right=range(2, 6)),
            "All targets are met." if not outcome else "Missed:\n\n" + "\n".join(f"- {line}" for line in outcome),
            f"`{results['command']}`, {results['date']}, {results['machine']}, {versions}.",
        ]
    ) + "\n"  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["minilm", "gpt2"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder of results.json and README.md")
    options = parser.parse_args(argv)
    results: dict = {
        "rounds": options.rounds,
        "rank": options.rank,
        "command": " ".join(["python examples/benchmarks/proximal_cost.py", *(argv or sys.argv[1:])]),
        "date": date.today().isoformat(),
        "machine": describe_machine() if options.device == "cpu" else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "cases": {case: measure(case, options.rounds, options.rank, options.device) for case in options.cases},
    }
    print(report(results))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (options.output / "README.md").write_text(report(results), encoding="utf-8")
    for line in missed(results):
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
