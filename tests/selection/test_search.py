# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The search against enumeration of every set."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear.errors import CriterionError
from peft_linear.recommendation.budget import Budget
from peft_linear.selection.criteria import CRITERIA, Criterion, View, rank_by_score, score_modules
from peft_linear.selection.problem import Problem
from peft_linear.selection.search.search import STRATEGIES, search
from tests.helpers import reference_search
from tests.helpers.planted import BERT_NAMES, planted_kernels


RIDGE = 0.3


def run(kernels, criterion, budget, strategy="greedy", ridge=RIDGE):
    view = View(kernels, Problem.of(kernels, ridge))
    return search(view, criterion, score_modules(view, criterion), budget, strategy)


budgets = st.one_of(
    st.integers(1, 6).map(lambda n: Budget(n, None)), st.integers(4, 21).map(lambda n: Budget(None, n * 100))
)
SIZES = [100, 200, 300, 400, 500, 600]
NOT_ADDITIVE = [name for name, criterion in CRITERIA.items() if not criterion.additive]


@given(budgets, st.integers(0, 50), st.sampled_from(sorted(CRITERIA)), st.sampled_from(STRATEGIES))
@settings(max_examples=60, deadline=None)
def test_every_search_uses_the_budget_up_and_keeps_to_it(budget, seed, name, strategy):
    kernels = planted_kernels(names=BERT_NAMES[:6], examples=6, sizes=SIZES, seed=seed)
    criterion = CRITERIA[name]
    result = run(kernels, criterion, budget, strategy)
    used = sum(kernels.num_parameters[n] for n in result.order)
    assert budget.fits(len(result.order), used)
    assert len(set(result.order)) == len(result.order) == len(result.path)
    for rest in set(kernels.names) - set(result.order):
        assert not budget.fits(len(result.order) + 1, used + kernels.num_parameters[rest])
    problem = Problem.of(kernels, RIDGE)
    for i, score in enumerate(result.path, start=1):
        expected = criterion(kernels.subset(result.order[:i]), problem)
        assert score == pytest.approx(expected, rel=1e-9), "the path is the score of each leading part"
    for name_, score in result.last_round.items():
        swapped = criterion(kernels.subset([*result.order[:-1], name_]), problem)
        assert score == pytest.approx(swapped, rel=1e-9)
        assert criterion.utility(score) <= criterion.utility(result.path[-1]) + 1e-12 * abs(score) or budget.parameters


@given(st.integers(1, 6), st.integers(0, 50), st.sampled_from(["trace", "gradient_energy"]))
@settings(max_examples=20, deadline=None)
def test_for_additive_criteria_greedy_is_top_is_best(count, seed, name):
    kernels = planted_kernels(names=BERT_NAMES[:6], examples=6, seed=seed, strength=0.2)
    kernels = type(kernels)(
        **{
            **{f: getattr(kernels, f) for f in ("base", "outputs", "labels", "num_parameters", "shapes")},
            "blocks": {n: (i + 1.5) * kernels[n] for i, n in enumerate(kernels.names)},
        }
    )
    results = [run(kernels, CRITERIA[name], Budget(count, None), strategy) for strategy in STRATEGIES]
    singles = score_modules(View(kernels, Problem.of(kernels, RIDGE)), CRITERIA[name])
    for result in results:
        assert result.order == rank_by_score(singles, CRITERIA[name])[:count]
        assert result.evaluations == 7, "one evaluation a module and one of the base"


