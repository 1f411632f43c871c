# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from peft_linear.cli.data import batches_of, collator, load_text_data, sample_rows, tokenize
from peft_linear.errors import FileError, PeftLinearError
from tests.helpers.tiny import tiny_tokenizer


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


ROWS = [{"text": f"words {i}", "label": "abc"[i % 3]} for i in range(9)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_the_same_rows_from_every_kind_of_file(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    texts = ["plain", 'quotes "and, commas"', "two\nlines", "line\u2028separator", "tab\tinside"]
    rows = [{"text": text, "label": str(i % 2)} for i, text in enumerate(texts)]
    if suffix == ".jsonl":
        write(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    data = load_text_data(path)
    assert [row["text"] for row in data.rows()] == texts
    assert [data.label_of(row) for row in data.rows()] == [0, 1, 0, 1, 0]
    assert data.label_names == ("0", "1") and data.num_labels == 2


def test_a_folder_of_splits_with_label_names(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "x", "label": 1}])
    write(tmp_path / "dev.jsonl", [{"text": "y", "label": 0}])
    (tmp_path / "test.csv").write_text("text,label\nz,1\n")
    (tmp_path / "labels.json").write_text('{"labels": ["no", "yes", "maybe"]}')
    data = load_text_data(tmp_path)
    assert {split: data.rows(split)[0]["text"] for split in data.splits} == {
        "train": "x",
        "validation": "y",
        "test": "z",
    }
    assert data.label_names == ("no", "yes", "maybe")
    assert data.label_of({"label": "yes"}) == data.label_of({"label": 1}) == data.label_of({"label": "1"}) == 1
    with pytest.raises(FileError, match="has no split 'other'; there are: train, validation, test"):
        data.rows("other")


def test_a_saved_dataset(tmp_path):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}, features=features)
    DatasetDict({"train": rows, "validation_matched": rows}).save_to_disk(str(tmp_path / "dict"))
    rows.save_to_disk(str(tmp_path / "one"))
    for name, splits in (("dict", ["train", "validation"]), ("one", ["train"])):
        data = load_text_data(tmp_path / name)
        assert list(data.splits) == splits
        assert (data.text_columns, data.label_names) == (("sentence",), ("neg", "pos"))


def test_hub_names_are_tried_as_dataset_and_as_configuration(monkeypatch):
    asked = []
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"sentence": ["a"], "label": [1]}, features=features)

    def load_dataset(*names):
        asked.append(names)
        if names == ("glue", "sst2"):
            return DatasetDict({"train": rows})
        raise ConnectionError("cannot reach the Hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_text_data("glue/sst2").label_names == ("neg", "pos")
    assert asked == [("glue/sst2",), ("glue", "sst2")]
    with pytest.raises(FileError, match=r"'owner/name' is neither .*ConnectionError: cannot reach the Hub"):
        load_text_data("owner/name")


def test_columns_are_found(tmp_path):
    def columns(**row):
        return load_text_data(write(tmp_path / "x.jsonl", [row])).text_columns

    assert columns(text="a", text_pair="b", label=0) == ("text", "text_pair")
    assert columns(idx=3, premise="a", hypothesis="b", label=0) == ("premise", "hypothesis")
    assert columns(text="a", section="b", label=0) == ("text",)
    assert columns(utterance="a", label=0) == ("utterance",)
    assert columns(utterance="a", label="x") == ("utterance",)
    given = load_text_data(tmp_path / "x.jsonl", text_columns=["utterance"], label_column="label")
    assert given.text_columns == ("utterance",)
    assert load_text_data(write(tmp_path / "y.jsonl", [{"a": "x", "b": 1}]), label_column="b").label_column == "b"


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ({"one": "a", "two": "b", "label": 0}, {}, "which columns hold the text"),
        ({"text": "a"}, {}, "has no label column of label, labels"),
        (
            {"text": "a", "label": 0},
            {"label_column": "topic"},
            "has no label column 'topic'; its columns are text, label",
        ),
        ({"text": "a", "label": 0}, {"text_columns": ["body"]}, "no column body; its columns are text, label"),
        ({"text": "a", "label": 0}, {"text_columns": ["text"] * 3}, "at most 2 text columns, got 3"),
    ],
)
def test_columns_that_are_not_there(tmp_path, row, arguments, message):
    with pytest.raises(FileError, match=message):
        load_text_data(write(tmp_path / "x.jsonl", [row]), **arguments)


