# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear import compute_ntk, recommend_modules
from peft_linear.kernels.jacobian_features import BASE


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("benchmarks/selection.py")


@pytest.fixture(scope="module")
def parts(script, load_script):
    names = ("tasks", "sets", "training", "truth", "simulation", "scores", "analysis", "picks")
    return SimpleNamespace(**{name: load_script(f"benchmarks/selection_{name}.py") for name in names})


@pytest.fixture(scope="module")
def options(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    cache = ["--cache", str(folder / "cache")]
    return script.parse(["--quick", "--tasks", "digits", "--output", str(folder / "out"), *cache])


@pytest.fixture(scope="module")
def digits(script, parts, options):
    return parts.tasks.digits(options.sizes, script.Path(options.cache))


@pytest.fixture(scope="module")
def sets(parts, digits):
    return parts.sets.configurations(digits, rank=2, random_sets=1)


class Dictionary(dict):
    """Records in memory."""

    def add(self, record):
        self[record["task"], record["configuration"], record["learning_rate"], record["seed"]] = record


def planted(parts, losses, scores, task=None, rank=1):
    """A task of modules m0, m1, … whose sets have given losses."""
    names = tuple(losses)
    task = task or SimpleNamespace(
        key="planted",
        family="validation",
        modules=dict.fromkeys(names, (1, 1)),
        parameters=lambda chosen, rank: 2 * rank * len(chosen),
    )
    configurations = tuple(parts.sets.Configuration(f"single {name}", (name,)) for name in names)
    table = {c: {f"single {name}": value for name, value in values.items()} for c, values in scores.items()}
    found = {f"single {name}": {8: [loss, loss + 0.1]} for name, loss in losses.items()}
    return parts.analysis.Measured(task, configurations, found, table, {}, rank, len(names))


def test_the_tasks_have_their_kinds_and_share_no_example_between_splits(script, parts, tmp_path):
    sizes = parts.tasks.Sizes(train=40, validation=20, test=40, max_length=12, pretrain_steps=2)
    for key, classes in (("topics", 8), ("fine_grained", 20), ("few_shot", 4), ("pairs", 2)):
        task = parts.tasks.TASKS[key](sizes, tmp_path)
        assert len(task.modules) == 37 and task.head == "classifier"
        assert {row["labels"] for row in task.train} <= set(range(classes))
        texts = [{tuple(row["input_ids"]) for row in split} for split in (task.train, task.validation, task.test)]
        assert all(texts) and not texts[0] & texts[2] and not texts[0] & texts[1] and not texts[1] & texts[2]
    families = {key: parts.tasks.TASKS[key](sizes, tmp_path).family for key in ("pairs", "topics", "few_shot")}
    assert families == {"pairs": "test", "topics": "validation", "few_shot": "validation"}


def test_parameters_are_those_of_the_adapter(parts, digits, options):
    names = list(digits.modules)[:3]
    model = parts.training.with_adapter(digits, names, 0, options.protocol)
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


def test_only_the_chosen_modules_and_the_head_train(parts, digits, options):
    name = list(digits.modules)[4]
    model = parts.training.with_adapter(digits, [name], 0, options.protocol)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(name in n or "classifier" in n for n in trained) and sum("lora_" in n for n in trained) == 2
    bare = parts.training.with_adapter(digits, [], 0, options.protocol)
    assert {n for n, p in bare.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_a_loss_is_the_mean_over_what_is_predicted(parts, script, tmp_path):
    sizes = parts.tasks.Sizes(train=6, validation=4, test=70, max_length=12, pretrain_steps=1)
    task = parts.tasks.language_model(sizes, tmp_path)
    model = task.make_model(0)
    total = count = 0.0
    for text in task.test:
        batch = task.batch([text])
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, batch["input_ids"][0, 1:], reduction="sum"))
        count += len(text) - 1
    found = parts.training.evaluate(task, model)
    assert found["test_loss"] == pytest.approx(total / count, rel=1e-5) and "test_accuracy" not in found


@pytest.mark.parametrize("best", [1e-3, 3e-3, 1e-2, 3e-2])
def test_the_learning_rate_is_found_uphill_for_each_budget(parts, best, monkeypatch):
    def losses(task, names, rate, seed, protocol, ranks):
        tried.append(rate)
        far = abs(math.log(rate / best))
        there = abs(math.log(rate / 3e-4))
        return {"1": {"validation_loss": far, "test_loss": 1.0}, "2": {"validation_loss": there, "test_loss": 2.0}}

    tried = []
    monkeypatch.setattr(parts.truth, "train", losses)
    protocol = parts.training.Protocol(steps=(1, 2))
    truth = parts.truth.Truth(SimpleNamespace(key="t"), protocol, Dictionary())
    configuration = parts.sets.Configuration("c", ("m",))
    assert truth.tune(configuration, 0) == {1: best, 2: 3e-4}
    assert len(tried) == len(set(tried))
    truth.measure(configuration, (0, 1))
    assert {key[2] for key in truth.records if key[3] == 1} == {best, 3e-4}
    assert truth.finished(configuration, (0, 1)) and not truth.finished(configuration, (0, 1, 2))


