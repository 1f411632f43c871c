# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Arms: every rule spends the same adapter parameters, on the modules that its name says."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from examples.benchmarks.language import arms
from peft_linear.errors import PeftLinearError


@pytest.fixture(scope="module")
def shape():
    """SmolLM2-135M's shapes without its weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=128,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("budget", ["1/16", "1/8", "1/2"])
@pytest.mark.parametrize("name", sorted(arms.ARMS))
def test_every_arm_spends_the_budget_within_two_percent(shape, name, budget):
    request = arms.ArmRequest(shape, arms.budget_parameters(shape, budget))
    ranks = arms.choose_ranks(name, request)
    assert 0.98 * request.parameters <= arms.adapter_parameters(shape, ranks) <= request.parameters
    assert all(rank >= 1 for rank in ranks.values())
    assert not any("lm_head" in module or "embed" in module for module in ranks)


def test_the_eighth_is_all_linear_at_rank_one(shape):
    assert arms.budget_parameters(shape, "1/8") == 305_280  # 30 layers of 10,176
    ranks = arms.choose_ranks("all_linear", arms.ArmRequest(shape, 305_280))
    assert len(ranks) == 210
    assert set(ranks.values()) == {1}


def test_below_rank_one_half_of_the_layers_are_adapted(shape):
    ranks = arms.choose_ranks("all_linear", arms.ArmRequest(shape, 152_640))
    layers = sorted({int(name.split(".")[2]) for name in ranks})
    assert layers == list(range(1, 30, 2))
    assert set(ranks.values()) == {1}


@pytest.mark.parametrize(
    ("name", "kinds", "layers"),
    [
        ("qv", {"q_proj", "v_proj"}, range(30)),
        ("o_down", {"o_proj", "down_proj"}, range(30)),
        ("down_proj", {"down_proj"}, range(30)),
        ("last_layers", {*arms.ATTENTION, *arms.MLP}, range(20, 30)),
        ("middle_layers", {*arms.ATTENTION, *arms.MLP}, range(10, 20)),
    ],
)
def test_an_arm_adapts_what_its_name_says(shape, name, kinds, layers):
    ranks = arms.choose_ranks(name, arms.ArmRequest(shape, 305_280))
    assert {module.rsplit(".", 1)[1] for module in ranks} == kinds
    assert {int(module.split(".")[2]) for module in ranks} == set(layers)
    assert max(ranks.values()) - min(ranks.values()) <= 1


def test_random_arms_are_rank_eight_and_differ(shape):
    draws = [arms.choose_ranks(f"random_{draw}", arms.ArmRequest(shape, 305_280)) for draw in range(3)]
    assert all(sorted(ranks.values())[3:] == [8] * (len(ranks) - 3) for ranks in draws)
    assert len({tuple(sorted(ranks)) for ranks in draws}) == 3
    assert draws[0] == arms.choose_ranks("random_0", arms.ArmRequest(shape, 305_280))


def test_an_arm_that_spends_too_little_is_refused(shape, monkeypatch):
    monkeypatch.setitem(arms.ARMS, "one_module", lambda request: {"model.layers.0.self_attn.q_proj": 1})
    with pytest.raises(PeftLinearError, match="'one_module' spends 1,152 adapter parameters of 305,280"):
        arms.choose_ranks("one_module", arms.ArmRequest(shape, 305_280))
    with pytest.raises(PeftLinearError, match="no arm 'two_modules'"):
        arms.choose_ranks("two_modules", arms.ArmRequest(shape, 305_280))


def test_a_budget_below_one_layer_is_refused(shape):
    with pytest.raises(PeftLinearError, match="below one layer at rank 1"):
        arms.choose_ranks("all_linear", arms.ArmRequest(shape, 5_000))


def test_a_selector_registers_like_any_arm(shape, monkeypatch):
    def by_batches(request):
        assert request.batches() == ["a batch"]
        return arms.take_in_order(arms.candidates(request.model), request.parameters)

    monkeypatch.setattr(arms, "ARMS", dict(arms.ARMS))
    arms.register("by_batches")(by_batches)
    ranks = arms.choose_ranks("by_batches", arms.ArmRequest(shape, 305_280, lambda: ["a batch"]))
    assert next(iter(ranks)) == "model.layers.0.self_attn.q_proj"
