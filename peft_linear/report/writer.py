# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Writes everything that is to be read about a `Recommendation` into one folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_text
from .plots import matplotlib_available


if TYPE_CHECKING:
    from ..recommendation.recommendation import Recommendation

MARKDOWN_NAME = "recommendation.md"
FIGURE_NAME = "recommendation.png"
HTML_NAME = "report.html"


def write_report(recommendation: Recommendation, directory: str | os.PathLike, **real: Any) -> tuple[Path, ...]:
    """recommendation.json and its spectra, recommendation.md, report.html, and recommendation.png with matplotlib.

    Args:
        recommendation: What is written.
        directory: The folder; made if it does not exist.
        **real: What a training did, as `Recommendation.to_html` takes it.

    Returns:
        The paths of the files for people: Markdown, HTML, and the figure if there is one.
    """
    folder = Path(directory)
    page = recommendation.to_html(**real)
    recommendation.save(folder)
    markdown, html, figure = folder / MARKDOWN_NAME, folder / HTML_NAME, folder / FIGURE_NAME
    text = recommendation.to_markdown()
    write_text(html, page)
    if not matplotlib_available():
        write_text(markdown, text)
        return markdown, html
    recommendation.plot(figure)
    write_text(markdown, text + f"\n![Spectra and scores]({FIGURE_NAME})\n")
    return markdown, html, figure
