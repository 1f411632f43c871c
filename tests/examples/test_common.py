# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Loading of models and data sets by the examples: the shipped sets, and the code path of the Hub with local files."""

import json

import datasets
import pytest
import torch

from examples.common import tasks as common


@pytest.fixture(scope="module")
def task():
    return common.load_task(limits=(40, 8, 8))


def test_default_task_is_the_shipped_set(task):
    assert (len(task.train), len(task.validation), len(task.test)) == (40, 8, 8)
    assert task.labels == ("admin", "devel", "games", "graphics", "net", "science", "sound", "text")
    assert set(task.train[0]) >= {"input_ids", "attention_mask", "labels"} and "text" not in task.train[0]
    texts = [row["text"].lower() for row in task.data.rows("test")]
    decoded = [task.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in task.test]
    assert ["".join(text.split()) for text in texts] == ["".join(text.split()) for text in decoded]


def test_calibration_batches_are_padded_drawn_by_seed_and_complete(task):
    batches = task.calibration(20, batch_size=8, seed=1)
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 4]
    assert all(batch["input_ids"].shape == batch["attention_mask"].shape for batch in batches)
    again, other = task.calibration(20, 8, seed=1), task.calibration(20, 8, seed=2)
    assert torch.equal(batches[0]["input_ids"], again[0]["input_ids"])
    assert not torch.equal(batches[0]["labels"], other[0]["labels"])


def test_a_new_model_depends_on_the_seed_in_its_head_only(task):
    one, two, again = (task.new_model(seed).state_dict() for seed in (0, 1, 0))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert [name for name in one if not torch.equal(one[name], two[name])] == ["classifier.weight"]
    assert one["classifier.weight"].shape[0] == 8


def test_pairs_have_two_texts():
    task = common.load_task(dataset_name="debian_pairs", limits=(8, 8, 8))
    assert task.labels == ("different section", "same section")
    separators = [ids.count(task.tokenizer.sep_token_id) for ids in (row["input_ids"] for row in task.train)]
    assert separators == [2] * 8


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`datasets.load_dataset` itself, but the name owner/set is a folder here; the rows are like GLUE's."""
    folder = tmp_path / "set"
    folder.mkdir(parents=True)
    for split, count in (("train", 50), ("validation", 10), ("test", 12)):
        rows = [
            {"sentence": f"{split} text {i}", "label": -1 if split == "test" else i % 2, "idx": i}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    load_dataset = datasets.load_dataset

    def load(name, *rest):
        assert name == "owner/set"
        return load_dataset(str(folder), *rest, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_the_path_of_hub_data_sets(hub):
    task = common.load_task(dataset_name="owner/set")
    # Test labels are hidden (-1), as in GLUE: validation is tested on, and a part of train takes its place.
    assert (len(task.train), len(task.validation), len(task.test)) == (45, 5, 10)
    assert task.labels == ("0", "1")
    assert "validation text" in task.tokenizer.decode(task.test[0]["input_ids"])
    assert task.new_model(0).config.num_labels == 2


def test_a_set_without_other_splits_is_cut_in_three(tmp_path):
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(50)), encoding="utf-8")
    task = common.load_task(dataset_name=str(file))
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 10)
    ids = {tuple(row["input_ids"]) for rows in (task.train, task.validation, task.test) for row in rows}
    assert len(ids) == 50


def test_numbers_that_are_no_classes_are_refused(tmp_path):
    file = tmp_path / "scores.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"text {i}", "label": i / 7}) for i in range(20)), encoding="utf-8")
    with pytest.raises(SystemExit, match="the examples classify, but the labels are no classes"):
        common.load_task(dataset_name=str(file))
