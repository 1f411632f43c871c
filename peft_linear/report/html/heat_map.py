# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The scores of all candidates as HTML tables of layers × module types, the choice marked."""

from __future__ import annotations

from collections.abc import Mapping

from ...recommendation.data import RecommendationData
from ...recommendation.names import layer_grid, parse_name
from ...recommendation.values import ModuleScore
from ..formatting import alike, improvements
from ..heat import MOST_LISTED
from .elements import Cell, Markup, Row, breakable, cell, table, text


_MANY_TYPES = 12  # more columns than this, and than there are layers, become rows
_NO_LAYER = {"–": "none"}
_EMPTY = Cell(Markup('<span aria-hidden="true">·</span><span class="hidden">no such module</span>'), "none")


def heat_map_html(recommendation: RecommendationData) -> Markup:
    """A table for each stack of layers (encoder, decoder), and one for the modules that are in no numbered layer.

    A cell is coloured by the rank of its score, so that one outstanding module does not make all others look alike,
    and holds the improvement and its rank as text; a chosen one has a frame and says the rank r of its adapter and
    which pick it was. With many candidates ranks of scores and picks are left to the titles and the table below. The
    last row and column are sums over the modules alone.
    """
    rec = recommendation
    gains, what = improvements(rec)
    numbers = alike(gains.values())
    picks = {name: place for place, name in enumerate(rec.modules, start=1)}
    ranks, dense = rec.ranks, len(rec.scores) > MOST_LISTED
    cells = {}
    for row in rec.scores:
        about = [] if dense else [f"rank {row.rank}"]
        if row.name in ranks:
            about += [f"r = {ranks[row.name]}", *([] if dense else [f"pick {picks[row.name]}"])]
        small = "".join(f"<small>{text(words)}</small>" for words in about)
        number = Markup(f"{text(numbers[gains[row.name]])}{'' if dense else '<br>'}{small}")
        cells[row.name] = _heat_cell(row, number, len(rec.scores))
    stacks: dict[str | None, list[str]] = {}
    for name in rec.candidates:
        parsed = parse_name(name)
        stacks.setdefault(None if parsed.layer is None else parsed.stack, []).append(name)
    tables = [_stack_table(stack, names, cells, gains) for stack, names in stacks.items()]
    legend = Markup(
        f'<p class="key soft"><span>Number: {text(what)}</span><span>rank worst <span class="ramp"></span> best</span>'
        '<span><span class="frame"></span> chosen, with the rank r of its adapter</span></p>'
    )
    return Markup("\n".join([legend, *tables]))


def _heat_cell(row: ModuleScore, shown: Markup, candidates: int) -> Cell:
    quantile = (candidates - row.rank) / max(candidates - 1, 1)
    return Cell(
        shown,
        "hit" if row.chosen else "",
        title=f"{row.name}: score {row.score:.4g}, rank {row.rank}, {row.parameters:,} parameters. {row.reason}",
        style=f"--q:{quantile:.3f}",
    )


def _stack_table(stack: str | None, names: list[str], cells: dict[str, Cell], gains: Mapping[str, float]) -> Markup:
    grid = layer_grid(names)
    by_place = {place: cells[name] for name, place in grid.cells.items()}
    sums = _sums({place: gains[name] for name, place in grid.cells.items()})
    rows, columns, corner = grid.rows, grid.columns, "layer"
    if len(columns) > max(_MANY_TYPES, len(rows)):
        by_place = {(column, row): c for (row, column), c in by_place.items()}
        sums = sums[::-1]
        rows, columns, corner = columns, rows, "type"
    caption = Markup("Modules outside of the numbered layers")
    if stack is not None:
        caption = Markup(f"Layers of <code>{breakable(stack)}</code>" if stack else "Layers")
    body = []
    for r, label in enumerate(rows):
        places = (by_place.get((r, c), _EMPTY) for c in range(len(columns)))
        summed = [cell(sums[0][r], "sum")] if stack is not None else []
        body.append(Row((Cell(breakable(_NO_LAYER.get(label, label))), *places, *summed)))
    header = [cell(corner), *(Cell(Markup(f"<span>{breakable(label)}</span>")) for label in columns)]
    if stack is not None:
        header.append(cell("sum"))
        body.append(Row([cell("sum"), *(cell(sums[1][c], "sum") for c in range(len(columns))), cell("", "sum")]))
    return table(caption, header, body, "heat dense" if len(gains) > MOST_LISTED else "heat")


def _sums(values: Mapping[tuple[int, int], float]) -> tuple[dict[int, str], dict[int, str]]:
    """Of each row and of each column."""
    found = []
    for axis in (0, 1):
        totals: dict[int, float] = {}
        for place, value in values.items():
            totals[place[axis]] = totals.get(place[axis], 0.0) + value
        words = alike(totals.values())
        found.append({index: words[total] for index, total in totals.items()})
    return found[0], found[1]
