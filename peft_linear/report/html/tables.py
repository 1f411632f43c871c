# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of the HTML report: predicted and measured values, spectra, every candidate, settings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...recommendation.data import RecommendationData
from ...recommendation.values import ModuleScore
from ..markdown import PREDICTIONS, format_number, interval_words, prediction_columns, setting_rows
from ..options import EXPLAINED, option_header, option_rows
from .elements import Cell, Markup, Row, breakable, cell, table, text


_SPECTRA = {
    "chosen, adapters": "the choice",
    "all, adapters": "all candidates",
    "always trained": "the head",
    "chosen": "the choice",
    "all": "all candidates",
}
_ALONE = re.compile(r"; alone \S+, rank \d+ of \d+$")  # the same table has both in columns of their own


def predictions_table(recommendation: RecommendationData, measured: Mapping[str, float]) -> Markup:
    """Predictions for the choice, measured values, and predictions for all candidates, the head alone, no training."""
    columns = prediction_columns(recommendation.predicted)
    if measured:
        columns.insert(1, ("measured", measured))
    rows = [
        Row([cell(words), *(cell(form.format(v[key]) if key in v else "", "right") for _, v in columns)])
        for key, words, form in PREDICTIONS
        if any(key in values for _, values in columns)
    ]
    header = [cell("prediction"), *(cell(title, "right") for title, _ in columns)]
    return table(_hidden("Predictions for the choice and for comparison"), header, rows, "wide")


def spectra_table(recommendation: RecommendationData) -> Markup:
    """Each spectrum in five numbers; with always-trained parameters those of the adapters without them."""
    rec = recommendation
    shown = [key for key in _SPECTRA if key in rec.spectra]
    if "always trained" in shown:
        shown = [key for key in shown if key not in ("chosen", "all")]
    spectra, ridge = [rec.spectra[key] for key in shown], rec.ridge or 0.0
    columns = {
        "numerical rank": [f"{s.numerical_rank} of {len(s)}" for s in spectra],
        "largest eigenvalue": [format_number(float(s.eigenvalues[0])) for s in spectra],
        "trace": [format_number(s.trace) for s in spectra],
        "effective dimension": [format_number(s.effective_dimension(ridge)) for s in spectra],
        "condition number": [format_number(s.condition_number(ridge)) for s in spectra],
    }
    rows = [
        Row([cell(title), *(cell(number, "right line") for number in numbers)]) for title, numbers in columns.items()
    ]
    caption = text(f"Effective dimension and condition number at ridge λ = {ridge:.4g}")
    return table(caption, [cell("kernel of"), *(cell(_SPECTRA[key], "right") for key in shown)], rows)


def options_table(recommendation: RecommendationData) -> Markup:
    """The sets that were weighed as a whole, for a language model."""
    rows = [
        Row([cell(value, "" if place in (0, 6) else "right") for place, value in enumerate(row)], header=0)
        for row in option_rows(recommendation)
    ]
    header = [
        cell(title, "" if place in (0, 6) else "right") for place, title in enumerate(option_header(recommendation))
    ]
    return table(text(EXPLAINED), header, rows, "wide")


def candidates_table(recommendation: RecommendationData) -> Markup:
    """A row for every candidate, best score first; the page's script makes it sortable."""
    rec = recommendation
    columns = _candidate_columns(rec)
    rows = [Row([make(row) for _, _, make in columns], "hit" if row.chosen else "", header=1) for row in rec.scores]
    said = "Score of the module alone, together with what is always trained."
    if rec.settings.reliability:
        said += " Rank intervals: 90 % of the ranks in random halves of the examples. Score intervals: 90 % under "
        said += "resampling."
    header = [cell(title, css) for title, css, _ in columns]
    return table(text(said), header, rows, "sortable wide")


def _candidate_columns(rec: RecommendationData) -> list[tuple[str, str, Callable[[ModuleScore], Cell]]]:
    """(title, CSS class of the title, cell of a candidate) of every column, from left to right."""
    picks = {name: place for place, name in enumerate(rec.modules, start=1)}

    def pick(row: ModuleScore) -> Cell:
        place = picks.get(row.name)
        return cell("" if place is None else f"pick {place}", "line", math.inf if place is None else place)

    columns: list[tuple[str, str, Callable[[ModuleScore], Cell]]] = [
        ("rank", "right", lambda row: cell(row.rank, "right", row.rank)),
        ("module", "", lambda row: Cell(breakable(row.name), "module")),
        ("chosen", "", pick),
        ("score", "right", lambda row: cell(f"{row.score:.4g}{interval_words(row)}", "right", row.score)),
    ]
    if rec.settings.reliability:
        ranks = rec.settings.reliability.rank_intervals
        columns.append(("rank, 90 % interval", "", lambda row: _interval(ranks.get(row.name), len(rec.scores))))
    return [
        *columns,
        ("parameters", "right", lambda row: cell(f"{row.parameters:,}", "right", row.parameters)),
        (
            "condition number",
            "right",
            lambda row: cell(format_number(row.condition_number), "right", row.condition_number or math.inf),
        ),
        ("why", "", lambda row: cell(_ALONE.sub("", row.reason), "why")),
    ]


def settings_table(recommendation: RecommendationData) -> Markup:
    """How the recommendation was made."""
    rows = [Row([cell(name), Cell(breakable(value))]) for name, value in setting_rows(recommendation)]
    return table(_hidden("Settings and provenance"), [cell("setting"), cell("value")], rows)


def _interval(interval: Any, candidates: int) -> Cell:
    if interval is None:
        return cell("", sort=math.inf)
    low, high = interval
    style = f"--a:{(low - 1) / candidates:.3f};--w:{(high - low + 1) / candidates:.3f}"
    words = f"{low}" if low == high else f"{low}–{high}"
    return Cell(Markup(f'{text(words)}<span class="span" style="{style}"><i></i></span>'), "line right", sort=low)


def _hidden(words: str) -> Markup:
    return Markup(f'<span class="hidden">{text(words)}</span>')
