# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The data sets of the paper's experiments: from the Hub, from what `save_to_disk` wrote, from files."""

import json

import datasets
import pytest

from examples.paper import tasks
from tests.helpers.paper_data import GLUE_COLUMNS, HUB, as_on_the_hub, words


@pytest.mark.parametrize("name", list(HUB))
@pytest.mark.parametrize("way", ["hub", "disk"])
def test_data_sets_of_the_paper_are_loaded(tiny, name, way, tmp_path, monkeypatch):
    stored = as_on_the_hub(name)

    def load(*asked):
        if asked != HUB[name]:
            raise FileNotFoundError(f"there is no {asked}")
        return stored

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = None
    if way == "disk":
        stored.save_to_disk(tmp_path / name)
        monkeypatch.setattr(datasets, "load_dataset", None)
        data = str(tmp_path / name)
    task = tasks.load_paper_task(tiny, name, data, max_length=12)
    # Where test labels are hidden, validation is tested on; a fifth or tenth of train stands in for what is missing.
    assert len(task.test) == 20 and len(task.train) + len(task.validation) == 60
    tested = task.data.rows("test")
    assert {row[task.data.text_columns[0]].split()[0] for row in tested} == {
        {"mnli": "matched"}.get(name, "validation" if name in GLUE_COLUMNS else "test")
    }
    assert task.data.text_columns == (GLUE_COLUMNS[name][0] if name in GLUE_COLUMNS else ("text",))
    labels, names = stored["train"]["label"], stored["train"].features["label"].names
    if name == "yelp":
        labels, names = [int(label == 4) for label in labels], ["fewer stars", "five stars"]
    assert list(task.labels) == names
    right = dict(zip(stored["train"][task.data.text_columns[0]], labels, strict=True))
    assert len(right) == 60
    for features, row in zip(task.train, task.data.rows("train"), strict=True):
        assert features["labels"] == row["label"] == right[row[task.data.text_columns[0]]]
    assert {features["labels"] for features in task.train} == set(range(len(task.labels)))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_files_with_the_same_columns_are_taken(tiny, suffix, tmp_path):
    for split, rows in as_on_the_hub("yelp").items():
        file = tmp_path / f"{split}.{suffix}"
        rows.to_csv(str(file)) if suffix == "csv" else rows.to_json(str(file))
    task = tasks.load_paper_task(tiny, "yelp", str(tmp_path), max_length=12, limits=(30, 4, 10))
    assert (len(task.train), len(task.validation), len(task.test)) == (30, 4, 10)
    assert task.labels == ("fewer stars", "five stars") and str(tmp_path) in task.dataset_name
    batches = task.calibration(20, batch_size=20)
    share = float(batches[0]["labels"].double().mean())
    assert batches[0]["labels"].shape == (20,) and 0 < share < 0.5  # a class in five, merged


def test_wrong_data_are_refused(tiny, tmp_path):
    file = tmp_path / "train.jsonl"
    for labels, message in ((range(7), r"labels \[5, 6\] are none of \[0, 1, 2, 3, 4\]"), ([0, 1], "have the label")):
        rows = [{"text": words(i), "label": labels[i % len(labels)]} for i in range(70)]
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        with pytest.raises(SystemExit, match=message):
            tasks.load_paper_task(tiny, "yelp", str(file))


def test_two_classes_of_topics_are_unions_of_sections(tiny):
    task = tasks.load_paper_task(tiny, "topics2", max_length=8, limits=(200, 8, 40))
    sections = {0: set(), 1: set()}
    for row in task.data.rows("train"):
        sections[row["label"]].add(row["section"])
    assert sections == {0: {"admin", "devel", "net", "text"}, 1: {"games", "graphics", "science", "sound"}}
    assert [row["labels"] for row in task.test] == [row["label"] for row in task.data.rows("test")]
    assert task.new_model(0).config.num_labels == 2
