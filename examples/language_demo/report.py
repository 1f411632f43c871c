# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's report: what was learned, what was forgotten, and the answers side by side."""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from examples.common.figure_style import INK, finish, save
from peft_linear import Recommendation
from peft_linear.report.markdown import markdown_table


COLOURS = ("#c2410c", "#2563a8", "#8a97a1")


@dataclass(frozen=True)
class Arm:
    """One trained adapter."""

    name: str
    parameters: int
    loss_before: float  # nats a label token, of the test split
    loss: float
    forgotten: dict[str, float]  # {kind of text: KL(base ‖ tuned), nats a token}
    steered_kl: list[float]  # on the reference, in the order of the steps
    seconds_per_step: float
    generations: list[dict[str, str]]


def render(
    arms: Sequence[Arm], plan: Recommendation, checks: Mapping[str, str], options: argparse.Namespace, seconds: float
) -> str:
    kinds = list(arms[0].forgotten)
    rows = [
        (
            arm.name,
            f"{arm.parameters:,}",
            f"{arm.loss:.3f}",
            *(f"{arm.forgotten[kind]:.3f}" for kind in kinds),
            f"{arm.seconds_per_step:.2f} s",
        )
        for arm in arms
    ]
    header = ("arm", "parameters", "test loss", *(f"forgotten, {kind}" for kind in kinds), "a step")
    ours, plain = arms[0], arms[1]
    kept = (ours.loss_before - ours.loss) / (plain.loss_before - plain.loss)
    ratios = " and ".join(f"{plain.forgotten[kind] / ours.forgotten[kind]:.1f} times less on {kind}" for kind in kinds)
    final = ours.steered_kl[-1] if ours.steered_kl else float("nan")
    answers = [
        (
            row["prompt"].splitlines()[-1][:70],
            row["wanted"],
            *(arm.generations[number]["answer"].split("\n")[0] for arm in arms),
        )
        for number, row in enumerate(ours.generations)
    ]
    parts = [
        "# Demo: a language model within a budget of forgetting",
        f"`{options.model}` learns to translate package descriptions (`{options.language}`) in {options.steps} "
        f"steps of {options.batch_size}, all arms at a learning rate of {plan.learning_rate or 2e-3:.2g}; test "
        f"loss before: {ours.loss_before:.3f}. One seed. {seconds:.0f} s in all, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {datetime.date.today().isoformat()}.",
        "## Result",
        f"Within the budget the plan keeps {kept:.0%} of what plain LoRA gains and forgets {ratios}. The KL on the "
        f"texts that steer it ends at {final:.4f}, the budget is {options.target_kl:g} "
        f"({final / options.target_kl - 1:+.0%}).",
        markdown_table(header, rows, right=range(1, len(header))),
        "Forgotten: KL(base ‖ tuned) in nats a token, on texts that no arm reads. Loss: nats a label token.",
        "![test loss and KL of the arms](results.png)",
        f"## The plan\n\n{plan.rule}. The reasons are in [plan.html](plan.html).",
        "## Answers, greedy",
        markdown_table(("prompt", "wanted", *(arm.name for arm in arms)), answers),
        "## Saved",
        "\n".join(f"- `{words}`: {value}" for words, value in checks.items()),
    ]
    return "\n\n".join(parts) + "\n"


def draw(arms: Sequence[Arm], path: Path, target: float) -> None:
    """What was learned and what was forgotten, side by side."""
    kinds = list(arms[0].forgotten)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + len(kinds))
    names = [arm.name for arm in arms]
    for axes, title, values in (
        (panels[0], "test loss (nats a token)", [arm.loss for arm in arms]),
        *(
            (axes, f"KL, {kind}", [arm.forgotten[kind] for arm in arms])
            for axes, kind in zip(panels[1:], kinds, strict=True)
        ),
    ):
        bars = axes.barh(names, values, color=COLOURS[: len(arms)])
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=9, color=INK)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        finish(axes, title)
        if axes is not panels[0]:
            axes.axvline(target, color=INK, linewidth=1, linestyle=":")
            axes.set_yticklabels([])
    save(figure, path)
