# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of predicted curves, and what they say of the gap's thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from examples.common.correlation import spearman
from examples.common.reports import as_page, setting_table
from peft_linear.capture.gap import NOT_LINEAR, VERDICTS, verdict_of
from peft_linear.report.markdown import markdown_table


@dataclass(frozen=True)
class Comparison:
    """Prediction and reality of one run after some steps, on the held-out examples."""

    step: int
    gap: float  # relative to the movement, at the real model's parameters
    relative_difference: float
    kl: float
    agreement: float
    verdict: str
    start: float  # loss
    predicted: float
    real: float
    accuracy_error: float

    @property
    def error(self) -> float:
        return abs(self.predicted - self.real)

    @property
    def relative_error(self) -> float:
        """Of the loss."""
        return self.error / self.real

    @property
    def error_of_change(self) -> float:
        """Of how much the loss has changed since the start."""
        return self.error / abs(self.real - self.start) if self.real != self.start else float("inf")


def comparisons(run: Mapping[str, Any]) -> list[Comparison]:
    """One for every evaluation but that of the start."""
    place = {step: number for number, step in enumerate(run["predicted"]["recorded"])}
    found = []
    for point in run["points"][1:]:
        number, gap = place[point["step"]], point["gap"]
        found.append(
            Comparison(
                step=point["step"],
                gap=gap["pooled_movement_gap"],
                relative_difference=gap["relative_difference"],
                kl=gap["kl"],
                agreement=gap["agreement"],
                verdict=word(gap),
                start=run["points"][0]["held_out_loss"],
                predicted=run["predicted"]["held_out_loss"][number],
                real=point["held_out_loss"],
                accuracy_error=abs(run["predicted"]["held_out_accuracy"][number] - point["held_out_accuracy"]),
            )
        )
    return found


def word(gap: Mapping[str, Any]) -> str:
    """The verdict of a report, by the thresholds as they are now."""
    verdict = verdict_of(gap["pooled_movement_gap"], gap["agreement"])
    return NOT_LINEAR if verdict is None else verdict.word


def runs_table(record: Mapping[str, Any]) -> str:
    header = (
        "optimizer", "λ", "λ·Σ η", "‖θ−θ0‖: predicted", "real", "training loss: predicted", "real",
        "held-out loss: predicted", "real", "accuracy: predicted", "real",
    )  # fmt: skip
    labels = {method["key"]: method["label"] for method in record["methods"]}
    rows = []
    for run in record["runs"]:
        last, before = run["points"][-1], {key: values[-1] for key, values in run["predicted"].items()}
        rows.append(
            (
                labels[run["method"]],
                f"{run['ridge']:g}",
                f"{run['ridge'] * record['sums_of_learning_rates'][run['method']]:.2g}",
                f"{before['distance']:.2f}",
                f"{run['distance']:.2f}",
                f"{before['train_loss']:.3f}",
                f"{last['train_loss']:.3f}",
                f"{before['held_out_loss']:.3f}",
                f"{last['held_out_loss']:.3f}",
                f"{before['held_out_accuracy']:.0%}",
                f"{last['held_out_accuracy']:.0%}",
            )
        )
    return markdown_table(header, rows, right=range(1, len(header)))


def gaps_table(record: Mapping[str, Any]) -> str:
    header = ("optimizer", "λ", "gap", "of the logits", "KL", "agreement", "linear model trained itself",
              "gap, A reset", "verdict")  # fmt: skip
    labels = {method["key"]: method["label"] for method in record["methods"]}
    rows = [
        (
            labels[run["method"]],
            f"{run['ridge']:g}",
            f"{run['report']['pooled_movement_gap']:.1%}",
            f"{run['report']['relative_difference']:.1%}",
            f"{run['report']['kl']:.2g}",
            f"{run['report']['agreement']:.0%}",
            f"{run['own_gap']['pooled_movement_gap']:.1%}",
            f"{run['gap_at_first_a']['pooled_movement_gap']:.1%}",
            word(run["report"]),
        )
        for run in record["runs"]
    ]
    return markdown_table(header, rows, right=range(1, len(header) - 1))


BANDS = (0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8, float("inf"))


def bands_table(points: Sequence[Comparison]) -> str:
    """Errors of the prediction by bands of the gap: where thresholds can lie."""
    rows = []
    for low, high in pairwise(BANDS):
        inside = [c for c in points if low < c.gap <= high]
        if inside:
            name = f"{low:.0%} to {high:.0%}" if high < float("inf") else f"above {low:.0%}"
            rows.append((name, *_errors(inside)))
    return markdown_table(("gap", *ERRORS), rows, right=range(1, 1 + len(ERRORS)))


def verdicts_table(points: Sequence[Comparison]) -> str:
    rows = []
    for name in (*(verdict.word for verdict in VERDICTS), NOT_LINEAR):
        inside = [c for c in points if c.verdict == name]
        rows.append((name, *(_errors(inside) if inside else ("0", *[""] * (len(ERRORS) - 1)))))
    return markdown_table(("verdict", *ERRORS), rows, right=range(1, 1 + len(ERRORS)))


ERRORS = ("evaluations", "error of the loss: median", "largest", "share of its change: median", "largest",
          "accuracy off by at most", "least agreement")  # fmt: skip