def test_one_learning_rate_for_all_is_trained_where_it_is_missing_and_read_apart(parts, monkeypatch):
    def losses(task, names, rate, seed, protocol, ranks):
        number = int(names[0][1:])
        turned = -number if rate > parts.truth.ONE_RATE else number  # large rates turn the order around
        return {"1": {"validation_loss": abs(math.log(rate / 1e-2)), "test_loss": float(turned)}}

    monkeypatch.setattr(parts.truth, "train", losses)
    protocol = parts.training.Protocol(steps=(1,))
    truth = parts.truth.Truth(SimpleNamespace(key="t"), protocol, Dictionary())
    configurations = [parts.sets.Configuration(f"single m{i}", (f"m{i}",)) for i in range(5)]
    parts.truth.measure(truth, configurations, (0,))
    assert truth.losses(configurations[3], (0,)) == {1: [-3.0]}
    trained = len(truth.records)
    parts.truth.measure_at_one_rate(truth, configurations, (0, 1))
    assert truth.losses(configurations[3], (0, 1), rate=parts.truth.ONE_RATE) == {1: [3.0, 3.0]}
    assert len(truth.records) == trained + 5, "the first seed was trained with it on the way to its best"
    scores = {"low": {f"single m{i}": -float(i) for i in range(5)}, "partial": {"single m0": 1.0}}
    table = parts.analysis.by_rate(truth, configurations, scores, ("low", "partial", "absent"), 0)
    assert {rate: of[1]["low"][1] for rate, of in table.items()} == pytest.approx({3e-3: 1.0, 1e-2: -1.0, 3e-2: -1.0})
    assert all(set(of[1]) == {"low"} and of[0] == 5 for of in table.values())


def test_the_learning_rate_rises_and_decays_as_the_trainers_does(parts):
    decayed = parts.training.Protocol(steps=(10,), warmup=2, decays=True)
    assert [decayed.factor(step) for step in range(1, 11)] == pytest.approx(
        [0.5, 1.0, *(1 - i / 9 for i in range(1, 9))]
    )
    constant = parts.training.Protocol(warmup=2)
    assert [constant.factor(step) for step in (1, 2, 3, 99)] == [0.5, 1.0, 1.0, 1.0]
    assert "decays" not in decayed.setting() and decayed.setting()["steps"] == (10,)


def test_the_look_through_both_heads_is_what_recommend_modules_scores_by(parts, digits, sets, options):
    scores = parts.scores.LOOKS["lora, 8 draws, both heads"](digits, sets, 0, options.protocol)
    model = digits.make_model(0)
    batches = digits.calibration(parts.scores.count_examples(digits, model), 0)
    settings = {"rank": options.protocol.rank, "lora_alpha": options.protocol.lora_alpha, "progress": False}
    rec = recommend_modules(model, batches, 2, **settings)
    start = rec.settings.start_score
    table = scores["gradient energy, least share over both heads, AdamW"]
    for row in rec.scores:
        assert table[f"single {row.name}"] == pytest.approx(row.score - start, rel=1e-6)
    chosen = next(c for c in sets if len(c.modules) == 2)
    own = {row.name: row.score - start for row in rec.scores}
    assert table[chosen.key] == pytest.approx(sum(own[name] for name in chosen.modules), rel=1e-6)


def test_adapters_have_the_ranks_that_are_asked_for_and_one_scaling(parts, digits, options):
    names = list(digits.modules)[:2]
    model = parts.training.with_adapter(digits, names, 0, options.protocol, ranks=[1, 3])
    layers = [module for name, module in model.named_modules() if name.endswith(tuple(names)) and hasattr(module, "r")]
    assert [layer.r["default"] for layer in layers] == [1, 3]
    assert {layer.scaling["default"] for layer in layers} == {options.protocol.lora_alpha / options.protocol.rank}


