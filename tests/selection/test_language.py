# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The decision for language models: options, their scores, the rate, and the recommendation that they make."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy

from peft_linear import Recommendation, recommend_modules
from peft_linear.capture.request import KernelRequest
from peft_linear.capture.trial import TokenLosses, Trial
from peft_linear.errors import BudgetError, PeftLinearError
from peft_linear.recommendation.values import OptionScore
from peft_linear.selection.learning_rate import (
    MEASURED_RATIO,
    MEASURED_STEPS,
    TRIAL_STEPS,
    find_learning_rate,
    horizon,
)
from peft_linear.selection.one_step import LineSearch, decide, first_order, score_options, vertex
from peft_linear.selection.options import ALL_LINEAR, LARGEST, Option, make_options
from peft_linear.selection.training import Training
from tests.helpers import small_models as small


TYPES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
NAMES = [f"model.layers.{n}.{part}.{kind}" for n in range(6) for part, kinds in TYPES.items() for kind in kinds]


GAINS = {name: float(place) for place, name in enumerate(NAMES)}


def learnable_batches(count: int = 8, examples: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Texts that repeat four tokens, so that what one half of them teaches helps in the other."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 5, (examples, 10), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return batches


@pytest.fixture(scope="module")
def llama():
    return small.seeded(small.llama, True, dtype=torch.float32, num_hidden_layers=4)


@pytest.fixture(scope="module")
def recommendation(llama):
    return recommend_modules(llama, learnable_batches(), 0.25, training=Training(steps=60, batch_size=4))


# ---- options ----


def total(limit):
    return lambda ranks: sum(ranks.values()) <= limit


def test_options_have_the_highest_uniform_rank_that_fits():
    options = {option.label: option.ranks for option in make_options(NAMES, total(84), range(1, 33), GAINS)}
    assert list(options) == [ALL_LINEAR, "MLP", "attention", "last of attention and MLP"]
    assert options[ALL_LINEAR] == dict.fromkeys(NAMES, 2)
    assert set(options["MLP"].values()) == {84 // 18}
    assert set(options["attention"].values()) == {84 // 24}
    writers = options["last of attention and MLP"]
    assert set(writers.values()) == {84 // 12}
    assert {name.rpartition(".")[2] for name in writers} == {"o_proj", "down_proj"}


def test_only_allowed_ranks_are_taken():
    options = {option.label: option.ranks for option in make_options(NAMES, total(84), (1, 4), GAINS)}
    assert [set(ranks.values()) for ranks in options.values()] == [{1}, {4}, {1}, {4}]


def test_below_rank_one_everywhere_layers_are_evenly_spaced():
    option = make_options(NAMES, total(21), range(1, 5), GAINS)[0]
    assert option.label == ALL_LINEAR
    assert sorted({int(name.split(".")[2]) for name in option.ranks}) == [1, 3, 5]
    assert set(option.ranks.values()) == {1}
    assert len(option.ranks) == 21


def test_no_room_for_one_layer_is_an_error():
    with pytest.raises(BudgetError, match="no room for one module at rank 2"):
        make_options(NAMES, total(1), (2, 4), GAINS)


def test_below_one_layer_the_modules_with_the_largest_decrease_come_first():
    options = make_options(NAMES, total(5), (1,), GAINS)
    assert options[0] == Option(LARGEST, dict.fromkeys(NAMES[-5:], 1))
    assert {option.label for option in options[1:]} == {"MLP", "attention", "last of attention and MLP"}


def test_a_limit_on_depth_takes_the_last_layers():
    def lowest_is_layer_four(ranks):
        return min(int(name.split(".")[2]) for name in ranks) >= 4

    options = make_options(NAMES, lowest_is_layer_four, (8,), GAINS, upper=True)
    assert options[0] == Option(ALL_LINEAR, {name: 8 for name in NAMES if int(name.split(".")[2]) >= 4})


def test_a_set_is_weighed_once():
    names = [name for name in NAMES if ".mlp." in name]
    assert [option.label for option in make_options(names, total(18), (1,), GAINS)] == [
        ALL_LINEAR,
        "last of attention and MLP",
    ]


# ---- one step ----


def losses(*means: float) -> TokenLosses:
    return TokenLosses(torch.tensor(means, dtype=torch.float64), torch.ones(len(means), dtype=torch.float64))


def test_the_decrease_is_the_largest_of_a_planted_parabola():
    def loss(size):  # two examples whose mean falls by 3·η − 2·η²
        return losses(5 - 2 * size + size**2, 4 - 4 * size + 3 * size**2)

    search = LineSearch(loss(0.0), (0.3, 1.2), (loss(0.3), loss(1.2)))
    both, each = torch.tensor([[0, 1]]), torch.tensor([[0, 0], [1, 1]])
    assert search.best_size == pytest.approx(3 / 4)
    assert float(search.decrease(both)) == pytest.approx(9 / 8)
    assert search.decrease(each).tolist() == pytest.approx([1.0, 4 / 3])


@pytest.mark.parametrize(
    ("found", "decrease", "size"),
    [
        ((4.5, 4.8), 0.5, 0.1),  # a line and worse: the parabola's vertex is used where it lies inside
        ((4.9, 4.7), 0.3, 0.2),  # ever steeper: no vertex, the better of the two
        ((5.5, math.inf), -0.5, 0.1),  # a step that never helps, and one that diverged
    ],
)
def test_without_a_parabola_the_better_size_counts(found, decrease, size):
    search = LineSearch(losses(5.0), (0.1, 0.2), tuple(map(losses, found)))
    value = float(search.decrease(torch.tensor([[0]])))
    assert value >= decrease - 1e-12
    if found != (4.5, 4.8):
        assert (value, search.best_size) == (pytest.approx(decrease), pytest.approx(size))


def test_the_first_order_decrease_is_that_of_the_loss_and_the_same_at_every_rank(llama):
    batches = learnable_batches()
    model = small.seeded(small.llama, True)
    trial = Trial.of(model, KernelRequest().layers(model), batches, 16)
    with trial.running() as run:
        gradients = run.gradients(trial.batches)
        start = run.losses(trial.batches).mean
        for rank in (1, 16):
            ranks = dict.fromkeys(trial.layers, rank)
            a = {name: trial.initial_a(name)[:rank] for name in ranks}
            size = 1e-7
            run.use(a, {name: -size * gradients[name][:, :rank].sign() for name in ranks})
            measured = (start - run.losses(trial.batches).mean) / size
            assert measured == pytest.approx(sum(first_order(gradients, ranks, 16.0).values()), rel=1e-3)
    one, many = (sum(first_order(gradients, dict.fromkeys(trial.layers, r), 16.0).values()) for r in (1, 16))
    assert one == pytest.approx(many, rel=0.35)  # equal in the mean over A


def test_scores_are_of_the_best_size_by_a_fine_search(llama):
    """The slow twin: forward passes at many sizes."""
    trial = Trial.of(llama, KernelRequest().layers(llama), learnable_batches(), 8)
    names = list(trial.layers)
    options = [Option(ALL_LINEAR, dict.fromkeys(names, 1)), Option("MLP", {n: 2 for n in names if ".mlp." in n})]
    costs = {name: sum(layer.shape) for name, layer in trial.layers.items()}
    with trial.running() as run:
        gradients = run.gradients(trial.batches[0::2])
        scores = score_options(run, options, gradients, trial.batches[1::2], run.losses(trial.batches[1::2]), costs)
        for option, score in zip(options, scores, strict=True):
            a = {name: trial.initial_a(name)[:rank] for name, rank in option.ranks.items()}
            found = []
            for size in torch.logspace(-3, 1, 41).tolist():
                run.use(a, {n: -size * gradients[n][:, :rank].sign() for n, rank in option.ranks.items()})
                found.append(run.losses(trial.batches[1::2]).mean)
            run.use({}, {})
            best = run.losses(trial.batches[1::2]).mean - min(found)
            assert score.decrease == pytest.approx(best, rel=0.1)
            assert score.interval[0] < score.decrease < score.interval[1]
            assert score.parameters == sum(costs[name] * rank for name, rank in option.ranks.items())
    assert scores[0].difference == 0
    assert scores[1].difference == pytest.approx(scores[1].decrease - scores[0].decrease)
    assert sum(score.best_share for score in scores) == pytest.approx(1)


def option(decrease: float, low: float) -> OptionScore:
    difference = decrease - 1.0
    return OptionScore("x", {"a": 1}, 4, decrease, (0, 2), difference, (low, 2), 0.5, 0.1)


def test_all_linear_stays_unless_another_is_better_beyond_the_interval():
    first, unsure, sure = option(1.0, 0.0), option(1.2, -0.01), option(1.1, 0.01)
    assert decide([first, unsure]) is first
    assert decide([first, sure]) is sure
    assert decide([first, sure, unsure]) is first  # the best one is unsure, and so is what it would replace
    assert decide([first, replace(sure, decrease=0.9)]) is first


# ---- learning rate ----


def test_vertex():
    assert vertex(1.0, 0.0, 1.0) == 0
    assert vertex(4.0, 1.0, 0.0) == 1  # (x − 1)²
    assert vertex(0.0, 1.0, 4.0) == -1
    assert vertex(1.0, 1.0, 1.0) == 0
    assert vertex(1.0, 0.5, math.inf) == 0


def test_the_horizon_goes_through_what_was_measured():
    assert horizon(TRIAL_STEPS) == 1
    assert horizon(MEASURED_STEPS) == pytest.approx(MEASURED_RATIO)
    assert horizon(1000) < horizon(100) < 1
    assert horizon(1) == 1


def test_the_rate_is_the_best_of_a_sweep_of_the_trial(llama):
    trial = Trial.of(llama, KernelRequest().layers(llama), learnable_batches(), 2)
    ranks = dict.fromkeys(trial.layers, 2)
    learning, held_out = trial.batches[0::2], trial.batches[1::2]
    with trial.running() as run:
        found = [find_learning_rate(run, ranks, learning, held_out, guess, TRIAL_STEPS) for guess in (1e-3, 0.3)]
        sweep = {}
        for rate in torch.logspace(-3, 0.5, 36).tolist():
            run.train(ranks, learning[:TRIAL_STEPS], rate)
            sweep[rate] = run.losses(held_out).mean
    best = min(sweep, key=sweep.get)
    for rate in found:
        assert best / 1.6 < rate.rate < best * 1.6
        assert rate.interval[0] < rate.rate < rate.interval[1]
        assert rate.steps == TRIAL_STEPS * len(rate.tried) <= 28


# ---- the recommendation ----


def test_modules_ranks_and_rate_are_one_recommendation(llama, recommendation):
    rec = recommendation
    assert rec.options[0].label == ALL_LINEAR
    chosen = next(each for each in rec.options if each.chosen)
    assert rec.ranks == {name: chosen.ranks[name] for name in rec.modules}
    assert set(rec.modules) == set(chosen.ranks)
    everything = sum(row.parameters for row in rec.scores)
    assert rec.parameters == chosen.parameters <= 0.25 * everything
    assert rec.learning_rate_interval[0] < rec.learning_rate < rec.learning_rate_interval[1]
    assert rec.predicted == {}
    assert "No final loss is predicted" in " ".join(rec.notes)
    assert recommend_modules(llama, learnable_batches(), 0.25, training=Training(steps=60, batch_size=4)) == rec


def test_the_config_trains_exactly_this(llama, recommendation):
    wrapped = get_peft_model(small.seeded(small.llama, True, num_hidden_layers=4), recommendation.to_config())
    layers = {n: m for n, m in wrapped.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert {name: layer.r["default"] for name, layer in layers.items()} == recommendation.ranks
    assert {name: layer.scaling["default"] for name, layer in layers.items()} == {
        name: 16 / rank for name, rank in recommendation.ranks.items()
    }


def test_it_is_saved_shown_and_taken_to_other_tools(recommendation, tmp_path):
    rec = recommendation
    rec.save(tmp_path)
    assert Recommendation.load(tmp_path) == rec
    for text in (str(rec), rec.to_markdown(), rec.to_markdown(full=True), rec.to_html()):
        assert "all linear" in text
        assert f"{rec.learning_rate:.2g}" in text
    assert "lora_r" in rec.to_yaml("axolotl")
    assert rec.to_training_arguments(tmp_path).learning_rate == rec.learning_rate
    rec.plot(tmp_path / "figure.png")


def test_the_loss_falls_by_training_at_the_rate(llama, recommendation):
    model = get_peft_model(
        small.seeded(small.llama, True, dtype=torch.float32, num_hidden_layers=4),
        recommendation.to_config(proximal_lambda=0),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recommendation.learning_rate)
    batches = learnable_batches(20, seed=1)

    def mean_loss(batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    start = float(mean_loss(batches[-1]))
    for batch in batches[:-1]:
        optimizer.zero_grad()
        mean_loss(batch).backward()
        optimizer.step()
    assert float(mean_loss(batches[-1])) < start - 0.3


def test_a_rate_that_is_given_is_kept_and_not_looked_for(llama):
    rec = recommend_modules(llama, learnable_batches(4), 0.25, training=Training(learning_rate=0.01))
    assert (rec.learning_rate, rec.learning_rate_interval) == (0.01, None)


def test_ranks_and_budgets_of_modules(llama):
    fixed = recommend_modules(llama, learnable_batches(4), 0.5, ranks=(0, 2), training=Training(learning_rate=0.01))
    assert set(fixed.ranks.values()) == {2}
    counted = recommend_modules(llama, learnable_batches(4), 8, rank=4, training=Training(learning_rate=0.01))
    assert len(counted.modules) <= 8
    assert set(counted.ranks.values()) == {4}


def test_a_budget_of_time_and_parameters(llama):
    budget = ["time:0.75", 0.5]
    rec = recommend_modules(llama, learnable_batches(4), budget, training=Training(learning_rate=0.01))
    assert rec.step_time <= 0.75
    assert rec.parameters <= 0.5 * sum(row.parameters for row in rec.scores)
    assert min(int(name.split(".")[2]) for name in rec.modules) > 0
    assert rec.budget == ("time:0.75", 0.5)
    whole = recommend_modules(llama, learnable_batches(4), 1.0, training=Training(learning_rate=0.01))
    assert whole.step_time == pytest.approx(1) and whole.step_memory == pytest.approx(1)


def test_excluded_modules_are_scored_and_in_no_option(llama):
    plan = Training(learning_rate=0.01)
    rec = recommend_modules(llama, learnable_batches(4), 0.25, exclude=("o_proj", "down_proj"), training=plan)
    out = {row.name for row in rec.scores if row.name.endswith(("o_proj", "down_proj"))}
    assert len(out) == 8 and set(rec.settings.excluded) == out
    assert not out & {name for option in rec.options for name in option.ranks}


def test_a_first_option_that_is_not_all_linear_is_named(llama):
    rec = recommend_modules(llama, learnable_batches(4), 3, rank=2, training=Training(learning_rate=0.01))
    assert rec.options[0].label == LARGEST and len(rec.options[0].ranks) == 3
    assert f"minus {LARGEST}" in str(rec) and "minus all linear" not in rec.to_markdown()


@pytest.mark.parametrize("ranks", [(), (0,), (-1, 2), (1.5,), "12", 4])
def test_ranks_that_are_none_are_refused(llama, ranks):
    with pytest.raises(PeftLinearError, match="ranks"):
        recommend_modules(llama, learnable_batches(4), 0.25, ranks=ranks)


def test_ranks_need_the_decision_for_language_models(llama):
    with pytest.raises(PeftLinearError, match="by the default criterion"):
        recommend_modules(llama, learnable_batches(4), 0.25, criterion="trace", ranks=(1, 2))


def test_a_criterion_by_name_takes_kernels_as_before(llama):
    rec = recommend_modules(llama, learnable_batches(4), 0.25, criterion="gradient_energy", draws=1)
    assert rec.criterion == "gradient_energy"
    assert rec.options == ()
    assert rec.ridge > 0
