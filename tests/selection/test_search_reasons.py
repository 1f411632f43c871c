# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a recommendation says of modules that a search removed, exchanged or never scored."""

import re
from dataclasses import replace

import pytest
import torch

from peft_linear.errors import BudgetError
from peft_linear.recommendation.budget import Budget
from peft_linear.selection import recommend
from peft_linear.selection.criteria import CRITERIA
from peft_linear.selection.problem import Problem
from peft_linear.selection.reasons import explain
from peft_linear.selection.search.search_result import SearchResult
from tests.helpers.planted import BERT_NAMES, planted_kernels


RIDGE = 0.3


def crossed_kernels():
    """`both` alone is better than `one` or `other`; together these two are best. `idle` adds hardly anything."""
    names = ("both.0.a", "one.1.a", "other.2.a", "idle.3.a")
    kernels = planted_kernels(names=names, informative=(), examples=12, head=0.0)
    residual = Problem.of(kernels, RIDGE).residual
    first = torch.arange(len(residual)) < len(residual) // 2
    halves = [torch.where(first, residual, 0.0), torch.where(first, 0.0, residual)]
    vectors = [residual, *halves, halves[0]]
    blocks = {
        name: RIDGE * scale * torch.outer(v, v) / v.dot(v)
        for name, scale, v in zip(names, (3.0, 100.0, 100.0, 1e-3), vectors, strict=True)
    }
    return replace(kernels, blocks=blocks)


def reasons_of(rec):
    return {row.name: row.reason for row in rec.scores}


def test_an_exchanged_module_is_named_on_both_sides():
    rec = recommend(crossed_kernels(), 2, "risk_reduction", RIDGE, "swap")
    assert set(rec.modules) == {"one.1.a", "other.2.a"}
    reasons = reasons_of(rec)
    pattern = (
        r"not chosen: exchanged for (one.1.a|other.2.a), which raises the risk reduction by \S+ \(from \S+ to \S+\)"
    )
    came = re.match(pattern, reasons["both.0.a"]).group(1)
    assert "; came in for both.0.a; alone" in reasons[came]
    assert "came in" not in reasons[({"one.1.a", "other.2.a"} - {came}).pop()]
    assert reasons["idle.3.a"].startswith("not chosen: in place of no chosen module does it improve the set; alone")
    assert rec.settings["strategy"] == "swap"


def test_a_removed_module_says_when_and_what_that_did():
    rec = recommend(crossed_kernels(), 2, "risk_reduction", RIDGE, "backward")
    assert set(rec.modules) == {"one.1.a", "other.2.a"}
    reasons = reasons_of(rec)
    assert reasons["idle.3.a"].startswith(
        "not chosen: removed 1st, as the one missed least: that lowers the risk reduction by "
    )
    assert reasons["both.0.a"].startswith("not chosen: removed 2nd, as the one missed least: that lowers the")
    assert not any("best that fits" in reason for reason in reasons.values())


def test_a_module_that_was_never_scored_says_what_it_could_give_at_most():
    kernels = planted_kernels(strength=0.3)
    kernels = replace(kernels, blocks={n: 3.0**i * kernels[n] for i, n in enumerate(kernels.names)})
    rec = recommend(kernels, 3, "risk_reduction", RIDGE)
    assert rec.settings["skipped"] > 0
    plain = SearchResult(
        rec.modules, 0.0, (0.1, 0.2, 0.9), {}, {n: 0.5 for n in kernels.names if n not in rec.modules}
    )
    skipped = [
        r for r in reasons_of(rec).values() if re.search(r"risk reduction \S+ at best, which is worse; alone", r)
    ]
    assert skipped and all(reason.startswith("not chosen: in place of the last pick") for reason in skipped)
    singles = dict.fromkeys(kernels.names, 0.1)
    sizes = kernels.num_parameters
    dear = replace(plain, last_limits=dict.fromkeys(plain.last_limits, 0.95))
    for result, words in ((plain, "0.5 at best, which is worse"), (dear, "0.95 at best, which is less for its param")):
        told = explain(result, singles, CRITERIA["risk_reduction"], Budget(None, 9000), sizes, "greedy")
        assert sum(words in reason for reason in told.values()) == 5


def test_ordinals():
    kernels = planted_kernels(names=BERT_NAMES[:26], examples=8)
    reasons = " ".join(reasons_of(recommend(kernels, 1, "effective_rank", RIDGE, "backward")).values())
    for word in (
        "1st,",
        "2nd,",
        "3rd,",
        "4th,",
        "11th,",
        "12th,",
        "13th,",
        "21st,",
        "22nd,",
        "23rd,",
        "24th,",
        "25th,",
    ):
        assert f"removed {word} as" in reasons


@pytest.mark.parametrize("strategy", ["backward", "swap", "forward"])
@pytest.mark.parametrize("budget", [3, 0.375])
def test_the_planted_modules_are_found_by_every_way(strategy, budget):
    kernels = planted_kernels()
    rec = recommend(kernels, budget, "leave_one_out", strategy=strategy)
    assert {kernels.names[2], kernels.names[5]} <= set(rec.modules)
    assert rec.settings["strategy"] == ("greedy" if strategy == "forward" else strategy)
    assert len(rec.modules) == 3


def test_too_many_sets_are_refused_before_work_but_not_where_none_is_enumerated():
    kernels = planted_kernels(names=BERT_NAMES[:22], examples=4)
    with pytest.raises(BudgetError, match=r'is 497,420 sets, more than 20,000; use strategy="swap"'):
        recommend(kernels, 8 + 1, "leave_one_out", strategy="exhaustive")
    rec = recommend(kernels, 9, "trace", strategy="exhaustive")
    assert set(rec.modules) == set(recommend(kernels, 9, "trace").modules)
