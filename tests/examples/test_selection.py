# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.benchmarks.selection import analysis, simulation, tasks, training
from examples.benchmarks.selection import run as script
from examples.benchmarks.selection import scores as score_module
from examples.benchmarks.selection import sets as set_module
from examples.benchmarks.selection import truth as truth_module
from examples.benchmarks.selection.picks import pick_regrets
from examples.benchmarks.selection.report import HEADINGS
from examples.common.files import read_json
from peft_linear import compute_ntk, recommend_modules
from peft_linear.kernels.jacobian_features import BASE
from tests.helpers.figures import assert_drawn


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    cache = ["--cache", str(folder / "cache")]
    return script.parse(["--quick", "--tasks", "digits", "--output", str(folder / "out"), *cache])


@pytest.fixture(scope="module")
def digits(options):
    return tasks.digits(options.sizes, script.Path(options.cache))


@pytest.fixture(scope="module")
def sets(digits):
    return set_module.configurations(digits, rank=2, random_sets=1)


class Dictionary(dict):
    """Records in memory."""

    def add(self, record):
        self[record["task"], record["configuration"], record["learning_rate"], record["seed"]] = record


def planted(losses, scores, task=None, rank=1):
    """A task of modules m0, m1, … whose sets have given losses."""
    names = tuple(losses)
    task = task or SimpleNamespace(
        key="planted",
        family="validation",
        modules=dict.fromkeys(names, (1, 1)),
        parameters=lambda chosen, rank: 2 * rank * len(chosen),
    )
    configurations = tuple(set_module.Configuration(f"single {name}", (name,)) for name in names)
    table = {c: {f"single {name}": value for name, value in values.items()} for c, values in scores.items()}
    found = {f"single {name}": {8: [loss, loss + 0.1]} for name, loss in losses.items()}
    return analysis.Measured(task, configurations, found, table, {}, rank, len(names))


def test_the_tasks_have_their_kinds_and_share_no_example_between_splits(tmp_path):
    sizes = tasks.Sizes(train=40, validation=20, test=40, max_length=12, pretrain_steps=2)
    for key, classes in (("topics", 8), ("fine_grained", 20), ("few_shot", 4), ("pairs", 2)):
        task = tasks.TASKS[key](sizes, tmp_path)
        assert len(task.modules) == 37 and task.head == "classifier"
        assert {row["labels"] for row in task.train} <= set(range(classes))
        texts = [{tuple(row["input_ids"]) for row in split} for split in (task.train, task.validation, task.test)]
        assert all(texts) and not texts[0] & texts[2] and not texts[0] & texts[1] and not texts[1] & texts[2]
    families = {key: tasks.TASKS[key](sizes, tmp_path).family for key in ("pairs", "topics", "few_shot")}
    assert families == {"pairs": "test", "topics": "validation", "few_shot": "validation"}


def test_parameters_are_those_of_the_adapter(digits, options):
    names = list(digits.modules)[:3]
    model = training.with_adapter(digits, names, 0, options.protocol)
    real = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert digits.parameters(names, options.protocol.rank) == real
    kernels = compute_ntk(digits.make_model(0), digits.calibration(4, 0), rank=2, progress=False)
    assert kernels.num_parameters == {name: digits.parameters([name], 2) for name in digits.modules}


def test_the_configurations_are_different_sets_with_every_single_module(digits, sets):
    assert len({c.modules for c in sets}) == len(sets)
    assert [c.modules for c in sets if c.single] == [(name,) for name in digits.modules]
    by_key = {c.key: c.modules for c in sets}
    assert by_key["all linear"] == tuple(digits.modules) and by_key["head only"] == ()
    assert set(by_key["attention"]).isdisjoint(by_key["MLP"]) and len(by_key["4 random, 0"]) == 4
    everything = digits.parameters(list(digits.modules), 2)
    assert 0.2 * everything < digits.parameters(by_key["25% random, 0"], 2) <= 0.25 * everything


