# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear.selection.search.knapsack import best_set


items = st.lists(st.tuples(st.integers(0, 40).map(lambda x: x / 8), st.integers(1, 9)), min_size=1, max_size=8)


@given(items, st.integers(1, 40), st.sampled_from([1, 7, 3072]))
@settings(max_examples=200, deadline=None)
def test_it_is_the_best_of_all_sets_and_full(items, room, unit):
    gains = {f"m{i}": gain for i, (gain, _) in enumerate(items)}
    sizes = {f"m{i}": size * unit for i, (_, size) in enumerate(items)}
    room = room * unit + unit // 2
    best = max(
        sum(gains[name] for name in names)
        for count in range(len(items) + 1)
        for names in itertools.combinations(gains, count)
        if sum(sizes[name] for name in names) <= room
    )
    chosen = best_set(gains, sizes, room)
    used = sum(sizes[name] for name in chosen)
    assert used <= room
    assert sum(gains[name] for name in chosen) == best  # eighths add exactly
    assert list(chosen) == [name for name in gains if name in chosen]
    assert all(used + sizes[name] > room for name in gains if name not in chosen)


def test_the_best_in_proportion_is_not_the_best():
    gains = {"dense": 10.0, "a": 9.0, "b": 9.0}
    sizes = {"dense": 6, "a": 5, "b": 5}
    assert best_set(gains, sizes, 10) == ("a", "b")
    assert best_set(gains, sizes, 9) == ("dense",)
    assert best_set({"harm": -1.0, "good": 1.0}, {"harm": 1, "good": 1}, 5) == ("harm", "good"), "the room is used"
