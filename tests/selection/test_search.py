# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The search against enumeration by hand, on criteria small enough to see through."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear.errors import BudgetError, CriterionError
from peft_linear.selection.budget import Budget
from peft_linear.selection.criteria import CRITERIA, Criterion, score_modules
from peft_linear.selection.problem import Problem
from peft_linear.selection.search import STRATEGIES, SubsetScorer, check_strategy, rank_by_score, search
from tests.selection.planted import BERT_NAMES, planted_kernels


RIDGE = 0.3


def scorer_for(kernels, criterion):
    problem = Problem.of(kernels, RIDGE)
    return SubsetScorer(kernels, criterion, problem, score_modules(kernels, criterion, problem))


def best_by_hand(kernels, criterion, budget):
    """Every set that fits and cannot be added to; the best score."""
    sizes, problem = kernels.num_parameters, Problem.of(kernels, RIDGE)
    best = None
    for count in range(1, len(kernels) + 1):
        for subset in itertools.combinations(kernels.names, count):
            used = sum(sizes[n] for n in subset)
            rest = [n for n in kernels.names if n not in subset]
            if budget.fits(count, used) and not any(budget.fits(count + 1, used + sizes[n]) for n in rest):
                score = criterion(kernels.subset(subset), problem)
                if best is None or criterion.utility(score) > criterion.utility(best):
                    best = score
    return best


budgets = st.one_of(
    st.integers(1, 6).map(lambda n: Budget(n, None)), st.integers(4, 21).map(lambda n: Budget(None, n * 100))
)
SIZES = [100, 200, 300, 400, 500, 600]


@given(budgets, st.integers(0, 50), st.sampled_from(["leave_one_out", "risk_reduction", "gradient_energy"]))
@settings(max_examples=25, deadline=None)
def test_exhaustive_search_finds_the_best(budget, seed, name):
    kernels = planted_kernels(names=BERT_NAMES[:6], examples=9, sizes=SIZES, strength=0.3, seed=seed)
    scorer = scorer_for(kernels, CRITERIA[name])
    result = search(scorer, budget, "exhaustive")
    assert result.path[-1] == pytest.approx(best_by_hand(kernels, CRITERIA[name], budget), rel=1e-9)


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


def test_refused():
    with pytest.raises(CriterionError, match="unknown strategy 'random'; there are: greedy, top, exhaustive"):
        check_strategy("random", 4, Budget(2, None))
    with pytest.raises(BudgetError, match="over 36 candidates with a budget of 8 modules is 30,260,340 sets"):
        check_strategy("exhaustive", 36, Budget(8, None))
    with pytest.raises(BudgetError, match="over 15 candidates with a budget of 9 parameters is 32,768 sets"):
        check_strategy("exhaustive", 15, Budget(None, 9))
    check_strategy("exhaustive", 14, Budget(None, 9))
    check_strategy("greedy", 10_000, Budget(500, None))