def test_only_the_chosen_modules_and_the_head_train(digits, options):
    name = list(digits.modules)[4]
    model = training.with_adapter(digits, [name], 0, options.protocol)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(name in n or "classifier" in n for n in trained) and sum("lora_" in n for n in trained) == 2
    bare = training.with_adapter(digits, [], 0, options.protocol)
    assert {n for n, p in bare.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_a_loss_is_the_mean_over_what_is_predicted(tmp_path):
    sizes = tasks.Sizes(train=6, validation=4, test=70, max_length=12, pretrain_steps=1)
    task = tasks.language_model(sizes, tmp_path)
    model = task.make_model(0)
    total = count = 0.0
    for text in task.test:
        batch = task.batch([text])
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, batch["input_ids"][0, 1:], reduction="sum"))
        count += len(text) - 1
    found = training.evaluate(task, model)
    assert found["test_loss"] == pytest.approx(total / count, rel=1e-5) and "test_accuracy" not in found


@pytest.mark.parametrize("best", [1e-3, 3e-3, 1e-2, 3e-2])
def test_the_learning_rate_is_found_uphill_for_each_budget(best, monkeypatch):
    def losses(task, names, rate, seed, protocol, ranks):
        tried.append(rate)
        far = abs(math.log(rate / best))
        there = abs(math.log(rate / 3e-4))
        return {"1": {"validation_loss": far, "test_loss": 1.0}, "2": {"validation_loss": there, "test_loss": 2.0}}

    tried = []
    monkeypatch.setattr(truth_module, "train", losses)
    protocol = training.Protocol(steps=(1, 2))
    truth = truth_module.Truth(SimpleNamespace(key="t"), protocol, Dictionary())
    configuration = set_module.Configuration("c", ("m",))
    assert truth.tune(configuration, 0) == {1: best, 2: 3e-4}
    assert len(tried) == len(set(tried))
    truth.measure(configuration, (0, 1))
    assert {key[2] for key in truth.records if key[3] == 1} == {best, 3e-4}
    assert truth.finished(configuration, (0, 1)) and not truth.finished(configuration, (0, 1, 2))


def test_one_learning_rate_for_all_is_trained_where_it_is_missing_and_read_apart(monkeypatch):
    def losses(task, names, rate, seed, protocol, ranks):
        number = int(names[0][1:])
        turned = -number if rate > truth_module.ONE_RATE else number  # large rates turn the order around
        return {"1": {"validation_loss": abs(math.log(rate / 1e-2)), "test_loss": float(turned)}}

    monkeypatch.setattr(truth_module, "train", losses)
    protocol = training.Protocol(steps=(1,))
    truth = truth_module.Truth(SimpleNamespace(key="t"), protocol, Dictionary())
    configurations = [set_module.Configuration(f"single m{i}", (f"m{i}",)) for i in range(5)]
    truth_module.measure(truth, configurations, (0,))
    assert truth.losses(configurations[3], (0,)) == {1: [-3.0]}
    trained = len(truth.records)
    truth_module.measure_at_one_rate(truth, configurations, (0, 1))
    assert truth.losses(configurations[3], (0, 1), rate=truth_module.ONE_RATE) == {1: [3.0, 3.0]}
    assert len(truth.records) == trained + 5, "the first seed was trained with it on the way to its best"
    scores = {"low": {f"single m{i}": -float(i) for i in range(5)}, "partial": {"single m0": 1.0}}
    table = analysis.by_rate(truth, configurations, scores, ("low", "partial", "absent"), 0)
    assert {rate: of[1]["low"][1] for rate, of in table.items()} == pytest.approx({3e-3: 1.0, 1e-2: -1.0, 3e-2: -1.0})
    assert all(set(of[1]) == {"low"} and of[0] == 5 for of in table.values())


def test_the_learning_rate_rises_and_decays_as_the_trainers_does():
    decayed = training.Protocol(steps=(10,), warmup=2, decays=True)
    assert [decayed.factor(step) for step in range(1, 11)] == pytest.approx(
        [0.5, 1.0, *(1 - i / 9 for i in range(1, 9))]
    )
    constant = training.Protocol(warmup=2)
    assert [constant.factor(step) for step in (1, 2, 3, 99)] == [0.5, 1.0, 1.0, 1.0]
    assert "decays" not in decayed.setting() and decayed.setting()["steps"] == (10,)


