# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Pieces of HTML. What takes `str` escapes it; what is markup already is of type `Markup`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NewType


Markup = NewType("Markup", str)


def text(value: object) -> Markup:
    """Anything as text, also fit for an attribute in double quotes."""
    return Markup(escape(str(value), quote=True))


def breakable(name: str) -> Markup:
    """A dotted name that a browser may break after the dots."""
    return Markup(re.sub(r"([._/])(?=[^._/])", r"\1<wbr>", text(name)))


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `sort` is what it is sorted by, where that is not its text."""

    markup: Markup
    css: str = ""
    sort: float | int | None = None
    title: str = ""
    style: str = ""

    def render(self, tag: str = "td", attributes: str = "") -> str:
        if self.css:
            attributes += f' class="{text(self.css)}"'
        if self.sort is not None:
            attributes += f' data-sort="{self.sort!r}"'.replace("inf", "Infinity")
        if self.title:
            attributes += f' title="{text(self.title)}"'
        if self.style:
            attributes += f' style="{text(self.style)}"'
        return f"<{tag}{attributes}>{self.markup}</{tag}>"


def cell(value: object, css: str = "", sort: float | int | None = None) -> Cell:
    """A cell that shows a text."""
    return Cell(text(value), css, sort)


@dataclass(frozen=True)
class Row:
    """A row of a table; its first cell is the row's header unless `header` says which."""

    cells: Sequence[Cell]
    css: str = ""
    header: int = 0

    def render(self) -> str:
        cells = (c.render("th", ' scope="row"') if i == self.header else c.render() for i, c in enumerate(self.cells))
        attribute = f' class="{text(self.css)}"' if self.css else ""
        return f"<tr{attribute}>{''.join(cells)}</tr>"


def table(caption: Markup, header: Sequence[Cell], rows: Sequence[Row], css: str = "") -> Markup:
    """A table in a box of its own, which scrolls sideways where it is too wide for the page."""
    head = "".join(c.render("th", ' scope="col"') for c in header)
    attribute = f' class="{text(css)}"' if css else ""
    return Markup(
        f'<div class="scroll"><table{attribute}>\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(row.render() for row in rows)}\n</tbody></table></div>"
    )