def _errors(points: Sequence[Comparison]) -> tuple[str, ...]:
    relative, change = [c.relative_error for c in points], [c.error_of_change for c in points]
    return (
        str(len(points)),
        f"{median(relative):.2%}",
        f"{max(relative):.2%}",
        f"{median(change):.0%}",
        f"{max(change):.0%}",
        f"{100 * max(c.accuracy_error for c in points):.1f} points",
        f"{min(c.agreement for c in points):.0%}",
    )


def measures_table(points: Sequence[Comparison]) -> str:
    """How each measure of the gap ranks the errors."""
    errors = [c.relative_error for c in points]
    rows = [
        (words, f"{spearman(values, errors):+.2f}")
        for words, values in (
            ("gap relative to the movement", [c.gap for c in points]),
            ("gap relative to the logits", [c.relative_difference for c in points]),
            ("KL", [c.kl for c in points]),
            ("disagreement", [1 - c.agreement for c in points]),
        )
    ]
    return markdown_table(("measure", "rank correlation with the error of the loss"), rows, right=(1,))


def sign_section(record: Mapping[str, Any]) -> str:
    if not any(run["approximated"] for run in record["runs"]):
        return "Not in these results."
    return (
        "The linear model's own training with Adam, exact on features and approximated by the sign kernel "
        f"(`simulate_adam`): two computations before training; no network is trained.\n\n{sign_table(record)}"
    )


def sign_table(record: Mapping[str, Any]) -> str:
    """Adam of the linear model, exact on features and approximated by the sign kernel: no network is involved."""
    rows = []
    for run in record["runs"]:
        if run["approximated"] is None:
            continue
        row = [f"{run['ridge']:g}"]
        for quantity in ("train_loss", "held_out_loss"):
            exact, near = (run[key][quantity] for key in ("predicted", "approximated"))
            row += [f"{exact[0] - exact[-1]:.3f}", f"{near[0] - near[-1]:.3f}"]
        rows.append(tuple(row))
    header = ("λ", "training loss falls by: exact", "sign kernel", "held-out loss falls by: exact", "sign kernel")
    return markdown_table(header, rows, right=range(1, 5))


def report(record: Mapping[str, Any]) -> str:
    """README.md."""
    points = [c for run in record["runs"] for c in comparisons(run)]
    setting = {key: record[key] for key in ("model", "dataset", "modules", "protocol", "command", "date", "machine")}
    setting |= {"versions": record["versions"], "seconds": record["seconds"]}
    forward = max(run["rows_against_forward_mode"] for run in record["runs"])
    return as_page(
        [
            "# Loss curves, predicted before training and measured",
            f"LoRA of rank {record['protocol']['rank']} on the {len(record['modules'])} modules that the demo "
            f"recommends, {record['model']} on {record['dataset']}: {record['train_examples']} training and "
            f"{record['held_out_examples']} held-out examples, {record['protocol']['steps']} steps of "
            f"{record['protocol']['batch_size']}, learning rate linearly to 0, no dropout, one seed. Predicted is "
            "the training of the linearised model, computed before the first step: SGD in kernel space "
            "(`predict_training`), AdamW on the Jacobian's rows (`jacobian_features`). Real is ProximalLoRA (not "
            "selective) with the same batches, in a plain loop. λ is chosen so that λ·Σ η is the same for both "
            "optimizers.",
            "![predicted and real loss curves at several λ, and the gap against λ](figure.png)",
            summary(record),
            runs_table(record),
            "## The gap at the end of every run",
            "On the held-out examples. “Gap” is relative to the movement of the logits, at the real model's own "
            "parameters (the Taylor remainder); “linear model trained itself” compares with the linear model where "
            "its own training took it. “A reset” is the gap of the real model with LoRA's A reset to its start: f̄ "
            "does not depend on A (at B = 0 its derivative is zero), so the difference is the effect of A's "
            "movement.",
            gaps_table(record),
            "## What the gap says of the prediction",
            f"All {len(points)} evaluations of all runs: the gap at the real parameters, against the error of the "
            "held-out loss that was predicted before training. The error of the loss is relative to the real loss; "
            "“share of its change” is the same error relative to how far the loss has moved since the start.",
            verdicts_table(points),
            "By bands of the gap:",
            bands_table(points),
            measures_table(points),
            "![gap against the error of the predicted loss](gap.png)",
            "## Adam by the sign kernel",
            sign_section(record),
            "## Setting",
            setting_table(setting),
            "The linear logits at the ends were computed twice, by the Jacobian's rows and by forward-mode "
            f"differentiation: they differ by at most {forward:.1e}. results.json.gz beside the program has every "
            "curve.",
        ]
    )


def summary(record: Mapping[str, Any]) -> str:
    """The answer in words, from the numbers."""
    lines = []
    for method in record["methods"]:
        runs = [run for run in record["runs"] if run["method"] == method["key"]]
        for run in (runs[0], runs[-1]):
            end = comparisons(run)[-1]
            lines.append(
                f"- {method['label']}, λ = {run['ridge']:g}: held-out loss {end.start:.3f} → {end.real:.3f}, "
                f"predicted {end.predicted:.3f}; gap {end.gap:.0%} of the movement, {end.agreement:.0%} of the "
                "predictions agree."
            )
    return "\n".join(lines)
