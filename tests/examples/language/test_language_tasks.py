# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Tasks: the same examples every time, no example in two splits, verifiers that tell right from wrong."""

import importlib.util

import pytest

from examples.benchmarks.language import tasks
from examples.benchmarks.language.build_data import OVERLAP, choose, overlap, words
from peft_linear.errors import PeftLinearError


HAS_REASONING_GYM = importlib.util.find_spec("reasoning_gym") is not None
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name in tasks.GENERATED and not HAS_REASONING_GYM, reason="needs reasoning-gym: pip install -e '.[llm]'"
        ),
    )
    for name in (*tasks.TUNING, *tasks.KEPT)
]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_its_splits_and_no_example_twice(name):
    task = tasks.load_task(name)
    assert {split: len(getattr(task, split)) for split in tasks.SPLITS} == tasks.SPLITS
    everything = [*task.train, *task.validation, *task.test]
    assert len({(example.prompt, example.completion) for example in everything}) == len(everything)
    assert len({example.prompt or example.completion for example in everything}) == len(everything)
    assert all(example.completion for example in everything)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_the_same_every_time(name):
    first = tasks.load_task(name)
    tasks.load_task.cache_clear()
    assert tasks.load_task(name) is not first
    again = tasks.load_task(name)
    assert (again.train, again.validation, again.test) == (first.train, first.validation, first.test)


@pytest.mark.parametrize("name", NAMES)
def test_a_verifier_takes_the_right_answer_and_no_other(name):
    task = tasks.load_task(name)
    if task.verify is None:
        assert name in ("translation_fr", "translation_it", "code", "domain_text")
        return
    for example in task.test[:20]:
        assert task.verify(example.completion, example)
        assert not task.verify("nothing of the kind", example)


@pytest.mark.parametrize("name", ["translation_fr", "translation_it", "domain_text", "spam", "code"])
def test_shipped_texts_of_two_splits_are_never_alike(name):
    task = tasks.load_task(name)
    text = {
        split: [words(strip_frame(example.prompt) or example.completion) for example in getattr(task, split)]
        for split in ("train", "test")
    }
    assert max(overlap(one, other) for one in text["test"] for other in text["train"]) < OVERLAP + 0.15


def strip_frame(prompt):
    """The prompt without the words that all prompts of its task share."""
    return prompt.removeprefix("Translate into French:").removeprefix("Translate into Italian:")


def test_the_same_words_in_another_order_are_one_question():
    one = tasks.question_key("word_sorting", "Sort in ascending ASCII order: b, a, c")
    assert one == tasks.question_key("word_sorting", "Sort in descending ASCII order: c, b, a")


def test_the_builder_takes_one_row_a_group_and_none_like_another():
    rows = [(f"g{i // 2}", f"a{i} b{i} c{i}", "p", str(i)) for i in range(1400)]
    rows.append(("other", "a0 b0 c0", "p", "copy of the first"))
    chosen = choose(rows, seed=0)
    assert [row["split"] for row in chosen] == ["train"] * 480 + ["validation"] * 64 + ["test"] * 128
    groups = [int(row["completion"]) // 2 for row in chosen if row["completion"].isdigit()]
    assert len(groups) == len(set(groups))
    with pytest.raises(SystemExit, match="only 50 of 672 rows"):
        choose(rows[:100], seed=0)


def test_an_unknown_task_is_refused():
    with pytest.raises(PeftLinearError, match="no task 'poetry'"):
        tasks.load_task("poetry")
