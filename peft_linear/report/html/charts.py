# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Figures inside the HTML report: matplotlib's SVG, with text as text and colours that follow the page's."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from ...functional.simulation import TrainingCurve
from ...recommendation.data import RecommendationData
from ..plots import ALL, CHOSEN, HEAD, INK, draw_spectra, matplotlib_available, new_figure
from ..training_plots import History, draw_predicted_against_measured, measured_losses
from .elements import Markup, text


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (6.0, 3.7)
_NO_MATPLOTLIB = Markup(
    '<p class="soft">No figure: matplotlib was not installed when this page was made '
    "(<code>pip install 'peft-linear[plot]'</code>).</p>"
)
_VARIABLES = {CHOSEN: "--chosen", ALL: "--all", HEAD: "--head", INK: "--ink", "#000000": "--ink", "#eceff1": "--track"}


def spectra_figure(recommendation: RecommendationData) -> Markup:
    """Eigenvalues of the choice, of all candidates and of the head."""
    if not matplotlib_available():
        return _NO_MATPLOTLIB
    figure = new_figure(_SIZE)
    draw_spectra(figure.add_subplot(), recommendation)
    return _html_figure(
        figure,
        "spectra",
        "Eigenvalues of the kernels by index, on a logarithmic scale; the table beside has their numbers",
        "Directions far above the ridge λ are learned; those far below hardly change.",
    )


def training_figure(history: History, curve: TrainingCurve | None, predicted_loss: float | None) -> Markup:
    """Loss by step, predicted and measured."""
    measured_losses(history)  # refuses a history without any, also where nothing can be drawn
    if not matplotlib_available():
        return _NO_MATPLOTLIB
    figure = new_figure(_SIZE)
    draw_predicted_against_measured(figure.add_subplot(), history, curve, predicted_loss)
    return _html_figure(
        figure,
        "training",
        "Loss by optimizer step, predicted and measured",
        "Solid: measured by the Trainer. Dashed: predicted before training.",
    )


def inline_svg(figure: Figure, prefix: str, label: str) -> Markup:
    """The figure without titles as an `<svg>` element; `prefix` keeps its ids apart from other figures'."""
    from matplotlib import rc_context

    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.set_title("", loc="left")
    buffer = io.StringIO()
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": ["sans-serif"], "text.usetex": False}
    ):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", svg)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{text(label)}"', 1))


def _html_figure(figure: Figure, prefix: str, label: str, caption: str) -> Markup:
    return Markup(f"<figure>{inline_svg(figure, prefix, label)}<figcaption>{text(caption)}</figcaption></figure>")
