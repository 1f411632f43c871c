# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The forgetting benchmark: its statistics on planted answers, its runs, its resuming, and the whole script."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.benchmarks.forgetting import analysis, report, training
from examples.benchmarks.forgetting import encoder as encoder_setting
from examples.benchmarks.forgetting import run as script
from examples.benchmarks.forgetting import verdict as verdicts
from examples.common import language_model as lm
from examples.common.files import read_json
from examples.common.records import archive_of, as_text, lines_of
from tests.helpers.figures import assert_drawn


SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return script.make_setting(
        "encoder", script.parse(["--quick", "--steps", "3"]), tmp_path_factory.mktemp("encoder")
    )


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    options = script.parse(["--quick", "--steps", "3"])
    return script.make_setting("language_model", options, tmp_path_factory.mktemp("lm"))


def planted(cost, noise=0.0):
    """Runs of two arms that forget cost[arm]·gain², and what a seed adds to both alike."""
    generator = random.Random(0)
    arms = [
        training.Arm("proximal_factors", "ours", {"planted": (0.8, 0.4)}, proximal={}),
        training.Arm("lower_rate", "baseline", {"planted": (0.9, 0.6, 0.3)}, "learning_rate"),
    ]
    runs = []
    for seed in SEEDS:
        start, whole, own = 2 + generator.random(), 0.5 + generator.random(), 1 + noise * generator.random()

        def run(arm, value, gain, factor, seed=seed, start=start, whole=whole, own=own):
            metrics = {"target_loss": start - gain * whole, "rest": 1 + factor * own * gain**2}
            runs.append(training.Run("planted", arm, value, seed, metrics, gain, None, 1.0, {}))

        run("base", 0.0, 0.0, 0.0)
        run("lora", 1.0, 1.0, 0.5)
        for arm in arms:
            for value in arm.grid["planted"]:
                run(arm.key, value, value, cost[arm.key])
    return runs, arms, [training.Measure("rest", "loss gained on the rest", +1)]


@settings(max_examples=40, deadline=None)
@given(cost=st.floats(0.01, 10), level=st.floats(0.05, 0.95), gains=st.lists(st.floats(0, 1), max_size=6, unique=True))
def test_between_points_of_a_parabola_the_path_is_the_parabola(cost, level, gains):
    forgotten_at = analysis.forgotten_at
    path = [(gain, cost * gain**2) for gain in [1.0, *sorted(gains, reverse=True), 0.0]]
    assert forgotten_at(path, level) == pytest.approx(cost * level**2, rel=1e-6, abs=1e-9)
    assert forgotten_at(path[:1], level) is None


def test_of_several_crossings_the_one_that_forgets_least_counts():
    path = [(1.0, 4.0), (0.5, 1.0), (0.9, 9.0), (0.0, 0.0)]
    assert analysis.forgotten_at(path, 0.5) == pytest.approx(1.0)
    assert analysis.forgotten_at([(1.0, -4.0), (0.0, 0.0)], 0.5) == pytest.approx(-1.0)
    assert analysis.forgotten_at([(1.0, 4.0), (0.7, 1.0)], 0.5) is None


@pytest.mark.parametrize(("ours", "baseline", "sign"), [(0.2, 0.4, "less"), (0.4, 0.2, "more")])
def test_a_planted_winner_is_found_and_the_reverse_has_the_other_sign(ours, baseline, sign):
    runs, arms, measures = planted({"proximal_factors": ours, "lower_rate": baseline}, noise=0.5)
    summary = analysis.analyse(runs, arms, measures)
    found = summary["differences"]["rest"]["proximal_factors"]["lower_rate"]["0.75"]
    assert found["sign"] == sign and len(found["per_seed"]) == len(SEEDS)
    assert found["low"] <= found["mean"] <= found["high"]
    lines = verdicts.verdict(summary)
    overall = verdicts.overall({"planted": summary})
    assert ("ours forgets significantly less than every baseline" in lines[0]) == (sign == "less")
    assert ("baseline forgets significantly less than every form" in lines[0]) == (sign == "more")
    assert ("ours: significantly less" in overall) == (sign == "less")
    assert ("not the best choice" in overall) == (sign == "more")


