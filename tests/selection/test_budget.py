# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_linear.errors import BudgetError
from peft_linear.recommendation.budget import Budget, fill, parse_budget
from tests.helpers.step_costs import COST


SIZES = {"a": 100, "b": 200, "c": 700}


@pytest.mark.parametrize(
    ("written", "modules", "parameters"),
    [
        (1, 1, None),
        (3, 3, None),
        (0.1, None, 100),
        (0.3, None, 300),
        (1.0, None, 1000),
        ("100", None, 100),
        ("0.5k", None, 500),
        (" 1K ", None, 1000),
        ("0.0005M", None, 500),
    ],
)
def test_what_was_written_is_what_is_meant(written, modules, parameters):
    assert parse_budget(written, SIZES) == Budget(modules, parameters)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (0, "a budget of 0 modules, but there are 1 to 3"),
        (-1, "a budget of -1 modules"),
        (4, "a budget of 4 modules, but there are 1 to 3"),
        (0.0, r"a fraction must be in \(0, 1\], got 0.0"),
        (1.5, r"a fraction must be in \(0, 1\], got 1.5"),
        (math.nan, "got nan"),
        (math.inf, "got inf"),
        (0.05, "is 50 parameters, but the smallest candidate has 100"),
        ("99", "is 99 parameters, but the smallest candidate has 100"),
        ("1.1k", "a budget of 1,100 parameters, but all candidates together have 1,000"),
        ("eight", "cannot read the budget 'eight'; pass a number of modules"),
        ("", "cannot read the budget ''"),
        ("-5k", "cannot read the budget '-5k'"),
        ("1.2.3", "cannot read the budget '1.2.3'"),
        ("5 apples", "cannot read the budget"),
        (None, "budget must be an int, a float or a string, got None"),
        (True, "got True"),
        ({3}, r"got \{3\}"),
        ([], r"a budget of \[\] has no limit in it"),
        ([[3]], r"got \[3\]"),
        ("layers:0", "'layers:0' must name 1 to 2 layers"),
        ("layers:3", "'layers:3' must name 1 to 2 layers"),
        ("layers:1.5", "must name 1 to 2 layers"),
        ("layers:", "must name 1 to 2 layers"),
        ("time:0", r"'time:0' must be a share in \(0, 1\] of an all-linear LoRA step"),
        ("time:1.2", r"'time:1.2' must be a share"),
        ("memory:-0.5", r"'memory:-0.5' must be a share"),
        ("memory:nan", r"'memory:nan' must be a share"),
        ("time:fast", r"'time:fast' must be a share"),
        ("speed:0.5", "there is no budget of 'speed', got 'speed:0.5'; pass a number of modules"),
    ],
)
def test_refused(written, message):
    sizes = {f"x.{layer}.{name}": size for layer, (name, size) in zip((0, 1, 1), SIZES.items(), strict=True)}
    with pytest.raises(BudgetError, match=message):
        parse_budget(written, sizes)


def test_no_candidates():
    with pytest.raises(BudgetError, match="there are no candidate modules"):
        parse_budget(1, {})


@given(st.permutations(list(SIZES)), st.integers(100, 1000))
def test_fill_keeps_the_order_fits_and_leaves_no_room(order, parameters):
    chosen = fill(order, Budget(None, parameters), SIZES)
    used = sum(SIZES[name] for name in chosen)
    assert used <= parameters
    assert list(chosen) == [name for name in order if name in chosen]
    assert all(used + SIZES[name] > parameters for name in order if name not in chosen)


def test_fill_counts_modules():
    assert fill("cab", Budget(2, None), SIZES) == ("c", "a")


def test_several_hold_together_and_the_lower_of_two_of_a_kind():
    budget = parse_budget([0.5, "300", 2], SIZES)
    assert budget.limits == {"modules": 2, "parameters": 300}
    assert not budget.simple and parse_budget(2, SIZES).simple
    assert budget.allows({"a": 8, "b": 8}) and not budget.allows({"c": 8})
    assert not budget.allows({"a": 1, "b": 1, "c": 1})  # three modules, though few parameters
    assert budget.allows({"a": 1, "b": 0, "c": 2})  # rank 0 is no adapter; 100/8 + 700/4 parameters
    assert budget.spent({"a": 8, "b": 4}) == {"modules": 1.0, "parameters": 200 / 300}


def test_layers_are_counted_once():
    sizes = {"x.0.a": 1, "x.0.b": 1, "x.1.a": 1, "x.2.a": 1, "pooler": 1}
    budget = parse_budget("layers:2", sizes)
    assert budget.allows({"x.0.a": 8, "x.0.b": 8, "x.2.a": 8, "pooler": 8})
    assert not budget.allows({"x.0.a": 8, "x.1.a": 8, "x.2.a": 8})
    assert fill(["x.1.a", "x.0.b", "x.2.a", "x.0.a"], budget, sizes) == ("x.1.a", "x.0.b", "x.0.a")


def test_shares_are_of_the_all_linear_step_at_the_rank():
    cost, names = COST, [module.name for module in COST.modules]
    sizes = {module.name: module.parameters(4) for module in cost.modules}
    budget = parse_budget(["time:0.7", "memory:0.9"], sizes, rank=4, cost=cost)
    upper = {name: 4 for name in names if ".3." in name}
    assert budget.spent(upper) == {
        "time": cost.time_share(upper, 4) / 0.7,
        "memory": cost.memory_share(upper, 4) / 0.9,
    }
    assert budget.allows(upper) and not budget.allows(cost.all_linear(4)) and not budget.allows({names[0]: 1})


def test_a_share_that_no_module_fits_is_refused_with_the_least():
    sizes = {module.name: module.parameters(8) for module in COST.modules}
    least = COST.time_share({"model.layers.3.mlp.down_proj": 8}, 8)
    message = rf"fits no module: model.layers.3.mlp.down_proj alone takes {least:.2f} of the time"
    with pytest.raises(BudgetError, match=message):
        parse_budget("time:0.2", sizes, cost=COST)
    share = (COST.time_share({"model.layers.3.mlp.down_proj": 1}, 8) + least) / 2
    with pytest.raises(BudgetError, match="fits no module"):
        parse_budget(f"time:{share}", sizes, cost=COST)
    assert parse_budget(f"time:{share}", sizes, cost=COST, lowest_rank=1).time == share


@given(st.dictionaries(st.integers(0, 27), st.integers(0, 8)), st.integers(0, 27), st.integers(1, 8))
def test_what_is_allowed_stays_so_with_less(ranks, place, more):
    sizes = {module.name: module.parameters(8) for module in COST.modules}
    budget = parse_budget([12, 0.4, "layers:2", "time:0.8", "memory:0.8"], sizes, cost=COST)
    names = list(sizes)
    less = {names[i]: rank for i, rank in ranks.items()}
    if budget.allows({**less, names[place]: less.get(names[place], 0) + more}):
        assert budget.allows(less)


def test_in_words():
    several = Budget(modules=3, layers=1, time=0.6)
    assert str(several) == "3 modules, 1 layer, 60% of the time of an all-linear step"

    assert (str(Budget(1, None)), str(Budget(2, None)), str(Budget(None, 1500))) == (
        "1 module",
        "2 modules",
        "1,500 parameters",
    )