def test_greedy_steps_past_a_twin_where_top_does_not():
    """Two equal good modules and one that covers the other rows: the second pick is not the twin."""
    kernels = planted_kernels(names=("twin.0.a", "twin.1.a", "other.2.a"), informative=(), examples=12, head=1e-3)
    n = len(kernels.base)
    first = torch.zeros(n, dtype=torch.float64)
    first[: n // 2] = 1.0
    half, rest = torch.diag(first), torch.diag(1.0 - first)
    kernels = type(kernels)(
        blocks={"twin.0.a": half, "twin.1.a": half.clone(), "other.2.a": 0.9 * rest},
        **{f: getattr(kernels, f) for f in ("base", "outputs", "labels", "num_parameters", "shapes")},
    )
    greedy, top = (run(kernels, CRITERIA["risk_reduction"], Budget(2, None), s) for s in ("greedy", "top"))
    assert set(greedy.order) != {"twin.0.a", "twin.1.a"}
    assert greedy.path[-1] > top.path[-1] or set(top.order) == set(greedy.order)
    problem = Problem.of(kernels, RIDGE)
    best = reference_search.best_set(kernels, CRITERIA["risk_reduction"], problem, Budget(2, None))
    assert set(greedy.order) == set(best)


def test_a_parameter_budget_is_not_spent_on_one_large_module_when_small_ones_give_more():
    """By score alone the large module (score 1.0) comes first; four small ones (0.4 each) fit in its place."""
    names = ("big.0.x", "s.1.x", "s.2.x", "s.3.x", "s.4.x")
    kernels = planted_kernels(names=names, examples=4, sizes=[400, 100, 100, 100, 100], head=0.0)
    eye = torch.eye(12, dtype=torch.float64)
    kernels = type(kernels)(
        blocks={name: (1.0 if name.startswith("big") else 0.4) * eye / 12 for name in names},
        **{f: getattr(kernels, f) for f in ("base", "outputs", "labels", "num_parameters", "shapes")},
    )
    result = run(kernels, CRITERIA["trace"], Budget(None, 400), "greedy")
    assert set(result.order) == set(names[1:])
    assert result.path[-1] == pytest.approx(1.6)
    assert run(kernels, CRITERIA["trace"], Budget(None, 400), "top").order == ("big.0.x",)
    # and the other way round: where the large module is worth it, it is taken
    blocks = {name: (3.0 if name.startswith("big") else 0.4) * eye / 12 for name in names}
    rich = type(kernels)(
        blocks=blocks, **{f: getattr(kernels, f) for f in ("base", "outputs", "labels", "num_parameters", "shapes")}
    )
    assert run(rich, CRITERIA["trace"], Budget(None, 450), "greedy").order == ("big.0.x",)


def test_ranking_takes_the_direction_from_the_criterion_and_ties_from_the_model():
    scores = {"a": 1.0, "b": 3.0, "c": 1.0}
    up = Criterion("x", lambda gram, problem: 0.0, "x", "x", higher_is_better=True)
    down = Criterion("x", lambda gram, problem: 0.0, "x", "x", higher_is_better=False)
    assert rank_by_score(scores, up) == ("b", "a", "c")
    assert rank_by_score(scores, down) == ("a", "c", "b")


@given(budgets, st.integers(0, 200), st.sampled_from(NOT_ADDITIVE))
@settings(max_examples=60, deadline=None)
def test_greedy_finds_what_its_slow_twin_finds(budget, seed, name):
    kernels = planted_kernels(names=BERT_NAMES[:6], examples=6, sizes=SIZES, strength=0.3, seed=seed)
    problem = Problem.of(kernels, RIDGE)
    expected = reference_search.greedy(kernels, CRITERIA[name], problem, budget)
    result = run(kernels, CRITERIA[name], budget)
    assert list(result.order) == expected
    assert result.path[-1] == pytest.approx(CRITERIA[name](kernels.subset(expected), problem), rel=1e-9)


@given(budgets, st.integers(0, 100), st.sampled_from(["trace", "gradient_energy"]), st.data())
@settings(max_examples=40, deadline=None)
def test_for_additive_criteria_greedy_finds_the_best_set_there_is(budget, seed, name, data):
    kernels = planted_kernels(names=BERT_NAMES[:6], examples=4, sizes=SIZES, seed=seed, strength=0.2)
    scales = data.draw(st.lists(st.floats(0.0, 5.0), min_size=6, max_size=6))
    kernels = replace(kernels, blocks={n: scale * kernels[n] for n, scale in zip(kernels.names, scales, strict=True)})
    problem = Problem.of(kernels, RIDGE)
    best = reference_search.best_set(kernels, CRITERIA[name], problem, budget)
    result = run(kernels, CRITERIA[name], budget)
    assert result.path[-1] == pytest.approx(CRITERIA[name](kernels.subset(best), problem), rel=1e-9)
    assert result.evaluations == 7


@pytest.mark.parametrize("strategy", ["random", "swap", "exhaustive", ""])
def test_an_unknown_strategy_is_refused(strategy):
    with pytest.raises(CriterionError, match=f"unknown strategy '{strategy}'; there are: greedy, top"):
        run(planted_kernels(), CRITERIA["trace"], Budget(2, None), strategy)
