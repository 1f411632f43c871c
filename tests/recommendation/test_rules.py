# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Rules: what they say is what was chosen, by peft's own matching and in real models; and they are the simplest."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_linear.errors import PeftLinearError
from peft_linear.recommendation.names import parse_name
from peft_linear.recommendation.rules import FORMS, find_rule
from peft_linear.recommendation.simplify import simplify
from tests.helpers.pages import MODELS
from tests.helpers.small_models import bert, gpt2, llama, t5


LLAMA = [
    f"model.layers.{i}.{kind}_proj"
    for i in range(30)
    for kind in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]
BERT = [
    *(
        f"bert.encoder.layer.{i}.{kind}"
        for i in range(4)
        for kind in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    ),
    "bert.pooler.dense",
]
T5 = MODELS["t5"]
NESTED = ["proj", "inner.proj", "layer.1.proj", "layer.10.proj", "fc", "0.fc", "1.fc", "blocks.0.fc", "blocks.1.fc"]
SETS = {"llama": LLAMA[:35], "bert": BERT, "t5": T5, "gpt2": MODELS["gpt2"], "nested": NESTED}
SETS |= {name: MODELS[name] for name in ("vit", "experts", "unnumbered")}
MAKERS = {"llama": lambda: llama(causal=True), "gpt2": lambda: gpt2(causal=True), "bert": bert, "t5": t5}


def by_peft(rule, names):
    """{name: rank} of what peft's own functions match, with the fields of the rule."""
    config = LoraConfig(r=rule.rank, lora_alpha=16, **rule.config_fields())
    if rule.kind == "all-linear":
        config.target_modules = set(names)  # as peft does for the linear modules of a model
    adapted = [name for name in names if check_target_module_exists(config, name)]
    keys = [get_pattern_key(config.rank_pattern.keys(), name) for name in adapted]
    return {name: config.rank_pattern.get(key, config.r) for name, key in zip(adapted, keys, strict=True)}


def of(names, keep, rank=8):
    return {name: rank for name in names if keep(parse_name(name))}


@st.composite
def choices(draw):
    """(names, choice, others): names at random, or types in some layers, with ranks by name, by type or one."""
    names = SETS[draw(st.sampled_from(sorted(SETS)))]
    kinds = sorted({parse_name(name).kind for name in names})
    layers = sorted({parse_name(name).layer for name in names}, key=str)
    if draw(st.booleans()):
        chosen = draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    else:
        some = set(draw(st.lists(st.sampled_from(kinds), min_size=1)))
        where = draw(st.just(set(layers)) | st.sets(st.sampled_from(layers), min_size=1))
        flipped = draw(st.sets(st.sampled_from(names), max_size=2))
        chosen = [n for n in names if (parse_name(n).kind in some and parse_name(n).layer in where) ^ (n in flipped)]
    ranks = st.sampled_from((1, 2, 8))
    of_kind = {kind: draw(ranks) for kind in kinds}
    how = draw(st.sampled_from(("one", "kind", "name")))
    one = draw(ranks)
    choice = {
        n: one if how == "one" else of_kind[parse_name(n).kind] if how == "kind" else draw(ranks) for n in chosen
    }
    hidden = set(draw(st.lists(st.sampled_from(names), max_size=3))) - set(choice)
    return [n for n in names if n not in hidden], choice, sorted(hidden)


