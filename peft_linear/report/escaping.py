# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Names and texts that are not ours, as Markdown that shows them and does nothing else.

What could be markup on GitHub (tables, links, HTML and its comments, emphasis, mathematics) becomes a numeric
character reference, which by the CommonMark specification is never structure, nor a border of a table's column.
"""

from __future__ import annotations

import re


_MARKUP = re.compile(
    r"[\\`*\[\]<>|~$&]"  # anywhere
    r"|(?<![^\W_])_|_(?![^\W_])"  # underscores but those within a word
    r"|(?<=script):|(?<=data):(?=\S)|:(?=//)|(?<=www)\.",  # addresses
    re.IGNORECASE,
)
_START = re.compile(r"^(\d*)([-+=#.)])(?=[-+=#\s]|$)")  # what makes a list or a heading at the start of a line
_IN_CODE = re.compile(r"[\w.,/+()@=-]+")


def plain(text: str) -> str:
    """A text as one line of Markdown without any markup; spaces and line ends become single spaces."""
    line = _MARKUP.sub(lambda match: _reference(match[0]), _visible(" ".join(text.split())))
    return _START.sub(lambda match: match[1] + _reference(match[2]), line)


def code(name: str) -> str:
    """A name as Markdown code; one with characters that code spans in tables cannot hold is a plain text."""
    if _IN_CODE.fullmatch(name):
        return f"`{name}`"
    return plain(_visible(name)) or "(empty)"


def cell(markdown: str) -> str:
    """Markdown in a cell of a table: on one line, and with its pipes escaped unless they are."""
    line = re.sub(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+", " ", markdown)
    return re.sub(r"(\\*)\|", lambda m: m[0] if len(m[1]) % 2 else rf"{m[1]}\|", line)


def _reference(character: str) -> str:
    return f"&#{ord(character)};"


def _visible(text: str) -> str:
    """Control characters, marks that turn the direction of writing and the like as Python's escapes."""
    return "".join(c if c == " " or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
