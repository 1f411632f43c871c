# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks by effective dimension: the laws of the distribution, the dimensions, how peft reads the config."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_linear.errors import BudgetError, PeftLinearError
from peft_linear.recommendation.ranks import (
    coverage,
    distribute_ranks,
    effective_dimensions,
    parse_rank_budget,
    rank_patterns,
)
from peft_linear.selection import Recommendation, recommend
from peft_linear.selection.request import recommend_modules
from peft_linear.tuners.proximal_lora import export_lora
from tests.helpers.planted import planted_kernels
from tests.helpers.small_models import bert, seeded, text_batches


SIZES = st.integers(1, 24)
DIMENSIONS = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))


@st.composite
def problems(draw, shapes=None):
    """(dimensions, shapes, a budget that can be spent)."""
    count = draw(st.integers(1, 6))
    names = [f"m{i}" for i in range(count)]
    shape = shapes or {name: (draw(SIZES), draw(SIZES)) for name in names}
    shape = {name: shape[name] for name in names}
    least = sum(sum(s) for s in shape.values())
    most = sum(sum(s) * min(s) for s in shape.values())
    return {name: draw(DIMENSIONS) for name in names}, shape, draw(st.integers(least, most))


def cost(ranks, shapes):
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def smallest_coverage(ranks, dimensions, shapes):
    """Over the modules below full rank."""
    below = [name for name, rank in ranks.items() if rank < min(shapes[name])]
    return min((coverage(ranks[name], dimensions[name]) for name in below), default=math.inf)


@given(problems())
def test_the_budget_is_kept_and_no_further_rank_fits(problem):
    dimensions, shapes, budget = problem
    ranks = distribute_ranks(dimensions, shapes, budget)
    assert list(ranks) == list(dimensions)
    assert all(isinstance(r, int) and 1 <= r <= min(shapes[name]) for name, r in ranks.items())
    spent = cost(ranks, shapes)
    assert spent <= budget
    for name, rank in ranks.items():
        assert rank == min(shapes[name]) or spent + sum(shapes[name]) > budget


@given(problems(), st.data())
def test_of_one_shape_more_dimension_is_no_less_rank_and_equal_modules_are_within_one(problem, data):
    dimensions, shapes, budget = problem
    shape = data.draw(st.sampled_from(sorted(shapes.values())))
    shapes = dict.fromkeys(shapes, shape)
    assume(sum(map(sum, shapes.values())) <= budget <= sum(sum(s) * min(s) for s in shapes.values()))
    dimensions["m0"] = dimensions[data.draw(st.sampled_from(sorted(dimensions)))]
    ranks = distribute_ranks(dimensions, shapes, budget)
    for a, b in itertools.permutations(ranks, 2):
        if dimensions[a] > dimensions[b]:
            assert ranks[a] >= ranks[b]
        if dimensions[a] == dimensions[b]:
            assert abs(ranks[a] - ranks[b]) <= 1


@given(problems(), st.integers(-30, 30))
def test_a_common_factor_changes_nothing(problem, exponent):
    dimensions, shapes, budget = problem
    scaled = {name: value * 2.0**exponent for name, value in dimensions.items()}
    assert distribute_ranks(scaled, shapes, budget) == distribute_ranks(dimensions, shapes, budget)


@given(problems())
def test_all_that_can_be_spent_is_full_rank(problem):
    dimensions, shapes, _ = problem
    everything = sum(sum(shape) * min(shape) for shape in shapes.values())
    assert distribute_ranks(dimensions, shapes, everything) == {name: min(shape) for name, shape in shapes.items()}


@settings(max_examples=100)
@given(problems())
def test_no_ranks_within_the_budget_have_a_larger_smallest_coverage(problem):
    dimensions, shapes, budget = problem
    assume(math.prod(min(s) for s in shapes.values()) <= 3000)
    every = itertools.product(*(range(1, min(s) + 1) for s in shapes.values()))
    others = (dict(zip(shapes, ranks, strict=True)) for ranks in every)
    best = max(smallest_coverage(o, dimensions, shapes) for o in others if cost(o, shapes) <= budget)
    assert smallest_coverage(distribute_ranks(dimensions, shapes, budget), dimensions, shapes) == best


@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=5), st.data())
def test_with_much_to_share_ranks_are_as_the_square_roots_of_the_effective_dimensions(values, data):
    shapes = {f"m{i}": (data.draw(st.integers(20_000, 40_000)), 20_000) for i in range(len(values))}
    dimensions = {f"m{i}": value for i, value in enumerate(values)}
    ranks = distribute_ranks(dimensions, shapes, 1000 * sum(map(sum, shapes.values())))
    ratios = [(rank + 0.5) / math.sqrt(dimensions[name]) for name, rank in ranks.items()]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.03)