@example((NESTED, {n: 1 if n in ("proj", "layer.1.proj", "layer.10.proj", "0.fc") else 2 for n in NESTED}, []), False)
@given(choices(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_rule_expands_to_the_choice_and_peft_agrees(problem, all_linear):
    candidates, choice, others = problem
    if not choice:
        with pytest.raises(PeftLinearError, match="adapts no module"):
            find_rule(choice, candidates, others)
        return
    rule = find_rule(choice, candidates, others, all_linear=all_linear and not others)
    assert rule.expand([*candidates, *others]) == by_peft(rule, [*candidates, *others]) == choice
    assert rule.text and rule.kind in FORMS
    assert rule == find_rule(dict(reversed(choice.items())), candidates, others, all_linear=all_linear and not others)


@given(choices())
@settings(max_examples=100, deadline=None)
def test_simpler_rules_are_allowed_sorted_and_hold_the_choice(problem):
    candidates, choice, others = problem
    if not choice:
        return
    budget = 2 * sum(choice.values())
    rules = simplify(choice, candidates, lambda ranks: sum(ranks.values()) <= budget, others=others)
    expanded = [rule.expand([*candidates, *others]) for rule in rules]
    assert choice in expanded
    assert all(sum(ranks.values()) <= budget for ranks in expanded)
    assert [rule.complexity for rule in rules] == sorted(rule.complexity for rule in rules)
    assert len({tuple(ranks.items()) for ranks in expanded}) == len(rules)


@pytest.mark.parametrize(
    ("candidates", "choice", "kind", "targets", "text"),
    [
        (LLAMA, of(LLAMA, lambda n: True, 1), "all-linear", "all-linear", "all 210 linear modules at rank 1"),
        (
            LLAMA,
            of(LLAMA, lambda n: n.is_mlp, 2),
            "types",
            ("gate_proj", "up_proj", "down_proj"),
            "gate_proj, up_proj and down_proj of all 30 layers at rank 2",
        ),
        (
            LLAMA,
            of(LLAMA, lambda n: n.is_query_or_value and n.layer < 4),
            "layers",
            ("q_proj", "v_proj"),
            "q_proj and v_proj of layers 0–3 at rank 8",
        ),
        (
            LLAMA,
            of(LLAMA, lambda n: n.kind.endswith("up_proj") and n.layer in (1, 2, 7)),
            "layers",
            ("up_proj",),
            "up_proj of layers 1–2 and 7 at rank 8",
        ),
        (
            LLAMA,
            of(LLAMA, lambda n: n.is_mlp) | {LLAMA[0]: 8},
            "types and names",
            ("gate_proj", "up_proj", "down_proj", LLAMA[0]),
            "q_proj of layer 0; gate_proj, up_proj and down_proj of all 30 layers, all at rank 8",
        ),
        (
            LLAMA,
            of(LLAMA, lambda n: n.kind in ("mlp.gate_proj", "mlp.up_proj") and n.full != LLAMA[4]),
            "types with exclusions",
            ("gate_proj", "up_proj"),
            "up_proj of all 30 layers; gate_proj of layers 1–29, all at rank 8",
        ),
        (
            BERT,
            of(BERT, lambda n: n.kind == "output.dense"),
            "pattern",
            r"bert\.encoder\.layer\.\d+\.output\.dense",
            "output.dense of all 4 layers at rank 8",
        ),
        (
            T5,
            of(T5, lambda n: n.stack.startswith("encoder")),
            "layers",
            ("q", "v", "wi"),
            "SelfAttention.q, v and wi of all 2 layers of encoder.block at rank 8",
        ),
        (NESTED, {"proj": 4}, "name pattern", "proj", "proj at rank 4"),
        (LLAMA, dict.fromkeys(LLAMA[::11], 4), "names", tuple(LLAMA[::11]), "20 of 210 modules, by name, at rank 4"),
    ],
)
def test_the_simplest_form_is_taken(candidates, choice, kind, targets, text):
    rule = find_rule(choice, candidates, all_linear=True)
    assert (rule.kind, rule.target_modules, str(rule)) == (kind, targets, text)
    assert by_peft(rule, candidates) == choice


def test_ranks_by_type_are_a_pattern_of_types():
    choice = of(LLAMA, lambda n: n.is_mlp, 2) | of(LLAMA, lambda n: n.kind.endswith("down_proj"), 4)
    rule = find_rule(choice, LLAMA)
    assert (rule.rank, rule.rank_pattern) == (2, {r"down_proj": 4})
    assert str(rule) == "gate_proj and up_proj of all 30 layers at rank 2; down_proj of all 30 layers at rank 4"


def test_ranks_by_layer_are_one_pattern():
    choice = of(LLAMA, lambda n: True, 2) | of(LLAMA, lambda n: n.layer > 19, 4)
    rule = find_rule(choice, LLAMA)
    assert rule.kind == "types" and rule.rank == 2 and len(rule.rank_pattern) == 1
    assert str(rule) == "all types of layers 0–19 at rank 2; all types of layers 20–29 at rank 4"


def test_a_module_that_is_no_candidate_forbids_the_ending():
    choice = of(LLAMA, lambda n: n.kind.endswith("q_proj"))
    assert find_rule(choice, LLAMA).target_modules == ("q_proj",)
    rule = find_rule(choice, LLAMA, ["vision.layers.0.self_attn.q_proj"])
    assert rule.kind == "layers" and rule.layers_pattern == ("model.layers",)
    assert not rule.expand(["vision.layers.0.self_attn.q_proj"])


def test_forms_can_be_left_out_and_nothing_may_fit():
    choice = of(LLAMA, lambda n: n.is_mlp)
    assert find_rule(choice, LLAMA, forms=("names",)).target_modules == tuple(choice)
    assert find_rule({"proj": 1}, NESTED, forms=("types", "layers", "names")) is None


@given(choices())
@settings(max_examples=100, deadline=None)
def test_names_with_exclusions_always_fit(problem):
    candidates, choice, others = problem
    if choice:
        rule = find_rule(choice, candidates, others, forms=("names", "names with exclusions"))
        assert by_peft(rule, [*candidates, *others]) == choice


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "adapts no module"),
        ({LLAMA[0]: 0}, "adapts no module"),
        ({LLAMA[0]: -1}, "ranks must be integers"),
        ({LLAMA[0]: 1.5}, "ranks must be integers"),
        ({"model.nowhere": 1}, "no candidates: model.nowhere"),
    ],
)
def test_a_choice_that_is_none_is_refused(choice, message):
    with pytest.raises(PeftLinearError, match=message):
        find_rule(choice, LLAMA)


