# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The scores of all candidates as HTML tables of layers × module types, the choice marked."""

from __future__ import annotations

from ...recommendation.data import RecommendationData
from ...recommendation.names import layer_grid, parse_name
from ...recommendation.values import ModuleScore
from ..formatting import alike, improvements
from .elements import Cell, Markup, Row, breakable, cell, table, text


_MANY_TYPES = 12  # more columns than this, and than there are layers, become rows
_NO_LAYER = {"–": "none"}
_EMPTY = Cell(Markup('<span aria-hidden="true">·</span><span class="hidden">no such module</span>'), "none")


def heat_map_html(recommendation: RecommendationData) -> Markup:
    """A table for each stack of layers (encoder, decoder), and one for the modules that are in no numbered layer.

    A cell is coloured by the rank of its score, so that one outstanding module does not make all others look alike,
    and holds the improvement and the rank as text; a chosen one has a frame and says which pick it was.
    """
    rec = recommendation
    gains, what = improvements(rec)
    numbers = alike(gains.values())
    picks = {name: place for place, name in enumerate(rec.modules, start=1)}
    cells = {
        row.name: _heat_cell(row, numbers[gains[row.name]], picks.get(row.name), len(rec.scores)) for row in rec.scores
    }
    stacks: dict[str | None, list[str]] = {}
    for name in _model_order(rec):
        parsed = parse_name(name)
        stacks.setdefault(None if parsed.layer is None else parsed.stack, []).append(name)
    tables = [_stack_table(stack, names, cells) for stack, names in stacks.items()]
    legend = Markup(
        f'<p class="key soft"><span>Number: {text(what)}</span><span>rank worst <span class="ramp"></span> best</span>'
        '<span><span class="frame"></span> chosen, with the order of the picks</span></p>'
    )
    return Markup("\n".join([legend, *tables]))


def _heat_cell(row: ModuleScore, number: str, pick: int | None, candidates: int) -> Cell:
    quantile = (candidates - row.rank) / max(candidates - 1, 1)
    chosen = "" if pick is None else f"<small>pick {pick}</small>"
    return Cell(
        Markup(f"{text(number)}<br><small>rank {row.rank}</small>{chosen}"),
        "" if pick is None else "hit",
        title=f"{row.name}: score {row.score:.4g}, {row.parameters:,} parameters. {row.reason}",
        style=f"--q:{quantile:.3f}",
    )


def _stack_table(stack: str | None, names: list[str], cells: dict[str, Cell]) -> Markup:
    grid = layer_grid(names)
    by_place = {place: cells[name] for name, place in grid.cells.items()}
    rows, columns, corner = grid.rows, grid.columns, "layer"
    if len(columns) > max(_MANY_TYPES, len(rows)):
        by_place = {(column, row): c for (row, column), c in by_place.items()}
        rows, columns, corner = columns, rows, "type"
    caption = Markup("Modules outside of the numbered layers")
    if stack is not None:
        caption = Markup(f"Layers of <code>{breakable(stack)}</code>" if stack else "Layers")
    body = []
    for r, label in enumerate(rows):
        places = (by_place.get((r, c), _EMPTY) for c in range(len(columns)))
        body.append(Row((Cell(breakable(_NO_LAYER.get(label, label))), *places)))
    header = [cell(corner), *(Cell(Markup(f"<span>{breakable(label)}</span>")) for label in columns)]
    return table(caption, header, body, "heat")


def _model_order(rec: RecommendationData) -> list[str]:
    place = {name: index for index, name in enumerate(rec.settings.candidates)}
    return sorted((row.name for row in rec.scores), key=lambda name: place.get(name, len(place)))