def test_labels_of_all_kinds(tmp_path):
    def load(values):
        return load_text_data(write(tmp_path / "x.jsonl", [{"text": "t", "label": v} for v in values]))

    words = load(["b", "a", "b"])
    assert words.label_names == ("a", "b") and [words.label_of(r) for r in words.rows()] == [1, 0, 1]
    assert load([True, False]).label_names == ("0", "1")
    assert load([0, 2]).label_names == ("0", "1", "2")
    assert load([1.0, 0.0]).label_names == ("0", "1")
    numbers = load([0.5, 2])
    assert numbers.label_names is None and numbers.num_labels == 1
    assert [numbers.label_of(r) for r in numbers.rows()] == [0.5, 2.0]
    hidden = load([0, 1, -1, None])
    with pytest.raises(FileError, match="label -1 is none of the 2 classes"):
        hidden.label_of(hidden.rows()[2])
    with pytest.raises(FileError, match="a row has no 'label'"):
        hidden.label_of(hidden.rows()[3])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "a", r"cannot read x.txt: datasets are .jsonl"),
        ("x.jsonl", '{"text": 1}\n{"tex', r"x.jsonl, line 2 is not valid JSON"),
        ("x.json", "[1, 2]", "must hold JSON objects"),
        ("x.jsonl", "", "has no rows"),
        ("x.csv", "text,label\n", "has no rows"),
        ("x.jsonl", b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=message):
        load_text_data(path)


def test_sources_that_are_none(tmp_path):
    for missing in ("./nothing", "nothing.csv", str(tmp_path / "nothing")):
        with pytest.raises(FileError, match="there is no file or folder"):
            load_text_data(missing)
    with pytest.raises(FileError, match=r"has no train.jsonl, train.csv or the like"):
        load_text_data(tmp_path)
    with pytest.raises(PeftLinearError, match="unknown task 'x'; there are: auto, classification, causal-lm"):
        load_text_data(tmp_path, task="x")


def test_samples_keep_the_shares_of_the_classes(tmp_path):
    rows = [{"text": str(i), "label": 0 if i % 10 else 1} for i in range(100)]
    data = load_text_data(write(tmp_path / "x.jsonl", rows))
    for seed in range(5):
        sample = sample_rows(data, 20, seed=seed)
        assert len({row["text"] for row in sample}) == 20
        assert sum(row["label"] for row in sample) in (2, 3)
    assert sample_rows(data, 20, seed=1) == sample_rows(data, 20, seed=1) != sample_rows(data, 20, seed=2)
    assert len(sample_rows(data, 1000)) == 100
    with pytest.raises(PeftLinearError, match="the number of examples must be at least 1, got 0"):
        sample_rows(data, 0)


def test_batches_for_a_classifier(tmp_path):
    data = load_text_data(write(tmp_path / "x.jsonl", ROWS))
    tokenizer = tiny_tokenizer()
    features = tokenize(data, data.rows(), tokenizer, max_length=3)
    assert all(len(feature["input_ids"]) <= 3 for feature in features)
    batches = batches_of(features, collator(data, tokenizer), 4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 1]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [i % 3 for i in range(9)]
    with pytest.raises(PeftLinearError, match="batch_size must be at least 1, got 0"):
        batches_of(features, None, 0)


def test_batches_of_pairs(tmp_path):
    tokenizer = tiny_tokenizer()
    pairs = load_text_data(write(tmp_path / "y.jsonl", [{"text": "1", "text_pair": "2", "label": 0}]))
    (pair,) = tokenize(pairs, pairs.rows(), tokenizer)
    assert len(pair["input_ids"]) == 2
    bad = load_text_data(write(tmp_path / "z.jsonl", [{"text": "1", "label": 0}, {"text": 2, "label": 0}]))
    with pytest.raises(FileError, match="text must be text in"):
        tokenize(bad, bad.rows(), tokenizer)
