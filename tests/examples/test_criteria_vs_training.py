# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The measurement of criteria: its statistics, its resuming, and the whole script on a tiny problem."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from examples.benchmarks.criteria_vs_training import run as benchmark
from examples.benchmarks.criteria_vs_training import training
from examples.common import correlation
from examples.common.files import read_json
from examples.common.records import lines_of
from tests.helpers.figures import assert_drawn


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_spearman_is_scipys_with_ties(pairs):
    spearman = correlation.spearman
    first, second = np.array(pairs, dtype=float).T
    if len(set(first)) > 1 and len(set(second)) > 1:
        np.testing.assert_allclose(spearman(first, second), spearmanr(first, second).statistic, atol=1e-12)
    else:
        assert spearman(first, second) == 0.0


def test_a_planted_order_is_found_and_its_reverse_has_the_other_sign():
    truth = [np.arange(20.0), np.arange(20.0) ** 3]
    right = correlation.correlate([np.exp(truth[0] / 5), truth[0]], truth)
    assert right.mean == pytest.approx(1.0) and right.low == pytest.approx(1.0) == right.high
    wrong = correlation.correlate([-np.exp(truth[0] / 5), -truth[0]], truth)
    assert wrong.mean == pytest.approx(-1.0) and wrong.per_seed == pytest.approx((-1.0, -1.0))


def test_the_interval_holds_the_correlation_and_narrows_with_more_modules():
    generator = np.random.default_rng(0)

    def width(modules):
        truth = generator.normal(size=(1, modules))
        found = correlation.correlate(truth + generator.normal(size=(1, modules)), truth)
        assert found.low < found.mean < found.high
        return found.high - found.low

    assert width(400) < 0.5 * width(20)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measurement")
    targets = r".*layer\.[05]\.(attention\.self\.(query|value)|output\.dense)"
    options = ["--seeds", "0", "1", "--steps", "2", "--examples", "8", "--limits", "64", "8", "16", "--spaces", "lora"]
    options += ["--targets", targets, "--output", str(folder), "--date", "2026-01-01"]
    assert benchmark.main(options) == 0
    return folder, options


@pytest.mark.slow
def test_the_measurement_writes_its_runs_scores_table_and_figure(measured):
    folder, _ = measured
    _, *runs = lines_of(folder / "runs.jsonl.gz")
    assert len(runs) == 2 * (6 + 2) and all(np.isfinite(run["test_loss"]) for run in runs)
    assert runs[0]["module"] == "(head only)" and runs[0]["parameters"] == 0
    by_module = {run["module"]: run["parameters"] for run in runs}
    assert by_module["bert.encoder.layer.0.attention.self.query"] == 8 * (384 + 384)
    assert by_module["(all modules)"] == sum(count for name, count in by_module.items() if name.startswith("bert"))
    results = read_json(folder / "results.json")
    assert set(results["spearman"]) == {"lora"}
    found = {name: value["mean"] for name, value in results["spearman"]["lora"].items()}
    assert {"condition_number", "trace", "gradient_energy", "leave_one_out", "parameters"} <= set(found)
    assert all(-1 <= value <= 1 for value in found.values())
    report = (folder / "README.md").read_text(encoding="utf-8")
    assert "`condition_number`" in report and "2026-01-01" in report and "--steps 2" in report
    assert_drawn(folder / "figure.png")


@pytest.mark.slow
def test_finished_work_is_not_repeated(measured, monkeypatch):
    folder, options = measured
    before = (folder / "runs.jsonl.gz").read_bytes(), (folder / "scores.jsonl.gz").read_bytes()

    def refuse(*args, **kwargs):
        raise AssertionError("this was done before")

    monkeypatch.setattr(training, "train", refuse)
    monkeypatch.setattr(benchmark, "compute_ntk", refuse)
    assert benchmark.main(options) == 0
    assert ((folder / "runs.jsonl.gz").read_bytes(), (folder / "scores.jsonl.gz").read_bytes()) == before
    with pytest.raises(AssertionError, match="this was done before"):
        benchmark.main([*options, "--seeds", "2"])