def test_equal_modules_at_the_uniform_budget_have_the_uniform_rank():
    shapes = dict.fromkeys("abc", (16, 48))
    assert distribute_ranks(dict.fromkeys("abc", 0.3), shapes, 8 * 3 * 64) == dict.fromkeys("abc", 8)
    assert distribute_ranks(dict.fromkeys("abc", 0.0), shapes, 8 * 3 * 64) == dict.fromkeys("abc", 8)


@pytest.mark.parametrize(
    ("dimensions", "parameters", "error", "message"),
    [
        ({"a": 1.0, "b": 1.0}, 79, BudgetError, "79 parameters are too few for 2 modules: rank 1 takes 80"),
        ({"a": 1.0}, 641, BudgetError, "641 parameters are more than 1 modules can hold: full rank takes 640"),
        ({"a": math.nan}, 100, PeftLinearError, "effective dimensions must be finite numbers ≥ 0, got {'a': nan}"),
        ({"a": -1.0}, 100, PeftLinearError, "effective dimensions must be finite"),
    ],
)
def test_what_cannot_be_distributed(dimensions, parameters, error, message):
    with pytest.raises(error, match=message):
        distribute_ranks(dimensions, dict.fromkeys("ab", (16, 24)), parameters)


@pytest.mark.parametrize(
    ("written", "meant"), [(None, 500), ("1.2k", 1200), ("0.5M", 500_000), (0.3, 600), (1.0, 2000)]
)
def test_budgets_of_parameters(written, meant):
    assert parse_rank_budget(written, uniform=500, everything=2000) == meant


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (8, r'is a number of parameters, got 8; pass adapter parameters \("1.5M"'),
        (True, "is a number of parameters, got True"),
        (0.0, r"a fraction must be in \(0, 1\], got 0.0"),
        (math.nan, "got nan"),
        ("much", "cannot read the budget 'much'; pass adapter parameters"),
    ],
)
def test_budgets_that_are_none(written, message):
    with pytest.raises(BudgetError, match=message):
        parse_rank_budget(written, uniform=500, everything=2000)


# -- effective dimensions


@pytest.fixture(scope="module")
def kernels():
    return planted_kernels()


def test_shares_add_up_to_the_effective_dimension_of_the_choice(kernels):
    names = kernels.names[:5]
    shares = effective_dimensions(kernels, names, ridge=3.0)
    assert tuple(shares) == names
    inverse = torch.linalg.inv(kernels.subset(names) + 3.0 * torch.eye(len(kernels.base), dtype=torch.float64))
    for name, share in shares.items():
        assert share == pytest.approx(float(torch.trace(kernels[name] @ inverse)), rel=1e-9)
        assert share <= kernels.spectrum([name]).effective_dimension(3.0)
    head = float(torch.trace(kernels.base @ inverse))
    assert sum(shares.values()) + head == pytest.approx(kernels.spectrum(names).effective_dimension(3.0), rel=1e-9)


def test_twins_share_what_one_of_them_has(kernels):
    one, other, third = kernels.names[:3]
    twins = replace(kernels, blocks={**kernels.blocks, other: kernels[one]})
    halves = replace(kernels, blocks={**kernels.blocks, one: 2 * kernels[one]})
    shares = effective_dimensions(twins, [one, other, third], ridge=1.0)
    whole = effective_dimensions(halves, [one, third], ridge=1.0)
    assert shares[one] == shares[other] == pytest.approx(whole[one] / 2, rel=1e-9)


def test_coverage_counts_the_free_parameters_of_a_symmetric_matrix():
    assert coverage(3, 6.0) == 1.0 and coverage(1, 0.5) == 2.0 and coverage(1, 0.0) == math.inf
    assert coverage(4, 5.0) == len(torch.triu_indices(4, 4).T) / 5.0


# -- the recommendation and its config


BATCHES = text_batches(sizes=(4, 4, 4))


@pytest.fixture(scope="module")
def rec():
    model = seeded(bert, dtype=torch.float32)
    return recommend_modules(model, BATCHES, 6, "gradient_energy", rank=4, lora_alpha=6, progress=False)


