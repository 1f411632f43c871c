# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Whatever names and texts hold, tables keep their rows and columns, and a model card its one section."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear.report import recommendation_markdown, update_model_card, with_model_card_section
from peft_linear.report.escaping import cell, code, plain
from peft_linear.report.markdown import choice_table, markdown_table
from peft_linear.report.model_card import BEGIN, END, model_card_section
from peft_linear.selection import recommend
from tests.helpers.planted import planted_kernels


HOSTILE = [
    "a|b",
    "a\\|b",
    "a\\",
    "`code`",
    "``",
    "a\nb",
    "a\r\n\r\n## Heading\u2028x\x85y",
    "| a | b |\n|---|---|",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "[a]: javascript:alert(1)",
    "![x](https://evil.example/p.png)",
    "<javascript:alert(1)>",
    "JaVaScRiPt:alert(1)",
    "https://evil.example www.evil.example",
    BEGIN,
    END,
    f"{END}\n{BEGIN}",
    "<!--",
    "-->",
    "**bold** __bold__ _it_ ~~gone~~ $x$",
    "&lt;b&gt; &#60;b&#62;",
    "# heading",
    "- item",
    "1. item",
    "---",
    "> quote",
    "    indented",
    "\x1b[31mred\x00\x07",
    "\u202eright\u200bleft",
    "",
    " ",
]
TEXTS = st.sampled_from(HOSTILE) | st.text(max_size=30) | st.lists(st.sampled_from(HOSTILE), max_size=3).map("".join)
NAMES = st.lists(TEXTS, min_size=3, max_size=3, unique=True)


@lru_cache(maxsize=1)
def planted():
    return recommend(planted_kernels(names=("a", "b", "c"), informative=(1,), examples=9), 2, "trace")


def named(names, text="text", notes=()):
    """A recommendation with these names of modules, and a text wherever one can be."""
    rec = planted()
    new = dict(zip(("a", "b", "c"), names, strict=True))
    rows = tuple(replace(row, name=new[row.name], reason=text) for row in rec.scores)
    changed = replace(
        rec.settings,
        criterion_label=text,
        formula=text,
        strategy=text,
        output_kind=text,
        optimizer=text,
        reliability=None,
    )
    changed = replace(changed, kernels={text: text, "model": text, "versions": {text: text}})
    modules = tuple(new[name] for name in rec.modules)
    return replace(rec, modules=modules, scores=rows, settings=changed, notes=tuple(notes), budget=text or "2")


def rows_of(table):
    """The cells by GitHub's rule (a backslash escapes anything) and by markdown-it's (only a pipe): they agree."""
    found = []
    for line in table.split("\n"):
        github, last = re.findall(r"(?:\\.|[^|\\])*", line), ""
        cells, other = [c for c in github if c][: len(github)], [""]
        for character in line:
            if character == "|" and last != "\\":
                other.append("")
            else:
                other[-1] += character
            last = character
        assert line.startswith("| ") or line.startswith("|-")
        assert [c.strip() for c in other[1:-1]] == [c.strip() for c in cells], line
        found.append([c.strip() for c in other[1:-1]])
    return found


def tables_of(markdown):
    lines, tables = markdown.split("\n"), [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    return [rows_of("\n".join(table)) for table in tables if table]


def assert_harmless(markdown):
    """No markup but ours, and nothing that ends a line but a line feed."""
    outside = markdown.replace(BEGIN, "").replace(END, "")
    assert "<" not in outside and not re.search(r"(?i)javascript:|https?://(?!arxiv)", outside)
    assert outside.count("](") == outside.count("](https://arxiv.org")
    assert not re.search(r"[\r\v\f\x1c-\x1e\x85\u2028\u2029\x00\x1b\u202e]", markdown)


@settings(max_examples=150, deadline=None)
@given(NAMES, TEXTS, st.lists(TEXTS, max_size=2))
def test_the_report_has_the_same_tables_and_headings_whatever_the_names(names, text, notes):
    ordinary = recommendation_markdown(named(("a", "b", "c"), notes=["note"] * len(notes)))
    report = recommendation_markdown(named(names, text, notes))
    shapes = [[[len(row) for row in table] for table in tables_of(each)] for each in (report, ordinary)]
    # versions and other settings may be fewer where two hostile keys are one
    assert shapes[0][:3] == shapes[1][:3] and {n for row in shapes[0][3:] for n in row} == {2}
    assert [line for line in report.split("\n") if line.startswith("#")] == [
        line for line in ordinary.split("\n") if line.startswith("#")
    ]
    assert report.count("\n") == ordinary.count("\n")
    assert_harmless(report)


@settings(max_examples=150, deadline=None)
@given(NAMES, TEXTS, st.lists(TEXTS, max_size=2), TEXTS, TEXTS, st.sampled_from(["\n", "\r\n"]))
def test_a_card_is_updated_once_and_all_else_stays_character_by_character(names, text, notes, before, after, end):
    rec = named(names, text, notes)
    section = model_card_section(rec)
    assert section.count(BEGIN) == section.count(END) == 1
    assert_harmless(section)
    card = f"# Mine{end}{before}"
    once = with_model_card_section(card, rec)
    assert with_model_card_section(once, rec) == once
    below = once + after + end
    other = named(("x", "y", "z"), "changed")
    updated = with_model_card_section(below, other)
    assert with_model_card_section(updated, other) == updated
    assert with_model_card_section(updated, rec) == below
    if BEGIN not in before:
        assert once.startswith(card) and updated.startswith(card) and updated.endswith(after + end)


@given(TEXTS)
def test_a_text_is_shown_as_it_is(text):
    shown = html.unescape(plain(text))
    assert shown == plain(text) or "&#" in plain(text)
    expected = " ".join(text.split())
    if expected.isprintable():
        assert shown == expected
    assert "\n" not in plain(text) and len(plain(text).splitlines()) <= 1


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        (
            "raises the loss by 1.5 (from 2.1 to 3.6); rank 1 of 8",
            "raises the loss by 1.5 (from 2.1 to 3.6); rank 1 of 8",
        ),
        ("eᵀ K e, with Adam-preconditioned K_m/s_m", "eᵀ K e, with Adam-preconditioned K_m/s_m"),
        ("a|b", "a&#124;b"),
        ("[x](javascript:y)", "&#91;x&#93;(javascript&#58;y)"),
        ("__init__", "&#95;&#95;init&#95;&#95;"),
        ("1. x", "1&#46; x"),
        ("-0.5", "-0.5"),
        ("- x", "&#45; x"),
        ("# x", "&#35; x"),
        (" a\n b ", "a b"),
        ("\x1b[0m", "&#92;x1b&#91;0m"),
        ("\ud800", "&#92;ud800"),
    ],
)
def test_only_markup_is_escaped(text, markdown):
    assert plain(text) == markdown