def test_equal_arms_are_undecided_and_pairing_removes_what_seeds_share():
    cost = {"proximal_factors": 0.4, "lower_rate": 0.4}
    runs, arms, measures = planted(cost, noise=5.0)
    summary = analysis.analyse(runs, arms, measures)
    at_level = summary["matched"]["rest"]["lower_rate"]["0.5"]
    assert at_level["high"] - at_level["low"] > 0.05  # seeds differ much
    mine = summary["matched"]["rest"]["proximal_factors"]["0.5"]["per_seed"]
    crossing = {seed: mine[seed] - value for seed, value in at_level["per_seed"].items()}
    found = summary["differences"]["rest"]["proximal_factors"]["lower_rate"]["0.5"]
    assert found["per_seed"] == pytest.approx(crossing, abs=1e-6) and abs(found["mean"]) < 1e-6
    assert found["sign"] == "undecided" or abs(found["mean"]) < 1e-6
    json.dumps(summary, allow_nan=False)


def test_the_interval_is_students_and_one_seed_decides_nothing():
    values = [1.0, 2.0, 4.0, 5.0, 3.5]
    found = analysis.Interval.of(dict(enumerate(values)))
    half = 2.7764451 * np.std(values, ddof=1) / math.sqrt(5)
    assert (found.low, found.high) == pytest.approx((3.1 - half, 3.1 + half))
    assert analysis.Interval.of({0: -1.0}).sign == "undecided"


@pytest.mark.parametrize(("missing", "compared"), [((2,), True), ((1, 2), False)])
def test_one_seed_may_miss_a_level_and_is_left_out_of_the_pairs(missing, compared):
    runs, arms, measures = planted({"proximal_factors": 0.2, "lower_rate": 0.4})
    arms[0] = training.Arm(arms[0].key, "ours", arms[0].grid, proximal={}, ends_at_base=False)
    changed = [
        replace(run, metrics={**run.metrics, "target_loss": run.metrics["target_loss"] - 5.0})
        if run.arm == "proximal_factors" and run.seed in missing
        else run
        for run in runs
    ]
    summary = analysis.analyse(changed, arms, measures)
    found = summary["differences"]["rest"]["proximal_factors"]["lower_rate"]["0.75"]
    if compared:
        assert found["sign"] == "less" and sorted(found["per_seed"]) == ["0", "1", "3"]
        assert "significantly less than every baseline" in verdicts.verdict(summary)[0]
    else:
        assert found is None and summary["matched"]["rest"]["proximal_factors"]["0.75"] is None
        assert "Nothing can be compared" in verdicts.verdict(summary)[0]


def test_every_arm_has_as_many_points_and_names_a_real_treatment():
    protocol = training.Protocol(10, 4, 0.1)
    for arm in script.ARMS:
        assert {len(values) for values in arm.grid.values()} == {4}, arm.key
        if arm.trained:
            treatment = arm.treatment(arm.grid["encoder"][0], protocol)
            assert treatment != training.Treatment()
        elif arm.start:
            key, value = arm.start
            (start,) = [other for other in script.ARMS if other.key == key]
            assert all(value in values for values in start.grid.values())
    assert protocol.sum_of_rates == pytest.approx(sum(0.1 * (1 - step / 10) for step in range(10)))


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_runs_of_a_seed_start_alike_whatever_the_arm(encoder):
    proximal = training.Treatment(proximal={"proximal_lambda": 1.0})
    first = factors(training.with_adapter(encoder, 0, training.Treatment()))
    second = factors(training.with_adapter(encoder, 0, proximal))
    other = factors(training.with_adapter(encoder, 1, training.Treatment()))
    assert first and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    batches = [next(iter(encoder.batches(0))) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize("name", ["encoder", "language_model"])
def test_treatments_hold_the_adapter_back_and_scaling_by_zero_is_the_base_model(request, name):
    setting = request.getfixturevalue(name)

    def trained(**treatment):
        for _, last in training.train(setting, 0, training.Treatment(**treatment)):
            model = last
        return model

    plain = trained()
    distance = training.weight_distance(plain)
    assert distance > 0
    base = setting.evaluate(setting.new_model(0), 0)
    after = setting.evaluate(plain, 0)
    assert after != base
    with training.scaled(plain, 0.0):
        assert training.weight_distance(plain) == 0
        assert setting.evaluate(plain, 0) == pytest.approx(base, abs=1e-6)
    assert setting.evaluate(plain, 0) == after
    pull = {"proximal_lambda": 1e9, "proximal_selective": False}
    assert training.weight_distance(trained(proximal=pull)) < 1e-3 * distance
    for held in ({"learning_rate": 0.1}, {"lora_alpha": 0.1}, {"weight_decay": 0.5}):
        assert training.weight_distance(trained(**held)) < 0.95 * distance, held


def test_a_language_model_is_read_without_its_padding_and_knows_no_text_of_the_section(language_model):
    texts = language_model.others[:5]
    alone = [lm.predictions(language_model.base, lm.pad([text]))[0] for text in texts]
    together = lm.predictions(language_model.base, lm.pad(texts))[0]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-4)
    rows = lm.read_corpus("debian_descriptions")
    new, rest, held_out = lm.split_corpus(rows, "games")
    assert len(new) + len(rest) + len(held_out) == len(rows)
    assert not set(new) & set(rest) and not set(held_out) & set(rest)
    parts = language_model.split(3)
    assert [len(part) for part in parts] == [32, 12, 24]
    with pytest.raises(SystemExit, match="no section 'nowhere'"):
        lm.split_corpus(rows, "nowhere")


