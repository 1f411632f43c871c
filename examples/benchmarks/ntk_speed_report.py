# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of the benchmark of speed."""

from __future__ import annotations

import json
from pathlib import Path

from ntk_peers import PEERS


OURS, DRAWS, FLOOR, STEP = "peft_linear", "peft_linear, 16 draws of A", "floor", "training step"
EXPLANATION = """Case `bert-32x128` is 32 examples of 128 tokens, two logits, all linear modules, LoRA of rank 8. The
floor is one forward and two backward passes to the output of the lowest target. Peers: see
`examples/benchmarks/ntk_peers.py`; each kernel is compared with ours
(the relative differences are in `results.json`).
Peak memory is what a call adds, in a process of its own; the training step is one of LoRA on all targets.
"""


def table(cases: dict[str, dict]) -> str:
    lines = ["| case | space | method | time / floor | low to high | seconds | peak MiB | peak / training step |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for key, rows in cases.items():
        name, space = key.split("/")
        step = rows.get(STEP, {}).get("peak")
        for method, row in rows.items():
            if "error" in row:
                lines.append(f"| {name} | {space} | {method} | failed: {row['error'].splitlines()[0][:80]} | | | | |")
                continue
            peak = row.get("peak")
            cells = [
                f"{row['ratio']:.2f}" if "ratio" in row else "",
                f"{row['low']:.2f} to {row['high']:.2f}" if "low" in row else "",
                f"{row['seconds']:.2f}" if "seconds" in row else "",
                f"{peak:.0f}" if peak is not None else "",
                f"{peak / step:.2f}" if peak is not None and step else "",
            ]
            lines.append(f"| {name} | {space} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def goals(cases: dict[str, dict]) -> str:
    """What was to be reached, beside what was."""
    lines = ["| case | space | goal | measured | reached |", "|---|---|---|---|---|"]
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
                lines.append(
                    f"| {name} | {space} | {what} {sign} {wanted:g} | {value:.2f} | {'yes' if reached else 'no'} |"
                )
    return "\n".join(lines) + "\n"


def write(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    heading = f"# Speed of `compute_ntk`\n\n{results['machine']}, torch {results['torch']}, {results['date']}, "
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(results["commands"]))
    heading += f"medians over {results['rounds']} rounds. Commands: {commands}.\n\n{EXPLANATION}\n"
    cases = results["cases"]
    (folder / "README.md").write_text(heading + table(cases) + "\n## Goals\n\n" + goals(cases))