def test_types_that_are_chosen_in_most_layers_are_completed():
    choice = of(LLAMA, lambda n: n.is_mlp and n.layer > 4, 4)
    rules = simplify(choice, LLAMA, lambda ranks: sum(ranks.values()) <= 400, all_linear=True)
    words = [str(rule) for rule in rules]
    assert words[:2] == [
        "all 210 linear modules at rank 1",
        "gate_proj, up_proj and down_proj of all 30 layers at rank 4",
    ]
    assert "gate_proj, up_proj and down_proj of layers 5–29 at rank 4" in words


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("how", ["all", "types", "types with ranks", "a layer", "one name", "scattered"])
def test_peft_puts_adapters_on_exactly_the_choice(name, how):
    model = MAKERS[name]()
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    heads = ("lm_head", "score", "classifier", "classification_head.dense", "classification_head.out_proj")
    candidates = [n for n in linear if n not in heads]
    others = [n for n in linear if n in heads]
    first = parse_name(candidates[0]).kind
    last = parse_name(candidates[-1]).kind
    choice = {
        "all": lambda: dict.fromkeys(candidates, 2),
        "types": lambda: of(candidates, lambda n: n.kind in (first, last), 2),
        "types with ranks": lambda: {
            n: 1 if parse_name(n).kind == first else 3 for n in candidates if parse_name(n).kind in (first, last)
        },
        "a layer": lambda: of(candidates, lambda n: n.layer == 1, 2),
        "one name": lambda: {candidates[1]: 2},
        "scattered": lambda: {n: 1 + i % 3 for i, n in enumerate(candidates) if i % 3 != 1},
    }[how]()
    rule = find_rule(choice, candidates, others)
    adapted = get_peft_model(model, LoraConfig(r=rule.rank, lora_alpha=16, **rule.config_fields())).get_base_model()
    found = {n: m for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    assert {n: layer.r["default"] for n, layer in found.items()} == choice
    assert all(layer.scaling["default"] == 16 / choice[n] for n, layer in found.items())