def test_retrieval_neighbours_and_probe_on_answers_that_are_known(encoder):
    module = encoder_setting
    torch.manual_seed(0)
    points = torch.randn(40, 16)
    loss, recall = module.retrieval(points, points, 0.05)
    assert recall == 1.0 and loss < 0.1
    _, chance = module.retrieval(points, points.roll(1, 0), 0.05)
    assert chance == 0.0
    labels = torch.arange(40) % 2
    clusters = 0.1 * points + torch.nn.functional.one_hot(labels, 16)
    assert module.neighbour_accuracy(clusters, labels, 5) == 1.0
    weight, bias = module.linear_probe(clusters, labels, 2, decay=1e-2)
    assert ((clusters @ weight.T + bias).argmax(1) == labels).all()
    half = module.half_of_words("one two three four five six")
    assert len(half.split()) == 3 and half == module.half_of_words("one two three four five six")
    with pytest.raises(SystemExit, match="unknown: {'nonsense'}"):
        module.EncoderSetting(module.EncoderOptions(sections=("games", "nonsense")), encoder.protocol)


ARGUMENTS = ["--quick", "--date", "2026-01-01", "--steps", "2", "--arms"]
ARMS = ["lower_rate", "early_stopping", "scaled_down", "proximal_delta", "proximal_delta_scaled"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    output = tmp_path_factory.mktemp("forgetting")
    arguments = [*ARGUMENTS, *ARMS, "--output", str(output), "--cache", str(output / "cache")]
    assert script.main(arguments) == 0
    return output, arguments


def test_the_script_writes_runs_summary_table_and_figure(measured):
    output, _ = measured
    lines = lines_of(output / "results.jsonl.gz")
    points = [(line["setting"], line["arm"], line["value"], line["seed"]) for line in lines if "arm" in line]
    assert len(points) == len(set(points)) == 2 * 2 * (2 + 5 * 2)
    assert sum("pilot" in line for line in lines) == 2
    summary = read_json(output / "summary.json")
    assert set(summary["settings"]) == {"encoder", "language_model"} and summary["date"] == "2026-01-01"
    for name in ("README.md", "report.md"):
        text = (output / name).read_text()
        assert "numbers mean nothing" in text and "ProximalLoRA, delta, λ = 1/Ση, then scaled down" in text
    assert_drawn(output / "figure.png")


def test_the_verdict_is_written_between_the_marks_of_a_page(measured):
    record = read_json(measured[0] / "summary.json")
    page = "before\n{}\nold\n{}\nafter\n".format(*report.MARKS)
    written = report.with_verdict(page, record)
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert "A language model moves to a new section." in written
    assert report.with_verdict(written, record) == written
    with pytest.raises(SystemExit, match="needs the marks"):
        report.with_verdict("no marks", record)


def test_a_killed_benchmark_goes_on_where_it_stopped(measured, monkeypatch):
    output, arguments = measured
    path, trained = output / "results.jsonl", []
    whole, text = archive_of(path).read_bytes(), (output / "report.md").read_text()
    before = lines_of(archive_of(path))
    original = script.trained_runs

    def counted(setting, arm, value, seed, *rest):
        trained.append((arm.key, value, seed))
        return original(setting, arm, value, seed, *rest)

    monkeypatch.setattr(script, "trained_runs", counted)
    assert script.main(arguments) == 0
    assert not trained and archive_of(path).read_bytes() == whole
    path.write_text(as_text(before)[:-20])  # killed while it wrote the last line, before anything was compressed
    archive_of(path).unlink()
    assert script.main(arguments) == 0
    assert len(trained) == 1
    assert not path.exists()
    after = lines_of(archive_of(path))
    assert sorted(line["value"] for line in after if "value" in line) == sorted(
        line["value"] for line in before if "value" in line
    )
    assert (output / "report.md").read_text().split("## How")[0][:2000] == text.split("## How")[0][:2000]
