# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

import pytest

from examples.benchmarks.selection.tasks import QUICK_SIZES, Sizes
from examples.benchmarks.selection_fresh import compared, report
from examples.benchmarks.selection_fresh import run as script
from examples.benchmarks.selection_fresh import tasks as fresh
from examples.common.files import read_json
from examples.common.records import archive_of, as_text, lines_of
from tests.helpers.figures import assert_drawn


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    arguments = ["--quick", "--tasks", "vision_0", "vision_1", "--seeds", "0", "1", "--date", "2026-01-01"]
    arguments += ["--output", str(folder / "out"), "--cache", str(folder / "cache")]
    assert script.main(arguments) == 0
    return folder / "out", arguments


def finished(key, **losses):
    """A task in which selectors reach these losses, within two budgets."""
    task = SimpleNamespace(key=key, words="planted")
    rest = dict.fromkeys(set(compared.COMPARED) - set(losses), (5.0, 5.0))
    found = {name: dict(zip("ab", values, strict=True)) for name, values in {**rest, **losses}.items()}
    return compared.Finished(task, found, {"all linear": 1.0})


def test_selectors_are_compared_task_by_task():
    default = compared.RECOMMENDED
    found = [
        finished("text_0", **{default: (1.0, 2.0), "fisher": (1.5, 2.5), "qv": (0.5, 2.0)}),
        finished("vision_0", **{default: (3.0, 3.0), "fisher": (2.0, 3.5), "qv": (3.0, 4.0)}),
    ]
    assert found[0].excess("fisher", default) == 0.5 and found[1].excess("fisher", default) == -0.25
    assert found[0].regret("fisher") == 0.75 and found[0].regret(default) == 0.25  # qv has the least of one budget
    rows = compared.compared(found)
    regret, excess, better = rows["fisher"]
    assert (regret.mean, excess.mean, better) == (0.5, 0.125, 1)
    assert rows["qv"][1].mean == 0.125 and rows["qv"][2] == 1
    assert next(iter(rows)) == default and rows[default][2] == 0
    assert "| `fisher` | +0.500 | +0.125 | 1 of 2 |" in report.table(found)


def test_all_but_the_pooler_is_a_reference_where_there_is_one():
    names = ("bert.encoder.layer.0.output.dense", "bert.pooler.dense")
    found = script.references_of(SimpleNamespace(modules=dict.fromkeys(names, (1, 1))))
    assert [(c.key, c.modules) for c in found] == [
        ("all linear", names),
        ("all linear, without the pooler", names[:1]),
    ]
    (one,) = script.references_of(SimpleNamespace(modules={names[0]: (1, 1)}))
    assert one.key == "all linear"


def test_a_seed_determines_one_task(tmp_path):
    sizes = Sizes(train=64, validation=12, test=24, max_length=12, pretrain_steps=2, layers=2)
    tasks = [fresh.fresh_task(key)(sizes, tmp_path) for key in ("text_3", "text_3", "text_4")]
    assert tasks[0].words == tasks[1].words != tasks[2].words
    assert tasks[0].train == tasks[1].train and tasks[0].family == "fresh"
    for task in tasks[1:]:
        parts = [{tuple(row["input_ids"]) for row in part} for part in (task.train, task.validation, task.test)]
        assert len(parts[0] | parts[1] | parts[2]) >= len(task.train) + len(task.validation) + len(task.test) - 2
        classes = len(task.make_model(0).config.id2label)
        assert {row["labels"] for row in task.test} == set(range(classes))
    language = fresh.fresh_task("language_0")(sizes, tmp_path)
    assert language.outputs == "log_likelihood" and "science" not in language.words and len(language.train) == 64


def test_digits_that_a_model_was_pretrained_on_are_not_learnt_again(tmp_path):
    from sklearn.datasets import load_digits

    images, numbers = load_digits(return_X_y=True)
    of_image = {tuple(image / 8 - 1): int(number) for image, number in zip(images, numbers, strict=True)}
    task = fresh.fresh_task("vision_2")(QUICK_SIZES, tmp_path)
    pairs = {(of_image[tuple(image.flatten().tolist())], label) for image, label in [*task.test, *task.train]}
    assert pairs <= {(0, 0), (2, 1), (3, 2), (6, 3), (9, 4)} and len(pairs) == 5
    assert "pretrained on 1, 4, 5, 7, 8" in task.words


@pytest.mark.parametrize("key", ["text", "sound_1", "text_x", "text_-1"])
def test_unknown_tasks_are_refused(key, tmp_path):
    with pytest.raises(SystemExit, match=r"no task is called .*; they are called after text, vision, language"):
        script.main(["--quick", "--tasks", key, "--output", str(tmp_path)])


def test_every_selectors_modules_are_trained_and_reported(output):
    folder, _ = output
    results = read_json(folder / "results.json")
    assert set(results["tasks"]) == {"vision_0", "vision_1"} and results["seeds"] == [0, 1]
    runs = lines_of(folder / "truth_vision_0.jsonl.gz")[1:]
    of_all = [run["budgets"]["2"]["test_loss"] for run in runs if run["configuration"] == "all linear"]
    assert (
        results["tasks"]["vision_0"]["references"]["all linear"] == pytest.approx(sum(of_all) / 2) and len(of_all) == 2
    )
    losses = results["tasks"]["vision_0"]["losses"]
    picks = lines_of(folder / "scores_vision_0.jsonl.gz")[1:]
    drawn = [line["picks"]["4 modules"] for line in picks if line["scorer"].startswith("pick random ")]
    assert len(drawn) == 3 and losses["random"]["4 modules"] == pytest.approx(
        sum(
            run["budgets"]["2"]["test_loss"]
            for names in drawn
            for run in runs
            if sorted(run["modules"]) == sorted(names)
        )
        / 6  # three draws, two seeds
    )
    assert all(set(of) == set(losses["qv"]) and len(of) == 5 for of in losses.values()) and len(losses) == 10
    for name in ("README.md", "report.md"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "## All 2 tasks" in text and "2026-01-01" in text and "| `recommend_modules` |" in text
    assert_drawn(folder / "figure.png")


def test_finished_runs_are_not_repeated_and_missing_ones_are_named(output, monkeypatch, capsys):
    folder, arguments = output
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl*")}
    monkeypatch.setattr(script, "measure_at_one_rate", lambda truth, sets, seeds: None)
    assert script.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl*")} == before
    torn = folder / "truth_vision_1.jsonl"
    torn.write_text(as_text(lines_of(archive_of(torn)))[:-9], encoding="utf-8")
    archive_of(torn).unlink()
    assert script.main([*arguments, "--stages", "report"]) == 0
    assert "vision_1: not finished, left out" in capsys.readouterr().err
    assert set(read_json(folder / "results.json")["tasks"]) == {"vision_0"}
    with pytest.raises(SystemExit, match="nothing is finished"):
        script.main([*arguments, "--stages", "report", "--tasks", "vision_1"])
