# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The search against enumeration by hand, on criteria small enough to see through."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear.errors import BudgetError, CriterionError
from peft_linear.recommendation.budget import Budget
from peft_linear.selection.criteria import CRITERIA, Criterion, score_modules
from peft_linear.selection.problem import Problem
from peft_linear.selection.search.scoring import Move, Present, SubsetScorer
from peft_linear.selection.search.search import STRATEGIES, check_strategy, rank_by_score, search
from tests.helpers import reference_search
from tests.helpers.planted import BERT_NAMES, planted_kernels


RIDGE = 0.3


def scorer_for(kernels, criterion):
    problem = Problem.of(kernels, RIDGE)
    return SubsetScorer(kernels, criterion, problem, score_modules(kernels, criterion, problem))


budgets = st.one_of(
    st.integers(1, 6).map(lambda n: Budget(n, None)), st.integers(4, 21).map(lambda n: Budget(None, n * 100))
)
SIZES = [100, 200, 300, 400, 500, 600]
EXHAUSTED = ["leave_one_out", "risk_reduction", "effective_dimension", "gradient_energy"]
NOT_ADDITIVE = [name for name, criterion in CRITERIA.items() if not criterion.additive]
BOUNDED = [name for name, criterion in CRITERIA.items() if criterion.bound is not None]


@given(budgets, st.integers(0, 50), st.sampled_from(EXHAUSTED))
@settings(max_examples=40, deadline=None)
def test_exhaustive_search_finds_the_best(budget, seed, name):
    kernels = planted_kernels(names=BERT_NAMES[:6], examples=9, sizes=SIZES, strength=0.3, seed=seed)
    scorer = scorer_for(kernels, CRITERIA[name])
    result = search(scorer, budget, "exhaustive")
    best = reference_search.best_set(kernels, CRITERIA[name], scorer.problem, budget)
    assert set(result.order) == set(best)
    assert result.path[-1] == pytest.approx(CRITERIA[name](kernels.subset(best), scorer.problem), rel=1e-9)


@given(budgets, st.integers(0, 50), st.sampled_from(sorted(CRITERIA)), st.sampled_from(STRATEGIES))
@settings(max_examples=60, deadline=None)
def test_every_search_uses_the_budget_up_and_keeps_to_it(budget, seed, name, strategy):
    kernels = planted_kernels(names=BERT_NAMES[:6], examples=6, sizes=SIZES, seed=seed)
    criterion = CRITERIA[name]
    result = search(scorer_for(kernels, criterion), budget, strategy)
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
    scorer = scorer_for(kernels, CRITERIA[name])
    results = [search(scorer, Budget(count, None), strategy) for strategy in STRATEGIES]
    assert len({frozenset(result.order) for result in results}) == 1
    assert results[0].order == rank_by_score(scorer.singles, CRITERIA[name])[:count] == results[1].order
    assert scorer.evaluations == 7, "one evaluation a module and one of the base, whatever the search"


