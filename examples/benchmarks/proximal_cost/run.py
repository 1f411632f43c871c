# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the proximal term costs: a training step against plain LoRA's, and the memory of the anchor.

    python -m examples.benchmarks.proximal_cost

Plain LoRA and every form of ProximalLoRA take turns within each round, in an order that changes from round to round,
on copies that share the base model's weights. Two numbers come of it: the median over rounds of the ratio of whole
steps, and, with less noise, what `optimizer.step()` takes longer as a part of a plain step (forward and backward are
the same). Times are of the processor on a CPU, so that other processes count less, and of the clock on a GPU. Exits
with 1 where a target is missed: 2 % of a step in factor space, 5 % in delta and in function space (there 3 % on a
GPU), memory of one copy of A. The reference of function space is of two batches; its rank, and so the cost, is the
default's.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from examples.benchmarks.language.models import load_language_model
from examples.common.files import save_json, save_text
from examples.common.machine import clock
from examples.common.models import bert, copy_sharing_weights, gpt2
from examples.common.reports import Folders, add_output, as_page, circumstances, command_line, provenance
from examples.common.tasks import DEMO_MODEL, load_quietly
from examples.common.training import trained_parameters
from peft_linear import ProximalLoraConfig, collect_reference, set_proximal_reference
from peft_linear.report.markdown import markdown_table
from peft_linear.tuners.proximal_lora.state import find_adapters, find_records, live_records


MODULE = "examples.benchmarks.proximal_cost"
PLAIN = "LoRA"
TARGETS = {"factors": 0.02, "delta": 0.05, "function": 0.05}  # of the time of a plain step
GPU_TARGETS = TARGETS | {"function": 0.03}
FORMS = {
    f"{space}, {'selective' if selective else 'always on'}": {"proximal_space": space, "proximal_selective": selective}
    for space in TARGETS
    for selective in (False, True)
}
CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # model, batch, tokens
    "minilm": (lambda: load_quietly(DEMO_MODEL, ("a", "b"))[0], 16, 32),
    "gpt2": (gpt2, 4, 64),
    "smollm2": (lambda: load_language_model("smollm2-135m")[0], 4, 64),
    "tiny": (lambda: bert(2, 48), 4, 8),
}


def build(case: str, rank: int, device: str) -> tuple[dict[str, PeftModel], dict[str, Tensor]]:
    """One model for each form, all on the weights of one base model, and a batch."""
    factory, batch_size, length = CASES[case]
    torch.manual_seed(0)
    base = factory().to(device)
    causal = "CausalLM" in type(base).__name__
    task = "CAUSAL_LM" if causal else "SEQ_CLS"
    shared = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": task}
    configs = {PLAIN: LoraConfig(**shared)}
    configs |= {form: ProximalLoraConfig(**shared, proximal_lambda=1.0, **fields) for form, fields in FORMS.items()}
    ids = torch.randint(2, 2000, (2, batch_size, length), device=device)
    reference = collect_reference(base, [{"input_ids": each} for each in ids], progress=False)
    models = {}
    for form, config in configs.items():
        torch.manual_seed(0)
        models[form] = get_peft_model(copy_sharing_weights(base), config).train()
        if getattr(config, "proximal_space", None) == "function":
            set_proximal_reference(models[form], reference)
    return models, {"input_ids": ids[0], "labels": ids[0] if causal else torch.arange(batch_size, device=device) % 2}


@contextmanager
def alone(model: PeftModel) -> Iterator[None]:
    """The optimizer hooks search this model only, as in a process that has no other."""
    before = list(live_records)
    live_records.clear()
    for record in find_records(model):
        live_records.add(record)
    try:
        yield
    finally:
        for record in before:
            live_records.add(record)


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
    optimizers = {form: torch.optim.AdamW(trained_parameters(model), lr=1e-4) for form, model in models.items()}
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
            "target": (TARGETS if device == "cpu" else GPU_TARGETS)[fields["proximal_space"]],
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
    return as_page(
        [
            "# Cost of the proximal term",
            f"A training step (AdamW, all linear modules, rank {results['rank']}) against plain LoRA's in the same "
            f"round: medians of {results['rounds']} rounds, with quartiles; memory of the anchors against all A's.",
            markdown_table(header, rows, right=range(2, 6)),
            "All targets are met." if not outcome else "Missed:\n\n" + "\n".join(f"- {line}" for line in outcome),
            provenance(results),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["minilm", "gpt2", "smollm2"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_output(parser)
    options = parser.parse_args(argv)
    command = command_line(MODULE, argv if argv is not None else sys.argv[1:])
    results: dict[str, Any] = {
        "rounds": options.rounds,
        "rank": options.rank,
        **circumstances(command, options.date),
        "cases": {case: measure(case, options.rounds, options.rank, options.device) for case in options.cases},
    }
    print(report(results))
    folders = Folders.of("benchmarks/proximal_cost", "proximal_cost", options.output)
    save_json(folders.runs / "results.json.gz", results)
    save_text(folders.summary / "README.md", report(results))
    for line in missed(results):
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed(results) else 0