def test_simulated_adamw_is_the_loop_written_by_hand(parts, digits, options):
    features = parts.scores.jacobian_features(digits.make_model(0), digits.calibration(12, 0), rank=2, progress=False)
    single, protocol = features.subset([features.names[3]]), options.protocol
    best = dict.fromkeys(protocol.steps, math.inf)
    count, classes = single.outputs.shape
    rows = single.rows.double().view(count, classes, -1)
    half = count // 2
    for rate in parts.simulation.SIMULATED_RATES:
        theta = torch.nn.Parameter(torch.zeros(rows.shape[2], dtype=torch.float64))
        optimizer = torch.optim.AdamW([theta], weight_decay=0.0)

        def loss(examples, theta=theta):
            logits = single.outputs[examples] + rows[examples] @ theta
            return torch.nn.functional.cross_entropy(logits, single.labels[examples])

        for step, batch in enumerate(parts.simulation.simulated_batches(half, 0, protocol), start=1):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, step / protocol.warmup)
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
            if step in best:
                best[step] = min(best[step], float(loss(torch.arange(half, count))))
    assert parts.simulation.simulated_losses(single, 0, protocol) == pytest.approx(best, rel=1e-5)


def test_the_gradients_one_norm_is_that_of_autograd(parts, digits):
    names = list(digits.modules)[:4]
    model = digits.make_model(0)
    batches = digits.calibration(8, 0)
    features = parts.scores.jacobian_features(model, batches, targets=names, rank=2, seed=0, progress=False)
    norms = parts.simulation.gradient_norms(features)
    gradient = torch.zeros(features.rows.shape[1], dtype=torch.float64)
    probabilities = features.outputs.softmax(dim=1)
    for i, label in enumerate(features.labels.tolist()):
        for a in range(probabilities.shape[1]):
            error = float(probabilities[i, a]) - (a == label)
            gradient += error * features.rows[i * probabilities.shape[1] + a].double() / len(probabilities)
    for name in names:
        columns = [gradient[c.first : c.stop] for c in features.columns if c.module == name and c.module != BASE]
        assert norms[name] == pytest.approx(float(torch.cat(columns).abs().sum()), rel=1e-5)


def test_a_perfect_criterion_has_no_regret_and_rank_correlation_one(parts):
    losses = {f"m{i}": 1.0 + i for i in range(8)}
    scores = {
        "right": {name: -loss for name, loss in losses.items()},
        "wrong": dict(losses),
    }
    of = planted(parts, losses, scores)
    found = parts.analysis.correlations(of, "single modules", 8)
    assert list(found) == ["right", "wrong"] and found["right"].mean == 1.0 and found["wrong"].mean == -1.0
    regret = parts.analysis.regrets(of, 8)
    assert set(regret["right"].values()) == {0.0}
    assert list(regret["wrong"].values()) == pytest.approx([7.0] * len(regret["wrong"]))
    assert parts.analysis.agreement_of_seeds(of, "single modules", 8) == pytest.approx(1.0)
    summary = parts.analysis.summary([of, of, of], [8])
    difference = parts.analysis.paired(summary, "right", "wrong")
    assert difference.mean == pytest.approx(-7.0) and difference.high < 0 and next(iter(summary)) == "right"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 5.0), min_size=9, max_size=9), st.lists(st.floats(-3, 3), min_size=9, max_size=9))
def test_regret_is_never_negative(parts, losses, values):
    names = [f"m{i}" for i in range(9)]
    of = planted(parts, dict(zip(names, losses, strict=True)), {"any": dict(zip(names, values, strict=True))})
    for of_criterion in parts.analysis.regrets(of, 8).values():
        assert all(value >= -1e-12 for value in of_criterion.values())


def test_a_pick_is_charged_with_the_best_that_is_known_within_its_budget(parts):
    of = planted(parts, {"m0": 2.0, "m1": 1.0, "m2": 3.0}, {})
    words = list(parts.analysis.budgets(of.task, 1))
    picks = {
        "good": dict.fromkeys(words, ("m1",)),
        "bad": dict.fromkeys(words, ("m2",)),
        "untrained": dict.fromkeys(words, ("m0", "m1")),
    }
    found = parts.picks.pick_regrets(of, picks, 8)
    assert set(found["good"].values()) == {0.0} and list(found["bad"].values()) == pytest.approx(
        [2.0] * len(found["bad"])
    )
    assert "untrained" not in found


@pytest.mark.slow
def test_the_whole_benchmark_runs_resumes_and_reports(script, options, capsys):
    arguments = ["--quick", "--tasks", "digits", "--output", options.output, "--cache", options.cache]
    assert script.main(arguments) == 0
    folder = script.Path(options.output)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "gradient_energy (weight)" in text and "`kappa_tune`" in text and "regret" in text
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for view in ("one_rate", "tuned", "decayed_one_rate", "decayed"):
        regrets = results[view]["digits"]["pick_regrets"]["2"]
        assert regrets["random"] and regrets["recommend_modules"]
        assert (folder / f"{view}.png").stat().st_size > 10_000
        assert f"({view}.png)" in text
    assert "predicted_loss, AdamW (weight)" in text
    before = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.jsonl")}
    assert script.main(arguments) == 0  # nothing is trained or scored again
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.jsonl")} == before