def test_greedy_steps_past_a_twin_where_top_does_not():
    """Two equal good modules and one that sees what they do not: the second pick is not the twin."""
    kernels = planted_kernels(names=("twin.0.a", "twin.1.a", "other.2.a"), informative=(), examples=12, head=1e-3)
    n = len(kernels.base)
    first = torch.zeros(n, dtype=torch.float64)
    first[: n // 2] = 1.0
    half, rest = torch.diag(first), torch.diag(1.0 - first)
    kernels = type(kernels)(
        blocks={"twin.0.a": half, "twin.1.a": half.clone(), "other.2.a": 0.9 * rest},
        **{f: getattr(kernels, f) for f in ("base", "outputs", "labels", "num_parameters", "shapes")},
    )
    scorer = scorer_for(kernels, CRITERIA["risk_reduction"])
    greedy, top = (search(scorer, Budget(2, None), strategy) for strategy in ("greedy", "top"))
    assert set(greedy.order) != {"twin.0.a", "twin.1.a"}
    assert greedy.path[-1] > top.path[-1] or set(top.order) == set(greedy.order)
    assert search(scorer, Budget(2, None), "exhaustive").path[-1] == pytest.approx(greedy.path[-1])


def test_a_parameter_budget_is_not_spent_on_one_large_module_when_small_ones_give_more():
    """By score alone the large module (score 1.0) comes first; four small ones (0.4 each) fit in its place."""
    names = ("big.0.x", "s.1.x", "s.2.x", "s.3.x", "s.4.x")
    kernels = planted_kernels(names=names, examples=4, sizes=[400, 100, 100, 100, 100], head=0.0)
    eye = torch.eye(12, dtype=torch.float64)
    kernels = type(kernels)(
        blocks={name: (1.0 if name.startswith("big") else 0.4) * eye / 12 for name in names},
        **{f: getattr(kernels, f) for f in ("base", "outputs", "labels", "num_parameters", "shapes")},
    )
    result = search(scorer_for(kernels, CRITERIA["trace"]), Budget(None, 400), "greedy")
    assert set(result.order) == set(names[1:])
    assert result.path[-1] == pytest.approx(1.6)
    assert search(scorer_for(kernels, CRITERIA["trace"]), Budget(None, 400), "top").order == ("big.0.x",)
    # and the other way round: where the large module is worth it, it is taken
    blocks = {name: (3.0 if name.startswith("big") else 0.4) * eye / 12 for name in names}
    rich = type(kernels)(
        blocks=blocks, **{f: getattr(kernels, f) for f in ("base", "outputs", "labels", "num_parameters", "shapes")}
    )
    assert search(scorer_for(rich, CRITERIA["trace"]), Budget(None, 450), "greedy").order == ("big.0.x",)


def test_ranking_takes_the_direction_from_the_criterion_and_ties_from_the_model():
    scores = {"a": 1.0, "b": 3.0, "c": 1.0}
    up = Criterion("x", lambda gram, problem: 0.0, "x", "x", higher_is_better=True)
    down = Criterion("x", lambda gram, problem: 0.0, "x", "x", higher_is_better=False)
    assert rank_by_score(scores, up) == ("b", "a", "c")
    assert rank_by_score(scores, down) == ("a", "c", "b")


@given(budgets, st.integers(0, 200), st.sampled_from(NOT_ADDITIVE), st.sampled_from(["greedy", "backward", "swap"]))
@settings(max_examples=60, deadline=None)
def test_searches_find_what_their_slow_twins_find(budget, seed, name, strategy):
    kernels = planted_kernels(names=BERT_NAMES[:6], examples=6, sizes=SIZES, strength=0.3, seed=seed)
    scorer = scorer_for(kernels, CRITERIA[name])
    context = kernels, CRITERIA[name], scorer.problem, budget
    run = reference_search.backward if strategy == "backward" else reference_search.forward
    expected = reference_search.better(*context, run)
    if strategy == "swap":
        expected = reference_search.swaps(*context, expected)
    result = search(scorer, budget, strategy)
    assert set(result.order) == set(expected)
    assert result.path[-1] == pytest.approx(CRITERIA[name](kernels.subset(expected), scorer.problem), rel=1e-9)
    if strategy == "greedy":
        assert list(result.order) == expected


@given(
    budgets,
    st.integers(0, 200),
    st.sampled_from(BOUNDED),
    st.sampled_from(["greedy", "backward", "swap", "exhaustive"]),
    st.floats(-3, 2),
)
@settings(max_examples=80, deadline=None)
def test_what_a_bound_skips_changes_nothing(budget, seed, name, strategy, exponent):
    kernels = planted_kernels(names=BERT_NAMES[:6], examples=6, sizes=SIZES, strength=0.3, seed=seed)
    problem = Problem.of(kernels, 10.0**exponent)
    singles = score_modules(kernels, CRITERIA[name], problem)
    bounded = SubsetScorer(kernels, CRITERIA[name], problem, singles)
    plain = SubsetScorer(kernels, replace(CRITERIA[name], bound=None), problem, singles)
    ours, theirs = search(bounded, budget, strategy), search(plain, budget, strategy)
    assert ours.order == theirs.order and ours.path == theirs.path and ours.changes == theirs.changes
    assert theirs.skipped == 0
    if strategy != "exhaustive":  # which searches once more, for a set to begin with
        assert ours.evaluations + ours.skipped == theirs.evaluations
    assert ours.last_round.keys() | ours.last_limits.keys() == theirs.last_round.keys()
    utility = CRITERIA[name].utility
    for module, score in theirs.last_round.items():
        if module in ours.last_round:
            assert score == ours.last_round[module]
        else:
            assert utility(score) <= utility(ours.last_limits[module])


def uneven_kernels(count, examples):
    """Modules whose kernels differ in size and share directions that hardly move, as those of a network do."""
    kernels = planted_kernels(names=BERT_NAMES[:count], examples=examples, strength=0.3)
    rows = 0.7 ** torch.arange(len(kernels.base), dtype=torch.float64)
    blocks = {n: 2.0 ** (i % 7) * kernels[n] * torch.outer(rows, rows) for i, n in enumerate(kernels.names)}
    return replace(kernels, blocks=blocks, base=kernels.base * torch.outer(rows, rows))


@pytest.mark.parametrize("name", BOUNDED)
def test_a_bound_skips_most_of_a_search(name):
    kernels = uneven_kernels(18, 12)
    result = search(scorer_for(kernels, CRITERIA[name]), Budget(5, None), "greedy")
    rounds = 17 + 16 + 15 + 14
    assert result.evaluations + result.skipped == 19 + rounds
    assert result.skipped > rounds / 2


@pytest.mark.parametrize("name", ["risk_reduction", "effective_dimension"])
def test_branch_and_bound_leaves_most_sets_out(name):
    kernels = uneven_kernels(12, 8)
    scorer = scorer_for(kernels, CRITERIA[name])
    result = search(scorer, Budget(4, None), "exhaustive")
    plain = scorer_for(kernels, replace(CRITERIA[name], bound=None))
    assert search(plain, Budget(4, None), "exhaustive").order == result.order
    assert result.evaluations < plain.evaluations / 3


def crossed_kernels():
    """One module that sees both halves of the residual a little, and two that each see one of them well."""
    kernels = planted_kernels(names=("both.0.a", "one.1.a", "other.2.a"), informative=(), examples=12, head=0.0)
    residual = Problem.of(kernels, RIDGE).residual
    first = torch.arange(len(residual)) < len(residual) // 2
    halves = [torch.where(first, residual, 0.0), torch.where(first, 0.0, residual)]
    vectors = [residual / residual.norm(), *(half / half.norm() for half in halves)]
    blocks = {
        name: RIDGE * scale * torch.outer(v, v)
        for name, scale, v in zip(kernels.names, (3.0, 100.0, 100.0), vectors, strict=True)
    }
    return replace(kernels, blocks=blocks)


def test_exchanges_and_backward_search_find_a_pair_that_greedy_does_not():
    scorer = scorer_for(crossed_kernels(), CRITERIA["risk_reduction"])
    greedy, backward, swap = (search(scorer, Budget(2, None), s) for s in ("greedy", "backward", "swap"))
    assert greedy.order[0] == "both.0.a"
    assert set(backward.order) == set(swap.order) == {"one.1.a", "other.2.a"}
    assert swap.path[-1] == pytest.approx(backward.path[-1])
    assert swap.path[-1] > greedy.path[-1] + 0.1
    (change,) = swap.changes
    assert (change.out, change.round, change.before) == ("both.0.a", 1, greedy.path[-1])
    assert change.after == pytest.approx(swap.path[-1])
    (removed,) = backward.changes
    assert (removed.out, removed.into) == ("both.0.a", None)
    assert search(scorer, Budget(2, None), "forward") == replace(
        greedy, evaluations=scorer.evaluations, skipped=scorer.skipped
    )


@given(st.integers(0, 100), st.sampled_from(["risk_reduction", "leave_one_out", "effective_rank"]))
@settings(max_examples=20, deadline=None)
def test_no_exchange_improves_what_swap_finds(seed, name):
    kernels = planted_kernels(names=BERT_NAMES[:7], examples=6, strength=0.3, seed=seed)
    criterion, scorer = CRITERIA[name], scorer_for(kernels, CRITERIA[name])
    found = search(scorer, Budget(3, None), "swap")
    best = criterion.utility(found.path[-1])
    assert best >= criterion.utility(search(scorer, Budget(3, None), "greedy").path[-1])
    for out in found.order:
        for into in set(kernels.names) - set(found.order):
            other = kernels.subset([*(n for n in found.order if n != out), into])
            assert criterion.utility(criterion(other, scorer.problem)) <= best + 1e-9 * abs(best)


@pytest.mark.parametrize("large", [1.0, 1e6, 1e13])
def test_taking_a_module_out_leaves_the_sum_of_the_others(large):
    """Subtraction alone would leave the rounding of the large block: here 1e13 times that of the others."""
    kernels = planted_kernels(names=BERT_NAMES[:4], examples=6)
    blocks = {n: (large if i == 1 else 1.0) * kernels[n] for i, n in enumerate(kernels.names)}
    kernels = replace(kernels, blocks=blocks)
    present = Present(kernels, kernels.names)
    for out in (kernels.names[1], kernels.names[3]):
        rest = [n for n in present.names if n != out]
        after = present.after(Move(out=out))
        present.make(Move(out=out))
        for gram in (after, present.gram):
            assert float((gram - kernels.subset(rest)).norm() / kernels.subset(rest).norm()) < 1e-11
    present.make(Move(into=kernels.names[1], out=kernels.names[0]))
    torch.testing.assert_close(present.gram, kernels.subset(present.names), rtol=1e-11, atol=0)
    assert set(present.names) == {kernels.names[1], kernels.names[2]}


@given(budgets, st.integers(0, 100), st.sampled_from(["trace", "gradient_energy"]), st.data())
@settings(max_examples=40, deadline=None)
def test_for_additive_criteria_every_search_but_top_finds_the_best_set(budget, seed, name, data):
    kernels = planted_kernels(names=BERT_NAMES[:6], examples=4, sizes=SIZES, seed=seed, strength=0.2)
    scales = data.draw(st.lists(st.floats(0.0, 5.0), min_size=6, max_size=6))
    kernels = replace(kernels, blocks={n: scale * kernels[n] for n, scale in zip(kernels.names, scales, strict=True)})
    scorer = scorer_for(kernels, CRITERIA[name])
    best = reference_search.best_set(kernels, CRITERIA[name], scorer.problem, budget)
    for strategy in ("greedy", "backward", "swap", "exhaustive"):
        result = search(scorer, budget, strategy)
        assert result.path[-1] == pytest.approx(CRITERIA[name](kernels.subset(best), scorer.problem), rel=1e-9)
    assert scorer.evaluations == 7


def test_refused():
    with pytest.raises(CriterionError, match="unknown strategy 'random'; there are: greedy, backward, swap, top"):
        check_strategy("random", 4, Budget(2, None))
    with pytest.raises(BudgetError, match="over 36 candidates with a budget of 8 modules is 30,260,340 sets"):
        check_strategy("exhaustive", 36, Budget(8, None))
    with pytest.raises(BudgetError, match="over 15 candidates with a budget of 9 parameters is 32,768 sets"):
        check_strategy("exhaustive", 15, Budget(None, 9))
    check_strategy("exhaustive", 14, Budget(None, 9))
    check_strategy("greedy", 10_000, Budget(500, None))
    assert check_strategy("forward", 10_000, Budget(500, None)) == "greedy"
    with pytest.raises(BudgetError, match=r'use strategy="swap", whose answer no exchange of one module improves'):
        check_strategy("exhaustive", 37, Budget(4, None), CRITERIA["leave_one_out"])
    check_strategy("exhaustive", 37, Budget(4, None), CRITERIA["risk_reduction"])  # 66,045 sets, most of them bounded
    with pytest.raises(BudgetError, match="is 435,897 sets, more than 200,000"):
        check_strategy("exhaustive", 37, Budget(5, None), CRITERIA["risk_reduction"])
    check_strategy("exhaustive", 10_000, Budget(500, None), CRITERIA["trace"])