def test_the_scorer_with_both_heads_is_what_recommend_modules_scores_by(digits, sets, options):
    scores = score_module.SCORERS["lora, 8 draws, both heads"](digits, sets, 0, options.protocol)
    model = digits.make_model(0)
    batches = digits.calibration(score_module.count_examples(digits, model), 0)
    settings = {"rank": options.protocol.rank, "lora_alpha": options.protocol.lora_alpha, "progress": False}
    rec = recommend_modules(model, batches, 2, **settings)
    start = rec.settings.start_score
    table = scores["gradient energy, least share over both heads, AdamW"]
    for row in rec.scores:
        assert table[f"single {row.name}"] == pytest.approx(row.score - start, rel=1e-6)
    chosen = next(c for c in sets if len(c.modules) == 2)
    own = {row.name: row.score - start for row in rec.scores}
    assert table[chosen.key] == pytest.approx(sum(own[name] for name in chosen.modules), rel=1e-6)


def test_adapters_have_the_ranks_that_are_asked_for_and_one_scaling(digits, options):
    names = list(digits.modules)[:2]
    model = training.with_adapter(digits, names, 0, options.protocol, ranks=[1, 3])
    layers = [module for name, module in model.named_modules() if name.endswith(tuple(names)) and hasattr(module, "r")]
    assert [layer.r["default"] for layer in layers] == [1, 3]
    assert {layer.scaling["default"] for layer in layers} == {options.protocol.lora_alpha / options.protocol.rank}


def test_simulated_adamw_is_the_loop_written_by_hand(digits, options):
    features = score_module.jacobian_features(digits.make_model(0), digits.calibration(12, 0), rank=2, progress=False)
    single, protocol = features.subset([features.names[3]]), options.protocol
    best = dict.fromkeys(protocol.steps, math.inf)
    count, classes = single.outputs.shape
    rows = single.rows.double().view(count, classes, -1)
    half = count // 2
    for rate in simulation.SIMULATED_RATES:
        theta = torch.nn.Parameter(torch.zeros(rows.shape[2], dtype=torch.float64))
        optimizer = torch.optim.AdamW([theta], weight_decay=0.0)

        def loss(examples, theta=theta):
            logits = single.outputs[examples] + rows[examples] @ theta
            return torch.nn.functional.cross_entropy(logits, single.labels[examples])

        for step, batch in enumerate(simulation.simulated_batches(half, 0, protocol), start=1):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, step / protocol.warmup)
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
            if step in best:
                best[step] = min(best[step], float(loss(torch.arange(half, count))))
    assert simulation.simulated_losses(single, 0, protocol) == pytest.approx(best, rel=1e-5)


def test_the_gradients_one_norm_is_that_of_autograd(digits):
    names = list(digits.modules)[:4]
    model = digits.make_model(0)
    batches = digits.calibration(8, 0)
    features = score_module.jacobian_features(model, batches, targets=names, rank=2, seed=0, progress=False)
    norms = simulation.gradient_norms(features)
    gradient = torch.zeros(features.rows.shape[1], dtype=torch.float64)
    probabilities = features.outputs.softmax(dim=1)
    for i, label in enumerate(features.labels.tolist()):
        for a in range(probabilities.shape[1]):
            error = float(probabilities[i, a]) - (a == label)
            gradient += error * features.rows[i * probabilities.shape[1] + a].double() / len(probabilities)
    for name in names:
        columns = [gradient[c.first : c.stop] for c in features.columns if c.module == name and c.module != BASE]
        assert norms[name] == pytest.approx(float(torch.cat(columns).abs().sum()), rel=1e-5)


