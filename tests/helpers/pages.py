# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Recommendations of many kinds, and a parser that refuses a page which is not well formed."""

import re
from html.parser import HTMLParser

from peft_linear.report.html.page import PAPER
from peft_linear.selection import ModuleScore, Recommendation
from tests.helpers.planted import BERT_NAMES


VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
LOADS = ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background")
MODELS = {
    "bert": [*BERT_NAMES[:12], "bert.pooler.dense"],
    "gpt2": [f"transformer.h.{i}.{b}.{k}" for i in range(12) for b, k in (("attn", "c_attn"), ("mlp", "c_proj"))],
    "llama": [
        f"model.layers.{i}.{k}_proj"
        for i in range(4)
        for k in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ],
    "t5": [
        f"{stack}.block.{i}.layer.{j}.{k}"
        for stack in ("encoder", "decoder")
        for i in range(2)
        for j, k in ((0, "SelfAttention.q"), (0, "SelfAttention.v"), (1, "EncDecAttention.q"), (2, "Dense.wi"))
        if stack == "decoder" or j != 1
    ],
    "vit": [
        *(f"vit.encoder.layer.{i}.attention.attention.{k}" for i in range(3) for k in ("query", "key", "value")),
        "vit.pooler.dense",
    ],
    "experts": [f"model.layers.{i}.mlp.experts.{e}.{k}" for i in range(2) for e in range(8) for k in ("up", "down")],
    "unnumbered": [f"branch_{letter}.fc" for letter in "abcdefghijklmnopqrst"],
    "one": ["fc"],
}


class Page(HTMLParser):
    """Parses a page and refuses tags that are not closed, or in another order."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.tables = [], [], {}, []
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open or tag in VOID, f"<{tag}/> is no HTML"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        self.texts[inside] = self.texts.get(inside, "") + data
        if "td" in self.open or ("th" in self.open and "table" in self.open):
            self.tables[-1][-1][-1] += data

    def attributes(self, tag):
        return [attrs for found, attrs in self.elements if found == tag]


def made(names, picks=2, **fields):
    """A recommendation without kernels behind it."""
    rows = [ModuleScore(name, 1.0 / (i + 1), i + 1, 100, i < picks, "because", 10.0) for i, name in enumerate(names)]
    return Recommendation(tuple(names[:picks]), tuple(rows), {"parameters": 200.0}, "trace", picks, 0.1, **fields)


def check_page(page):
    """Well formed, ids once, nothing loaded."""
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert [a["lang"] for a in parsed.attributes("html")] == ["en"]
    assert {"charset": "utf-8"} in parsed.attributes("meta")
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs[key] for _, attrs in parsed.elements for key in LOADS if key in attrs}
    assert {link for link in links if not link.startswith("#")} <= {PAPER}
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert not re.search(r"@import|url\((?!#)", page)
    assert not parsed.attributes("link") and not parsed.attributes("iframe")
    return parsed


HISTORY = [
    {"loss": 2.0, "step": 10},
    {"eval_loss": 1.75, "eval_accuracy": 0.5, "step": 10},
    {"loss": 1.0, "step": 20},
    {"eval_loss": 1.25, "eval_accuracy": 0.625, "step": 20},
    {"train_loss": 1.5, "step": 20},
]
