# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The search within budgets of time, memory and layers, and what a recommendation says of them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear import ModuleKernels, Recommendation, recommend
from peft_linear.errors import BudgetError
from peft_linear.recommendation.budget import budget_for
from peft_linear.recommendation.cost import RECORD
from peft_linear.selection.baselines import baseline
from peft_linear.selection.criteria import CRITERIA, View, score_modules
from peft_linear.selection.problem import Problem
from peft_linear.selection.search.search import STRATEGIES, search
from tests.helpers.planted import planted_kernels
from tests.helpers.step_costs import COST, COUNTS


NAMES = tuple(module.name for module in COST.modules)
BUDGETS = ["time:0.7", "memory:0.75", ["time:0.8", 0.25], [6, "layers:2", "memory:0.9"], "layers:2"]


def kernels_of(names, worth, counts=COUNTS):
    """Kernels of these traces (in examples), with the counts of the step in their provenance."""
    return ModuleKernels(
        blocks={name: float(worth[name]) * torch.eye(2, dtype=torch.float64) for name in names},
        base=torch.zeros(2, 2, dtype=torch.float64),
        outputs=torch.zeros(2, 1, dtype=torch.float64),
        labels=None,
        num_parameters={name: COST.modules[COST.index[name]].parameters(8) for name in names},
        shapes=dict.fromkeys(names, (64, 64)),
        provenance={} if counts is None else {RECORD: counts},
    )


def found(kernels, budget, strategy="greedy", name="trace"):
    view = View(kernels, Problem.of(kernels, 0.3))
    limit = budget_for(budget, kernels)
    return search(view, CRITERIA[name], score_modules(view, CRITERIA[name]), limit, strategy), limit


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_low_module_does_not_take_the_room_of_many(strategy):
    worth = dict.fromkeys(NAMES, 1.0) | {NAMES[0]: 1.5}
    share = COST.time_share({NAMES[0]: 8, NAMES[1]: 8}, 8) + 1e-6  # the lowest module and one more
    result, limit = found(kernels_of(NAMES, worth), f"time:{share}", strategy)
    assert NAMES[0] not in result.order and len(result.order) > 10
    assert limit.allows(dict.fromkeys(result.order, 8))
    worth[NAMES[0]] = 100.0
    assert NAMES[0] in found(kernels_of(NAMES, worth), f"time:{share}", strategy)[0].order


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@given(seed=st.integers(0, 100))
@settings(max_examples=5, deadline=None)
def test_all_limits_hold_and_no_further_module_of_the_cut_off_fits(budget, strategy, seed):
    worth = dict(zip(NAMES, torch.rand(len(NAMES), generator=torch.Generator().manual_seed(seed)), strict=True))
    kernels = kernels_of(NAMES, worth)
    result, limit = found(kernels, budget, strategy)
    ranks = dict.fromkeys(result.order, 8)
    assert limit.allows(ranks) and len(ranks) == len(result.order) == len(result.path)
    assert result.path[-1] == pytest.approx(2 * sum(float(worth[name]) for name in result.order))
    lowest = min(NAMES.index(name) for name in result.order)
    layer = NAMES[lowest].split(".")[2]
    first = next(i for i, name in enumerate(NAMES) if name.split(".")[2] == layer)
    above = [name for name in NAMES[lowest:] if name not in ranks] if first != lowest else NAMES[first:]
    assert not any(limit.allows({**ranks, name: 8}) for name in above if name not in ranks)
    for name, score in result.last_round.items():
        assert limit.allows(dict.fromkeys([*result.order[:-1], name], 8))
        assert score == pytest.approx(result.path[-1] + 2 * float(worth[name]) - 2 * float(worth[result.order[-1]]))


@given(st.integers(0, 200))
@settings(max_examples=15, deadline=None)
def test_it_is_near_the_best_of_all_sets(seed):
    names = [name for name in NAMES if name.endswith(("q_proj", "o_proj", "down_proj"))]
    worth = dict(zip(names, torch.rand(len(names), generator=torch.Generator().manual_seed(seed)), strict=True))
    kernels = kernels_of(names, worth)
    result, limit = found(kernels, ["time:0.7", 0.5])
    sets = (s for count in range(1, len(names) + 1) for s in itertools.combinations(names, count))
    best = max(sum(float(worth[n]) for n in s) for s in sets if limit.allows(dict.fromkeys(s, 8)))
    assert sum(float(worth[name]) for name in result.order) >= 0.9 * best


def test_criteria_that_do_not_add_up_keep_the_budget_too():
    kernels = planted_kernels(names=NAMES[::3], examples=12)
    sizes = {name: COST.modules[COST.index[name]].parameters(8) for name in NAMES[::3]}
    kernels = kernels_of(NAMES[::3], dict.fromkeys(NAMES, 1.0)).__class__(
        **{
            **{key: getattr(kernels, key) for key in ("blocks", "base", "outputs", "labels", "shapes")},
            "num_parameters": sizes,
            "provenance": {RECORD: COUNTS},
        }
    )
    for strategy in STRATEGIES:
        result, limit = found(kernels, ["time:0.75", "memory:0.9"], strategy, "leave_one_out")
        assert result.order and limit.allows(dict.fromkeys(result.order, 8))


def test_the_recommendation_says_what_a_step_takes_and_is_saved_with_it(tmp_path):
    kernels = kernels_of(NAMES, {name: 1 + i / 100 for i, name in enumerate(NAMES)})
    rec = recommend(kernels, ["time:0.7", 0.5], "trace", exclude=())
    ranks = dict.fromkeys(rec.modules, 8)
    assert rec.step_time == COST.time_share(ranks, 8) <= 0.7 and rec.step_memory == COST.memory_share(ranks, 8)
    words = f"A training step takes about {rec.step_time:.0%} of the time and {rec.step_memory:.0%} of the memory"
    assert words in rec.to_markdown().replace("\\", "") and words in str(rec)
    assert "time:0.7 and" not in rec.to_markdown()
    assert "0.7 of the time of an all-linear step and 50% of the candidates' adapter parameters" in rec.to_markdown()
    assert "Time of a training step" in rec.to_html()
    assert RECORD not in rec.settings.kernels
    rec.save(tmp_path)
    loaded = Recommendation.load(tmp_path)
    assert loaded == rec and loaded.budget == ("time:0.7", 0.5)
    rejected = [row.reason for row in recommend(kernels, "time:0.7", "trace").scores if not row.chosen]
    assert any("it does not fit beside the choice, with it the budget of" in reason for reason in rejected)


def test_baselines_keep_the_budget():
    kernels = kernels_of(NAMES, dict.fromkeys(NAMES, 1.0))
    names = baseline("last_layers", kernels, "time:0.7")
    assert budget_for("time:0.7", kernels).allows(dict.fromkeys(names, 8)) and len(names) > 5


def test_kernels_without_counts_are_refused_before_anything_is_computed():
    kernels = kernels_of(NAMES, dict.fromkeys(NAMES, 1.0), counts=None)
    with pytest.raises(BudgetError, match="computed by an earlier version; compute them again"):
        recommend(kernels, "time:0.7", "trace")
    assert recommend(kernels, "layers:2", "trace").step_time is None
    other = kernels_of(NAMES, dict.fromkeys(NAMES, 1.0), {**COUNTS, "modules": COUNTS["modules"][1:]})
    with pytest.raises(ValueError, match=f"no counts of a training step for '{NAMES[0]}'"):
        recommend(other, "time:0.7", "trace")