def adapters(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("budget", [None, "2k", 0.5])
def test_peft_makes_exactly_these_ranks_at_one_scaling(rec, budget, use_rslora, tmp_path):
    ranks = rec.adaptive_ranks(budget)
    assert set(ranks) == set(rec.modules) and len(set(ranks.values())) > 1, "nothing was distributed"
    config = rec.to_config(r="adaptive", budget=budget, task_type="SEQ_CLS", use_rslora=use_rslora)
    model = get_peft_model(seeded(bert, dtype=torch.float32), config)
    assert {name: layer.r["default"] for name, layer in adapters(model).items()} == ranks
    scaling = 6 / 2 if use_rslora else 6 / 4
    assert all(layer.scaling["default"] == pytest.approx(scaling, rel=1e-12) for layer in adapters(model).values())
    spent = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    everything = sum(4 * sum(shape) for shape in rec.settings.shapes.values())
    allowed = {None: rec.parameters, "2k": 2000, 0.5: everything // 2}[budget]
    assert allowed - min(map(sum, rec.settings.shapes.values())) < spent <= allowed
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded(bert, dtype=torch.float32), tmp_path)
    assert {name: layer.r["default"] for name, layer in adapters(loaded).items()} == ranks
    assert all(isinstance(alpha, (int, float)) for alpha in config.alpha_pattern.values())


class Nested(nn.Module):
    """Names that end alike and names that begin alike: `proj`, `inner.proj`, `layer.1.proj`, `layer.10.proj`."""

    def __init__(self, depth=1):
        super().__init__()
        self.proj = nn.Linear(12, 12)
        self.layer = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(12, 12)}) for _ in range(11 * depth)])
        if depth:
            self.inner = Nested(0)


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_names_that_end_or_begin_alike_keep_their_own_ranks(order, tmp_path):
    names = [name for name, module in Nested().named_modules() if isinstance(module, nn.Linear)]
    assert {"proj", "inner.proj", "layer.1.proj", "layer.10.proj"} <= set(names)
    wanted = {name: 1 + place % 12 for place, name in enumerate(names)}
    if order == "backwards":
        wanted = dict(reversed(wanted.items()))
    rec = recommend(planted_kernels(names=names, informative=(0,)), len(names), "gradient_energy")
    config = rec.to_config()
    config.rank_pattern, config.alpha_pattern = rank_patterns(wanted, config.r, config.lora_alpha)
    config.save_pretrained(tmp_path)
    model = get_peft_model(Nested(), PeftConfig.from_pretrained(tmp_path))
    assert {name: layer.r["default"] for name, layer in adapters(model).items()} == wanted
    assert {layer.scaling["default"] for layer in adapters(model).values()} == {2.0}


def test_the_basis_is_saved_and_one_without_it_says_what_to_do(rec, tmp_path):
    rec.save(tmp_path)
    assert Recommendation.load(tmp_path) == rec
    assert Recommendation.load(tmp_path).adaptive_ranks("2k") == rec.adaptive_ranks("2k")
    path = tmp_path / "recommendation.json"
    record = json.loads(path.read_text())
    record["format"] = "peft_linear.Recommendation/2"
    del record["sha256"]
    for key in ("effective_dimension", "shapes"):
        del record["settings"][key]
    path.write_text(json.dumps(record))
    earlier = Recommendation.load(tmp_path)
    assert earlier.to_config().r == 4
    with pytest.raises(PeftLinearError, match="holds no effective dimensions.*Recommend again"):
        earlier.to_config(r="adaptive")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": "adaptive", "rank_pattern": {}}, "the recommendation sets rank_pattern"),
        (
            {"r": "adaptive", "alpha_pattern": {}, "target_modules": []},
            "sets alpha_pattern, target_modules",
        ),
        ({"r": "auto"}, "r is a rank, \"adaptive\" or None, got 'auto'"),
        ({"r": 4, "budget": "2k"}, "budget='2k' is distributed by r=\"adaptive\"; got r=4"),
        ({"budget": 0.5}, 'budget=0.5 is distributed by r="adaptive"; got r=None'),
    ],
)
def test_configs_that_contradict_themselves(rec, arguments, message):
    with pytest.raises(PeftLinearError, match=message):
        rec.to_config(**arguments)


def test_adaptive_ranks_are_exported_as_plain_lora(rec, tmp_path):
    config = rec.to_config(r="adaptive", task_type="SEQ_CLS")
    model = get_peft_model(seeded(bert, dtype=torch.float32), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "ours")
    export_lora(tmp_path / "ours", tmp_path / "plain")
    assert PeftConfig.from_pretrained(tmp_path / "plain").peft_type == "LORA"
    plain = PeftModel.from_pretrained(seeded(bert, dtype=torch.float32), tmp_path / "plain").eval()
    inputs = {key: value for key, value in BATCHES[0].items() if key != "labels"}
    torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits)
