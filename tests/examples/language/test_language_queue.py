# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The queue: it goes on where it was killed, never trains a run twice, and the rules for rates."""

import gzip
import json

import pytest

from examples.benchmarks.language import plan
from examples.benchmarks.language.accuracy import accuracy
from examples.benchmarks.language.plan import LADDER, MIDDLE, SECOND, Group, Run, next_rate
from examples.benchmarks.language.queue import count_right_answers, work
from examples.benchmarks.language.run_log import RunLog
from examples.benchmarks.language.tasks import load_task
from peft_linear.errors import PeftLinearError


MODEL = "smollm2-135m"
BELOW, LOW, CENTRE, HIGH, ABOVE = LADDER[1:]
GROUPS = [Group(MODEL, "spam", "1/2", arm, 0) for arm in ("all_linear", "mlp")]


class FakeBench:
    """Counts what is asked of it; the loss is lowest at the middle rate."""

    def __init__(self, die_after=None):
        self.asked = []
        self.die_after = die_after

    def run(self, run, with_accuracy=False):
        if self.die_after is not None and len(self.asked) == self.die_after:
            raise KeyboardInterrupt
        self.asked.append(run)
        loss = 1.0 if run.rate == CENTRE else 2.0
        return {**vars(run), "validation_loss": loss, "test_loss": loss, "seconds": 1.0}


def test_a_killed_queue_goes_on_and_repeats_nothing(tmp_path):
    first = FakeBench(die_after=2)
    with pytest.raises(KeyboardInterrupt):
        work(RunLog(tmp_path, shipped=None), GROUPS, first)
    second = FakeBench()
    assert work(RunLog(tmp_path, shipped=None), GROUPS, second) == 4
    assert len({*first.asked, *second.asked}) == 6
    assert work(RunLog(tmp_path, shipped=None), GROUPS, FakeBench()) == 0


def test_a_line_cut_off_by_a_kill_is_trained_again(tmp_path):
    work(RunLog(tmp_path, shipped=None), GROUPS, FakeBench(), limit=2)
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    again = FakeBench()
    work(RunLog(tmp_path, shipped=None), GROUPS, again, limit=1)
    assert again.asked == [Run(**vars(GROUPS[0]), rate=LOW)]
    assert len(RunLog(tmp_path, shipped=None).records) == 2


def test_runs_that_are_shipped_are_not_trained_again(tmp_path):
    work(RunLog(tmp_path / "a", shipped=None), GROUPS, FakeBench())
    shipped = tmp_path / "runs.jsonl.gz"
    shipped.write_bytes(gzip.compress((tmp_path / "a" / "runs.jsonl").read_bytes()))
    assert work(RunLog(tmp_path / "b", shipped), GROUPS, FakeBench()) == 0


def test_a_second_queue_on_the_same_folder_is_refused(tmp_path):
    log = RunLog(tmp_path, shipped=None)
    with log.locked(), pytest.raises(PeftLinearError, match="another queue runs"):
        work(RunLog(tmp_path, shipped=None), GROUPS, FakeBench())


def test_a_run_is_recorded_once(tmp_path):
    log = RunLog(tmp_path, shipped=None)
    record = FakeBench().run(Run(**vars(GROUPS[0]), rate=CENTRE))
    log.append(record)
    with pytest.raises(PeftLinearError, match="recorded once"):
        log.append(record)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, CENTRE),
        ({CENTRE: 2.0}, LOW),
        ({CENTRE: 2.0, LOW: 2.5}, HIGH),
        ({CENTRE: 2.0, LOW: None}, HIGH),
        ({CENTRE: 2.0, LOW: 1.99}, HIGH),  # better, but not clearly
        ({CENTRE: 2.0, LOW: 1.9}, BELOW),  # clearly better: the upper rate is left out
        ({CENTRE: 2.0, LOW: 1.9, BELOW: 1.8}, None),
        ({CENTRE: 2.0, LOW: 2.5, HIGH: 1.9}, ABOVE),
        ({CENTRE: 2.0, LOW: 2.5, HIGH: 1.99}, None),
        ({CENTRE: 2.0, LOW: 2.5, HIGH: 2.1}, None),
        ({CENTRE: 2.0, LOW: 2.5, HIGH: 1.9, ABOVE: 1.95}, None),
        ({CENTRE: None, LOW: None, HIGH: None}, None),
    ],
)
def test_the_next_rate(losses, expected):
    assert next_rate(MODEL, losses) == expected


def test_every_model_has_its_own_three_rates():
    gemma = "gemma3-270m"
    assert [MIDDLE[gemma], SECOND[gemma]] == [LOW, BELOW]
    assert next_rate(gemma, {LOW: 2.0, BELOW: 2.1}) == CENTRE
    assert next_rate(gemma, {LOW: 2.0, BELOW: 1.9}) == LADDER[0]


def test_the_plan_begins_with_the_arms_that_decide_and_keeps_the_kept_tasks_out():
    groups = list(plan.groups())
    first, more = len(plan.FIRST_ARMS), len(plan.MORE_ARMS)
    assert len(groups) == len(set(groups)) == 2 * 6 * (4 * first + more)
    assert [group.arm for group in groups[:first]] == list(plan.FIRST_ARMS)
    assert {group.arm for group in groups[: 12 * first]} == set(plan.FIRST_ARMS)
    assert {(group.budget, group.seed) for group in groups[: 12 * first]} == {("1/8", 0)}
    assert not {group.task for group in groups} & {group.task for group in plan.groups(kept=True)}


def test_a_real_run_records_what_the_report_needs(tmp_path, bench):
    log = RunLog(tmp_path, shipped=None)
    assert work(log, [Group(MODEL, "spam", "1/2", "mlp", 0)], bench, limit=1) == 1
    (record,) = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert record["rate"] == CENTRE
    assert record["test_loss"] < record["start_test_loss"]
    assert record["scaling"] == "16/r of each module"
    assert 0.98 * record["budget_parameters"] <= record["adapter_parameters"] <= record["budget_parameters"]


def test_right_answers_are_counted_with_the_adapter_in_place(bench):
    record = bench.run(Run(MODEL, "spam", "1/2", "mlp", 0, CENTRE), with_accuracy=True)
    assert record["accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert not any(hasattr(module, "lora_A") for module in bench.model.modules())


def test_a_model_is_loaded_once_for_all_its_runs(model, tokenizer, bench):
    names = []
    bench.load = lambda name: (names.append(name), (model, tokenizer))[1]
    for name in ("tiny", "tiny", "other"):
        bench.prepare(name, "spam")
    assert names == ["tiny", "other"]


def test_right_answers_are_counted_at_the_best_rate_once(tmp_path):
    log = RunLog(tmp_path, shipped=None)
    work(log, GROUPS, FakeBench())
    counting = FakeBench()
    assert count_right_answers(log, GROUPS, counting) == 2
    assert {run.rate for run in counting.asked} == {CENTRE}
    assert count_right_answers(log, GROUPS, FakeBench()) == 0


def test_greedy_answers_are_scored_by_the_task_s_verifier(model, tokenizer, monkeypatch):
    task = load_task("spam")
    assert 0 <= accuracy(model, tokenizer, task, size=64)["accuracy"] < 1
    truth = {example.prompt: example.completion for example in task.test}
    monkeypatch.setattr(
        "examples.benchmarks.language.accuracy.greedy_answers",
        lambda model, tokenizer, examples: [truth[example.prompt] for example in examples],
    )
    assert accuracy(model, tokenizer, task)["accuracy"] == 1.0
    assert accuracy(model, tokenizer, load_task("code")) == {}
