# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of the benchmark of speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.benchmarks.ntk_speed.peers import PEERS
from examples.common.reports import as_page
from peft_linear.report.markdown import markdown_table


OURS, DRAWS, FLOOR, STEP = "peft_linear", "peft_linear, 16 draws of A", "floor", "training step"
EXPLANATION = (
    "Case `bert-32x128` is 32 examples of 128 tokens, two logits, all linear modules, LoRA of rank 8. The floor is "
    "one forward and two backward passes to the output of the lowest target. Peers: "
    "`examples/benchmarks/ntk_speed/peers.py`; their kernels are compared with ours (relative differences are in "
    "`results.json.gz`). Peak memory is what a call adds, in a process of its own; the training step is one of LoRA "
    "on all targets."
)


def table(cases: Mapping[str, Mapping[str, Any]]) -> str:
    body = []
    for key, rows in cases.items():
        name, space = key.split("/")
        step = rows.get(STEP, {}).get("peak")
        for method, row in rows.items():
            if "error" in row:
                body.append((name, space, method, f"failed: {row['error'].splitlines()[0][:80]}", *[""] * 4))
                continue
            peak = row.get("peak")
            body.append(
                (
                    name,
                    space,
                    method,
                    f"{row['ratio']:.2f}" if "ratio" in row else "",
                    f"{row['low']:.2f} to {row['high']:.2f}" if "low" in row else "",
                    f"{row['seconds']:.2f}" if "seconds" in row else "",
                    f"{peak:.0f}" if peak is not None else "",
                    f"{peak / step:.2f}" if peak is not None and step else "",
                )
            )
    header = ("case", "space", "method", "time / floor", "low to high", "seconds", "peak MiB", "peak / training step")
    return markdown_table(header, body, right=range(3, 8))


def goals(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """What was to be reached, beside what was."""
    body = []
    for key, rows in cases.items():
        name, space = key.split("/")
        mine = rows.get(OURS, {})
        aims = [("time / floor", mine.get("ratio"), 1.05 if space == "lora" else 1.5, False)]
        step = rows.get(STEP, {}).get("peak")
        aims.append(("peak / training step", mine["peak"] / step if mine.get("peak") and step else None, 1.3, False))
        for peer in PEERS:
            theirs = rows.get(peer, {}).get("ratio")
            wanted = (5.0 if "128x" in name else None) if peer == "authors" else (1.0 if space == "lora" else 1.5)
            if wanted and theirs and mine.get("ratio"):
                aims.append((f"time of {peer} / ours", theirs / mine["ratio"], wanted, True))
        for what, value, wanted, at_least in aims:
            if value is not None:
                reached = value >= wanted if at_least else value <= wanted
                sign = "at least" if at_least else "at most"
                body.append((name, space, f"{what} {sign} {wanted:g}", f"{value:.2f}", "yes" if reached else "no"))
    return markdown_table(("case", "space", "goal", "measured", "reached"), body, right=(3,))


def report(results: Mapping[str, Any]) -> str:
    """README.md."""
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(results["commands"]))
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return as_page(
        [
            "# Speed of `compute_ntk`",
            f"{results['machine']}, {versions}, {results['date']}, medians over {results['rounds']} rounds. Commands: "
            f"{commands}.",
            EXPLANATION,
            table(results["cases"]),
            "## Goals",
            goals(results["cases"]),
        ]
    )
