# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_linear.errors import BudgetError
from peft_linear.recommendation.budget import Budget, fill, parse_budget


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
        ([3], r"got \[3\]"),
    ],
)
def test_refused(written, message):
    with pytest.raises(BudgetError, match=message):
        parse_budget(written, SIZES)


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


def test_in_words():
    assert (str(Budget(1, None)), str(Budget(2, None)), str(Budget(None, 1500))) == (
        "1 module",
        "2 modules",
        "1,500 parameters",
    )
