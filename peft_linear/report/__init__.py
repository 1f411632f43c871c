# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A recommendation for people: Markdown, HTML, figures, model cards. Takes any object shaped like it."""

from .html import recommendation_html
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
