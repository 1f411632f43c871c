# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Writes a `Recommendation` and its reports into one folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..files import write_text
from ..recommendation.data import RecommendationData
from .html import recommendation_html
from .markdown import recommendation_markdown
from .plots import matplotlib_available, plot_recommendation


MARKDOWN_NAME = "recommendation.md"
FIGURE_NAME = "recommendation.png"
HTML_NAME = "report.html"


def write_report(
    recommendation: RecommendationData, directory: str | os.PathLike, **measured: Any
) -> tuple[Path, ...]:
    """recommendation.json and its spectra, recommendation.md, report.html, and recommendation.png with matplotlib.

    Args:
        recommendation: What is written.
        directory: The folder; made if it does not exist.
        **measured: Results of a training, as `Recommendation.to_html` takes them.

    Returns:
        The paths of the files for people: Markdown, HTML, and the figure if there is one.
    """
    folder = Path(directory)
    page = recommendation_html(recommendation, **measured)
    recommendation.save(folder)
    markdown, html, figure = folder / MARKDOWN_NAME, folder / HTML_NAME, folder / FIGURE_NAME
    text = recommendation_markdown(recommendation)
    write_text(html, page)
    if not matplotlib_available():
        write_text(markdown, text)
        return markdown, html
    plot_recommendation(recommendation, figure)
    write_text(markdown, text + f"\n![Spectra and scores]({FIGURE_NAME})\n")
    return markdown, html, figure
