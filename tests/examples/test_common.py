# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Loading of models and data sets by the examples: the shipped sets, and the code path of the Hub with local files."""

import json

import datasets
import pytest
import torch


@pytest.fixture(scope="module")
def common(load_script):
    return load_script("common.py")


@pytest.fixture(scope="module")
def task(common):
    return common.load_task(limits=(40, 8, 8))


def test_default_task_is_the_shipped_set(task):
    assert (len(task.train), len(task.validation), len(task.test)) == (40, 8, 8)
    assert task.labels == ("admin", "devel", "games", "graphics", "net", "science", "sound", "text")
    assert set(task.train.column_names) >= {"input_ids", "attention_mask", "labels"}
    assert "text" not in task.train.column_names


def test_batches_are_padded_drawn_by_seed_and_complete(task):
    batches = task.batches("train", 20, batch_size=8, seed=1)
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 4]
    assert all(batch["input_ids"].shape == batch["attention_mask"].shape for batch in batches)
    again, other = task.batches("train", 20, 8, seed=1), task.batches("train", 20, 8, seed=2)
    assert torch.equal(batches[0]["input_ids"], again[0]["input_ids"])
    assert not torch.equal(batches[0]["labels"], other[0]["labels"])
    assert sum(len(batch["labels"]) for batch in task.batches("test")) == 8


def test_a_new_model_depends_on_the_seed_in_its_head_only(task):
    one, two, again = (task.new_model(seed).state_dict() for seed in (0, 1, 0))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert [name for name in one if not torch.equal(one[name], two[name])] == ["classifier.weight"]
    assert one["classifier.weight"].shape[0] == 8


def test_pairs_have_two_texts(common):
    task = common.load_task(dataset_name="debian_pairs", limits=(8, 8, 8))
    assert task.labels == ("different section", "same section")
    separators = [ids.count(task.tokenizer.sep_token_id) for ids in task.train["input_ids"]]
    assert separators == [2] * 8


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder of files that `datasets.load_dataset` reads, in the place of a data set of the Hub: like GLUE's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    for split, count in (("train", 50), ("validation", 10), ("test", 12)):
        rows = [
            {"sentence": f"{split} text {i}", "label": -1 if split == "test" else i % 2, "idx": i}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_the_path_of_hub_data_sets(common, stand_in):
    task = common.load_task(dataset_name=str(stand_in))
    # Test labels are hidden (-1), as in GLUE: validation is tested on, and a part of train takes its place.
    assert (len(task.train), len(task.validation), len(task.test)) == (45, 5, 10)
    assert task.labels == ("0", "1")
    assert "validation text" in task.tokenizer.decode(task.test[0]["input_ids"])
    assert task.new_model(0).config.num_labels == 2


def test_names_of_the_hub_are_split_into_path_and_configuration(common, monkeypatch):
    asked = []

    def load_dataset(*names):
        asked.append(names)
        if names == ("glue/mrpc",):
            raise datasets.exceptions.DatasetNotFoundError("there is no owner of this name")
        rows = datasets.Dataset.from_dict({"sentence1": ["a"] * 20, "sentence2": ["b"] * 20, "label": [0, 1] * 10})
        return datasets.DatasetDict({"train": rows})

    monkeypatch.setattr(common.datasets, "load_dataset", load_dataset)
    for name in ("imdb", "glue/mrpc", "owner/set", "owner/set/config"):
        splits = common.load_texts(name)
        assert common.text_columns(splits["train"]) == ["sentence1", "sentence2"]
        assert sum(len(rows) for rows in splits.values()) == 20 and min(len(rows) for rows in splits.values()) > 0
    assert asked == [("imdb",), ("glue/mrpc",), ("glue", "mrpc"), ("owner/set",), ("owner/set", "config")]


def test_columns_that_cannot_be_told_are_refused(common):
    rows = datasets.Dataset.from_dict({"title": ["a"], "label": [0]})
    with pytest.raises(SystemExit, match="cannot tell which of the columns"):
        common.text_columns(rows)
