# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The docs are in plain English, short and planned: no listed phrase, word limits, and every page in the nav."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Folders of docs/ that word list and size do not look at yet. Empty it when docs/measurements has been shortened.
NOT_YET: tuple[str, ...] = ()
# What is scanned for the word list: (folder, pattern). Add ("peft_linear", "**/*.py") when its docstrings are clean.
ROOTS = [(".", "README.md"), (".", "CONTRIBUTING.md"), ("docs", "**/*.md"), ("peft_linear", "**/*.py")]
WORD_LIMITS = {"README.md": 600, "docs/how-to": 900}
SIZE_LIMIT = 3_000_000  # bytes of docs/

# phrase -> what to write in its place
PLAIN = {
    r"foretell|foretold": "predict",
    r"\brivals?\b": "baseline",
    r"\beyes\b": "name the preconditioner or the model",
    r"\bkin\b": "a subclass",
    r"\b(left|leaves?|leaving) (\w+ ){0,4}for last|\bcomes? last\b": "excluded by `exclude`",
    r"\bdearest\b": "most expensive",
    r"as (adamw?|the optimizer) sees": "Adam-preconditioned",
    r"\bloads nothing\b": "self-contained",
    r"drawn by a number": "sampled with a fixed seed",
    r"none of (our|your|its) business": "ignored",
    r"\bcome(s)? by\b": "call it",
    r"trained whatever": "always trained",
    r"no linear map": "not a linear layer",
    r"the data's, not the sample's": "stable under resampling",
    r"looks? through|looked at through|\bsecond look\b": "head state, or heads",
    r"\bunawares\b": "by mistake",
    r"hangs? on\b": "depends on",
    r"\bdecidedly\b": "significantly",
    r"nobody (has )?ch(o|ose|osen)\b": "sampled after the method was frozen",
    r"for want of": "for lack of",
    r"\bthe contrary\b": "the opposite",
    r"of all parameters": "of the candidates' adapter parameters",
}


def pages(skip: tuple[str, ...] = ()) -> list[Path]:
    return [path for path in sorted(DOCS.rglob("*.md")) if path.relative_to(DOCS).parts[0] not in skip]


def scanned() -> list[Path]:
    found = {path for folder, pattern in ROOTS for path in (ROOT / folder).glob(pattern)}
    return sorted(path for path in found if not any((DOCS / name) in path.parents for name in NOT_YET))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def offences(text: str) -> list[str]:
    """`line: phrase -> replacement` for every phrase of the list; phrases may run over a line break."""
    flat = re.sub(r"\s", " ", text)
    return [
        f"{text[: match.start()].count(chr(10)) + 1}: {match[0]!r} -> {better}"
        for phrase, better in PLAIN.items()
        for match in re.finditer(phrase, flat, re.IGNORECASE)
    ]


def words(text: str) -> int:
    """What `wc -w` counts: code and tables too."""
    return len(text.split())


@pytest.mark.parametrize(
    "text",
    ["it foretells\nthe loss", "the Rivals", "is left for\nlast", "As AdamW sees it", "a page that loads nothing"],
)
def test_the_word_list_finds_its_phrases(text):
    assert offences(text)


@pytest.mark.parametrize(
    "text", ["the kinds of kernel", "kinetic", "the arrivals", "predicts the loss", "the last layer"]
)
def test_the_word_list_leaves_plain_english_alone(text):
    assert not offences(text)


@pytest.mark.parametrize("path", scanned(), ids=name)
def test_texts_are_in_plain_english(path):
    assert not offences(path.read_text(encoding="utf-8"))


def nav_pages(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in nav_pages(item)]


def test_every_page_is_in_the_nav_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed, excluded = nav_pages(config["nav"]), set(config.get("exclude_docs", "").split())
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.relative_to(DOCS).as_posix() for path in pages()} - excluded


@pytest.mark.parametrize(("place", "limit"), WORD_LIMITS.items(), ids=WORD_LIMITS.keys())
def test_pages_are_short(place, limit):
    found = [ROOT / place] if place.endswith(".md") else sorted((ROOT / place).glob("*.md"))
    assert found
    long = {name(path): words(path.read_text(encoding="utf-8")) for path in found}
    assert all(count <= limit for count in long.values()), long


def test_the_docs_are_small():
    files = [path for path in DOCS.rglob("*") if path.is_file() and path.relative_to(DOCS).parts[0] not in NOT_YET]
    assert sum(path.stat().st_size for path in files) < SIZE_LIMIT
