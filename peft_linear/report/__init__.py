# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A recommendation for people: Markdown, HTML, figures, model cards. Takes any object shaped like it."""

from .html.page import recommendation_html
from .markdown import recommendation_markdown, score_table
from .model_card import model_card_section, update_model_card, with_model_card_section
from .plots import plot_recommendation, recommendation_figure
from .training_plots import plot_predicted_against_measured
from .writer import write_report


__all__ = [
    "model_card_section",
    "plot_predicted_against_measured",
    "plot_recommendation",
    "recommendation_figure",
    "recommendation_html",
    "recommendation_markdown",
    "score_table",
    "update_model_card",
    "with_model_card_section",
    "write_report",
]