@pytest.mark.parametrize("values", [[1.0, 2.0], [114.38460, 114.38510, 114.38512], [1e-9, 2.0, 2.0], [3.0]])
def test_recorded_scores_are_rounded_and_keep_order_and_ties(values):
    given = {f"m{i}": value for i, value in enumerate(values)}
    short = score_module.shortened({"c": given})["c"]
    assert list(short) == list(given)
    for a, b in itertools.combinations(given, 2):
        assert (short[a] < short[b], short[a] == short[b]) == (given[a] < given[b], given[a] == given[b])
    assert all(short[name] == pytest.approx(value, rel=1e-5) for name, value in given.items())
    assert score_module.shortened({"c": {"a": 1.23456789, "b": 2.0}})["c"]["a"] == 1.23457


def test_a_perfect_criterion_has_no_regret_and_rank_correlation_one():
    losses = {f"m{i}": 1.0 + i for i in range(8)}
    scores = {
        "right": {name: -loss for name, loss in losses.items()},
        "wrong": dict(losses),
    }
    of = planted(losses, scores)
    found = analysis.correlations(of, "single modules", 8)
    assert list(found) == ["right", "wrong"] and found["right"].mean == 1.0 and found["wrong"].mean == -1.0
    regret = analysis.regrets(of, 8)
    assert set(regret["right"].values()) == {0.0}
    assert list(regret["wrong"].values()) == pytest.approx([7.0] * len(regret["wrong"]))
    assert analysis.agreement_of_seeds(of, "single modules", 8) == pytest.approx(1.0)
    summary = analysis.summary([of, of, of], [8])
    difference = analysis.paired(summary, "right", "wrong")
    assert difference.mean == pytest.approx(-7.0) and difference.high < 0 and next(iter(summary)) == "right"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 5.0), min_size=9, max_size=9), st.lists(st.floats(-3, 3), min_size=9, max_size=9))
def test_regret_is_never_negative(losses, values):
    names = [f"m{i}" for i in range(9)]
    of = planted(dict(zip(names, losses, strict=True)), {"any": dict(zip(names, values, strict=True))})
    for of_criterion in analysis.regrets(of, 8).values():
        assert all(value >= -1e-12 for value in of_criterion.values())


def test_a_pick_is_charged_with_the_best_that_is_known_within_its_budget():
    of = planted({"m0": 2.0, "m1": 1.0, "m2": 3.0}, {})
    words = list(analysis.budgets(of.task, 1))
    picks = {
        "good": dict.fromkeys(words, ("m1",)),
        "bad": dict.fromkeys(words, ("m2",)),
        "untrained": dict.fromkeys(words, ("m0", "m1")),
    }
    found = pick_regrets(of, picks, 8)
    assert set(found["good"].values()) == {0.0} and list(found["bad"].values()) == pytest.approx(
        [2.0] * len(found["bad"])
    )
    assert "untrained" not in found


@pytest.mark.slow
def test_the_whole_benchmark_runs_resumes_and_reports(options, capsys):
    arguments = ["--quick", "--tasks", "digits", "--output", str(options.output), "--cache", options.cache]
    assert script.main(arguments) == 0
    folder = script.Path(options.output)
    page, text = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "report.md"))
    assert "gradient_energy (weight)" in text and "`kappa_tune`" in text and "regret" in text
    results = read_json(folder / "results.json")
    for view in ("one_rate", "tuned", "decayed_one_rate", "decayed"):
        regrets = results[view]["digits"]["pick_regrets"]["2"]
        assert regrets["random"] and regrets["recommend_modules"]
        assert_drawn(folder / f"{view}.png")
        assert f"## {HEADINGS[view]}" in text and (f"({view}.png)" in page) == (view in script.SHOWN_FIGURES)
    assert "predicted_loss, AdamW (weight)" in text
    assert "`the default of recommend_modules`" in page and "## By learning rate" in page
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl*")}
    assert set(before) == {f"{name}.jsonl.gz" for name in ("scores_digits", "truth_digits", "truth_digits_decayed")}
    assert script.main(arguments) == 0  # nothing is trained or scored again
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl*")} == before