@pytest.mark.parametrize(
    ("name", "markdown"),
    [
        ("bert.encoder.layer.0.attention.self.query", "`bert.encoder.layer.0.attention.self.query`"),
        ("größe_1", "`größe_1`"),
        ("a`b", "a&#96;b"),
        ("a|b", "a&#124;b"),
        ("a\nb", "a&#92;nb"),
        ("<b>", "&#60;b&#62;"),
        ("", "(empty)"),
    ],
)
def test_a_name_is_code_unless_code_cannot_hold_it(name, markdown):
    assert code(name) == markdown


@pytest.mark.parametrize(
    ("markdown", "in_a_cell"),
    [
        ("a|b", r"a\|b"),
        (r"a\|b", r"a\|b"),
        (r"a\\|b", r"a\\\|b"),
        ("a\r\nb", "a b"),
        ("`x`", "`x`"),
        ("a\u2028b", "a b"),
    ],
)
def test_cells_may_hold_markdown_of_their_own(markdown, in_a_cell):
    assert cell(markdown) == in_a_cell
    table = markdown_table((markdown, "b"), [(markdown, markdown)])
    assert [len(row) for row in rows_of(table)] == [2, 2, 2]


@pytest.mark.parametrize("blank", ["", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "  \n"])
def test_the_end_of_a_card_stays_before_an_appended_section(blank):
    card = f"# Mine\r\n\r\nText{blank}" if "\r" in blank else f"# Mine\n\nText{blank}"
    once = with_model_card_section(card, planted())
    assert once.startswith(card) and re.search(r"\r?\n\r?\n<!--", once)
    assert with_model_card_section(once, planted()) == once
    assert ("\r\n" in card) == ("\r\n" in once) and ("\r\n" in card) == (re.search(r"(?<!\r)\n", once) is None)


def test_bytes_of_a_card_that_are_no_utf8_stay(tmp_path):
    path = tmp_path / "README.md"
    content = b"\xef\xbb\xbf# Mine \xff\xfe\r\n"
    path.write_bytes(content)
    update_model_card(path, planted())
    once = path.read_bytes()
    update_model_card(path, planted())
    assert path.read_bytes() == once and once.startswith(content) and once.count(BEGIN.encode()) == 1


def test_a_card_does_not_grow_with_a_name_that_is_the_end_of_the_section(tmp_path):
    path = tmp_path / "README.md"
    rec = named((END, BEGIN, "x"), END, [END, BEGIN])
    sizes = []
    for _ in range(3):
        update_model_card(path, rec)
        sizes.append(path.stat().st_size)
    assert len(set(sizes)) == 1


def test_a_parser_of_github_markdown_sees_the_same_table_and_no_html():
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    parser = markdown_it.MarkdownIt("gfm-like", {"linkify": False})
    for number in range(0, len(HOSTILE) - 2, 3):
        names = HOSTILE[number : number + 3]
        tokens = parser.parse(choice_table(named(names, "".join(names))) + "\n\n- " + plain("".join(names)))
        kinds = [token.type for token in tokens]
        assert kinds.count("tr_open") == 3 and kinds.count("td_open") == 8 and kinds.count("th_open") == 4
        inline = {child.type for token in tokens for child in token.children or ()}
        assert inline <= {"text", "code_inline", "text_special"} and "html_block" not in kinds
        assert not {"heading_open", "hr", "blockquote_open", "code_block"} & set(kinds)
