# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Laws of the cost of a step: it grows with the set and the ranks, and with the depth of the backward pass."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_linear.errors import BudgetError, TargetError
from peft_linear.recommendation.cost import RECORD, StepCost
from tests.helpers.step_costs import COST


def llama_cost(checkpointing=False):
    return COST.with_checkpointing(checkpointing)


RANKS = st.dictionaries(st.integers(0, 27), st.integers(0, 16), max_size=28)


def named(cost, ranks):
    return {cost.modules[place].name: rank for place, rank in ranks.items()}


@given(RANKS, st.integers(0, 27), st.integers(1, 8), st.booleans())
def test_more_modules_and_higher_ranks_never_take_less(ranks, place, more, checkpointing):
    cost = llama_cost(checkpointing)
    larger = {**ranks, place: ranks.get(place, 0) + more}
    assert cost.time(named(cost, larger)) > cost.time(named(cost, ranks))
    assert cost.memory(named(cost, larger)) > cost.memory(named(cost, ranks))


@given(RANKS)
def test_time_is_the_time_of_the_work_and_rank_0_is_no_adapter(ranks):
    cost = llama_cost()
    assert cost.time(named(cost, ranks)) == pytest.approx(cost.machine.time(cost.work(named(cost, ranks))), rel=1e-12)
    positive = {place: rank for place, rank in ranks.items() if rank}
    assert cost.time(named(cost, ranks)) == cost.time(named(cost, positive))


@given(RANKS)
def test_checkpointing_takes_time_for_memory(ranks):
    plain, again = llama_cost(), llama_cost(True)
    ranks = named(plain, {**ranks, 0: 1})
    assert again.time(ranks) > plain.time(ranks)
    assert again.memory(ranks) < plain.memory(ranks)


def test_the_lowest_layer_decides_how_far_the_backward_pass_goes():
    cost = llama_cost()
    times = [cost.time({f"model.layers.{layer}.mlp.down_proj": 8}) for layer in range(4)]
    memories = [cost.memory({f"model.layers.{layer}.mlp.down_proj": 8}) for layer in range(4)]
    assert times == sorted(times, reverse=True) and len(set(times)) == 4
    assert memories == sorted(memories, reverse=True) and len(set(memories)) == 4
    steps = [one - other for one, other in pairwise(times)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)  # all layers are alike
    assert cost.time_share(cost.all_linear(8), 8) == 1 == cost.memory_share(cost.all_linear(8), 8)


def test_inputs_that_modules_share_are_kept_once():
    cost = llama_cost()

    def kept(*leaves):
        return cost.activations({f"model.layers.3.self_attn.{leaf}": 1 for leaf in leaves})

    shared = 4 * 4 * 64 * 512
    assert kept("q_proj", "k_proj") - kept("q_proj") < shared / 2 < shared < kept("q_proj")


def test_what_has_no_counts_is_refused():
    with pytest.raises(TargetError, match="there are no counts of a training step for 'lm_head'; compute the kernels"):
        llama_cost().time({"lm_head": 1})
    with pytest.raises(BudgetError, match="which these kernels do not have: they were computed by an earlier version"):
        StepCost.of_kernels({})
    with pytest.raises(BudgetError, match="cannot be kept: why"):
        StepCost.of_kernels({RECORD: {"error": "why"}})
