# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured loss, and numbers that are read beside each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_linear.errors import PeftLinearError
from peft_linear.functional.simulation import simulate_training
from peft_linear.report import plot_predicted_against_measured
from peft_linear.report.formatting import alike
from peft_linear.report.plots import ALL, CHOSEN, new_figure
from peft_linear.report.training_plots import draw_predicted_against_measured, measured_losses
from tests.helpers.pages import HISTORY


def test_a_logged_loss_belongs_to_the_middle_of_its_interval():
    rates, steps, every = [0.3] * 12, 12, 4
    curve = simulate_training(
        torch.eye(4) * 0.05, torch.zeros(2, 2), torch.tensor([0, 1]), learning_rate=rates, steps=steps
    )
    losses = curve.train_loss.tolist()  # of the model after 0, 1, … steps: nearly a straight line here
    history = [{"loss": sum(losses[s - every : s]) / every, "step": s} for s in (4, 8, 12)]
    training, held_out = measured_losses(history)
    assert not held_out and [step for step, _ in training] == [1.5, 5.5, 9.5]
    for step, loss in training:
        low, high = losses[int(step)], losses[int(step) + 1]
        assert loss == pytest.approx((low + high) / 2, rel=1e-4)


def test_evaluations_are_of_the_model_at_their_step():
    assert measured_losses(HISTORY) == ([(4.5, 2.0), (14.5, 1.0)], [(10.0, 1.75), (20.0, 1.25)])


def test_measured_is_solid_and_predicted_is_broken():
    cross = (torch.ones(2, 4) * 0.1, torch.zeros(1, 2), torch.tensor([0]))
    curve = simulate_training(
        torch.eye(4), torch.zeros(2, 2), torch.tensor([0, 1]), learning_rate=0.1, steps=20, held_out=cross
    )
    axes = new_figure((4, 3)).add_subplot()
    draw_predicted_against_measured(axes, HISTORY, curve, predicted_loss=1.5)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == [
        "training, measured",
        "held out, measured",
        "training, predicted",
        "held out, predicted",
        "held out, predicted for the end: 1.5",
    ]
    assert lines["training, predicted"].get_ydata().tolist() == curve.train_loss.tolist()
    assert lines["held out, predicted"].get_ydata().tolist() == curve.held_out_loss.tolist()
    assert lines["held out, measured"].get_xydata().tolist() == [[10.0, 1.75], [20.0, 1.25]]
    for words, color in (("training", ALL), ("held out", CHOSEN)):
        assert lines[f"{words}, measured"].get_color() == lines[f"{words}, predicted"].get_color() == color
        assert lines[f"{words}, measured"].get_linestyle() == "-" != lines[f"{words}, predicted"].get_linestyle()


def test_the_figure_is_written(tmp_path):
    plot_predicted_against_measured(HISTORY, tmp_path / "losses.png", predicted_loss=1.0)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PeftLinearError, match=r"cannot write a figure as 'losses.xyz'"):
        plot_predicted_against_measured(HISTORY, tmp_path / "losses.xyz")
    with pytest.raises(PeftLinearError, match=r"the history holds no loss: pass trainer.state.log_history"):
        plot_predicted_against_measured([], tmp_path / "losses.png")


def number(shown):
    return float(shown.replace("−", "-").replace(",", ""))


@given(st.lists(st.floats(-1e12, 1e12, allow_subnormal=False), min_size=1))
def test_numbers_beside_each_other_keep_their_order_and_size(values):
    texts = alike(values)
    shown = [number(texts[value]) for value in sorted(values)]
    assert shown == sorted(shown)
    top = max(map(abs, values))
    assert all(abs(number(texts[value]) - value) <= 0.051 * max(abs(value), 0.1 * top) for value in values)
    styles = {"e" in text for value, text in texts.items() if value}
    assert len(styles) <= 1, "one notation for all"


def test_the_notation_is_chosen_by_the_numbers():
    assert list(alike([1.0, 0.25, -3.456]).values()) == ["1.00", "0.25", "−3.46"]
    assert list(alike([1234.5, 100.0]).values()) == ["1,234", "100"]
    assert list(alike([1e-3, 2.5e-7, 0.0]).values()) == ["1.0e−3", "2.5e−7", "0"]
    assert list(alike([0.0, math.inf]).values()) == ["0", "∞"]
