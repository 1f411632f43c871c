# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What training was predicted to do and what it did, in one figure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import PeftLinearError
from ..functional.simulation import TrainingCurve
from .plots import ALL, CHOSEN, INK, finish, new_figure, write_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Sequence[Mapping[str, Any]]


def plot_predicted_against_measured(
    history: History,
    path: str | os.PathLike,
    curve: TrainingCurve | None = None,
    predicted_loss: float | None = None,
) -> None:
    """Loss by optimizer step, predicted (dashed) and measured, written to `path` (its suffix says the format).

    Args:
        history: `trainer.state.log_history`. Entries with "loss" are training, with "eval_loss" held out.
        path: Of the image.
        curve: What `predict_training` or `simulate_training` predicted, step by step.
        predicted_loss: The held-out loss that was predicted for the end, as in `Recommendation.predicted`; drawn as
            a horizontal line.

    Raises:
        PeftLinearError: the history holds no loss, or matplotlib is not installed.
    """
    figure = new_figure((7.2, 4.2))
    draw_predicted_against_measured(figure.add_subplot(), history, curve, predicted_loss)
    write_figure(figure, path)


def draw_predicted_against_measured(
    axes: Axes, history: History, curve: TrainingCurve | None = None, predicted_loss: float | None = None
) -> None:
    """The figure of `plot_predicted_against_measured` on axes of your own."""
    training, held_out = measured_losses(history)
    for points, color, words in ((training, ALL, "training"), (held_out, CHOSEN, "held out")):
        if points:
            marker = "o" if len(points) <= 30 else None
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=f"{words}, measured")
    if curve is not None:
        steps = curve.recorded.tolist()
        style: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.8}
        axes.plot(steps, curve.train_loss.tolist(), color=ALL, label="training, predicted", **style)
        if curve.held_out_loss is not None:
            axes.plot(steps, curve.held_out_loss.tolist(), color=CHOSEN, label="held out, predicted", **style)
    if predicted_loss is not None:
        label = f"held out, predicted for the end: {predicted_loss:.3g}"
        axes.axhline(predicted_loss, color=CHOSEN, linewidth=1.2, linestyle=":", label=label)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.legend(frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2)
    finish(axes, "Predicted and measured loss")


def measured_losses(history: History) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(step, loss) of training and of evaluation.

    The Trainer logs at step s the mean of the training loss since its last log at step p, of the model after
    p, p+1, …, s−1 steps: it belongs to (p+s−1)/2. An evaluation at step s is of the model after s steps.

    Raises:
        PeftLinearError: there is neither.
    """
    training, held_out = [], []
    last = 0
    for entry in history:
        if "loss" in entry:
            training.append(((last + entry["step"] - 1) / 2, float(entry["loss"])))
            last = entry["step"]
        if "eval_loss" in entry:
            held_out.append((float(entry["step"]), float(entry["eval_loss"])))
    if not training and not held_out:
        raise PeftLinearError(
            'the history holds no loss: pass trainer.state.log_history, whose entries have "step" and "loss" or '
            '"eval_loss"; lower logging_steps or set eval_strategy if it has none'
        )
    return training, held_out
