# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The table of predicted and measured steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from examples.common.reports import as_page, provenance
from peft_linear.report.markdown import markdown_table


REFERENCE = "all linear"
GOAL = 0.15
Shares = tuple[float, float]  # predicted, measured


def time_shares(rows: Mapping[str, Any]) -> dict[str, Shares]:
    """{set: time in all-linear steps at rank 8, predicted and measured}."""
    whole = rows[REFERENCE]
    return {
        name: (row["predicted_time"] / whole["predicted_time"], row["seconds"] / whole["seconds"])
        for name, row in rows.items()
    }


def errors(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """(case, set, "time" or "memory", predicted/measured − 1)."""
    for case, measured in results["cases"].items():
        rows = measured["sets"]
        for name, (predicted, seconds) in time_shares(rows).items():
            yield case, name, "time", predicted / seconds - 1
        for name, row in rows.items():
            if row["kept_bytes"]:
                yield case, name, "memory", row["predicted_bytes"] / row["kept_bytes"] - 1


def missed(results: Mapping[str, Any]) -> list[str]:
    """Predictions that are more than 15 % off, in words."""
    return [
        f"{case}, {name}: {kind} {error:+.1%}, at most 15 % wanted"
        for case, name, kind, error in errors(results)
        if abs(error) > GOAL
    ]


def worst(results: Mapping[str, Any], case: str, kind: str) -> str:
    found = [(abs(error), error, name) for each, name, what, error in errors(results) if (each, what) == (case, kind)]
    return f"{max(found)[1]:+.1%} ({max(found)[2]})" if found else "not measured"


def report(results: Mapping[str, Any]) -> str:
    """The measurement in Markdown."""
    parts = [
        "# The cost of a training step, predicted and measured",
        "Time is relative to an all-linear LoRA step at rank 8 of the same model, memory is what autograd keeps "
        "between the passes. The machine's coefficients were fitted to smollm2-135m alone; the other models check "
        "them. Rank 8 where no other is named. The goal is 15 %.",
    ]
    for case, measured in results["cases"].items():
        rows, shares = measured["sets"], time_shares(measured["sets"])
        examples, tokens = measured["batch"]
        parts.append(f"## {case}, {examples} x {tokens} tokens")
        parts.append(
            f"Worst error: time {worst(results, case, 'time')}, memory {worst(results, case, 'memory')}. "
            f"The all-linear step takes {rows[REFERENCE]['seconds']:.2f} s."
        )
        parts.append(
            markdown_table(
                ("set", "modules", "time predicted", "measured", "ratio", "MiB predicted", "measured", "ratio"),
                [_row(name, row, shares[name]) for name, row in rows.items()],
                right=range(1, 8),
            )
        )
    return as_page([*parts, results.get("note", ""), provenance(results)])


def _row(name: str, row: Mapping[str, Any], share: Shares) -> tuple[str, ...]:
    kept = row["kept_bytes"]
    return (
        name,
        str(row["modules"]),
        f"{share[0]:.2f}",
        f"{share[1]:.2f}",
        f"{share[0] / share[1]:.2f}",
        f"{row['predicted_bytes'] / 2**20:.0f}",
        f"{kept / 2**20:.0f}" if kept else "",
        f"{row['predicted_bytes'] / kept:.2f}" if kept else "",
    )
