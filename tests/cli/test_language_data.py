# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Language data on the command line: the task is inferred, and the loss that is scored is the one that TRL trains."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict

from peft_linear import ModuleKernels, Recommendation, compute_ntk, language_batches
from peft_linear.cli.data import load_text_data
from peft_linear.cli.main import main
from peft_linear.errors import FileError
from tests.helpers.language import FORMATS, chat_tokenizer, language_model, rows_in, sft_arguments, turn
from tests.helpers.tiny import save_model


pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")

GIVEN = {"budget": 3, "rank": 2, "draws": 1, "device": "cpu", "batch_size": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    language_model().save_pretrained(folder / "llama")
    chat_tokenizer().save_pretrained(folder / "llama")
    language_model().save_pretrained(folder / "base")
    chat_tokenizer(None).save_pretrained(folder / "base")
    save_model(folder / "bert")
    return folder


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("peft_linear.report.writer.matplotlib_available", lambda: False)


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def run(place, data, out, *flags, model="llama", **changes):
    given = {"model": place / model, "dataset": data, "output": out, **GIVEN, **changes}
    flat = [
        p for k, v in given.items() for p in (f"--{k.replace('_', '-')}", *map(str, v if type(v) is list else [v]))
    ]
    return main(["recommend", *flat, *flags, "--quiet"])


def error(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-linear")]
    return line


def assert_scored(out, batches, **options):
    """The kernels that were written are those of these batches."""
    expected = compute_ntk(language_model(), batches, outputs="log_likelihood", rank=2, draws=1, progress=False)
    found = ModuleKernels.load(out / "kernels.safetensors")
    assert found.names == expected.names
    torch.testing.assert_close(found.outputs, expected.outputs)
    for name in found.names:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_in_every_format_has_trls_loss(kind, place, tmp_path):
    out = tmp_path / "out"
    assert run(place, jsonl(tmp_path / "rows.jsonl", rows_in(kind)), out) == 0
    assert_scored(out, language_batches(rows_in(kind), chat_tokenizer(), {"per_device_train_batch_size": 5}))
    assert Recommendation.load(out).settings.output_kind == "log_likelihood"
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_dataset_of_the_hub(kind, place, tmp_path, monkeypatch):
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return DatasetDict(train=Dataset.from_list([{"id": i, **row} for i, row in enumerate(rows_in(kind))]))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert run(place, "owner/chats", tmp_path / "out") == 0 and asked == [("owner/chats",)]
    assert_scored(
        tmp_path / "out", language_batches(rows_in(kind), chat_tokenizer(), {"per_device_train_batch_size": 5})
    )


def test_settings_of_trl(place, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", rows_in("messages"))
    assert run(place, path, tmp_path / "out", "--assistant-only-loss", max_length=12) == 0
    settings = {"assistant_only_loss": True, "max_length": 12}
    assert_scored(tmp_path / "out", language_batches(rows_in("messages"), chat_tokenizer(), settings, batch_size=5))


def test_named_columns_are_scored_as_trl_trains_them_or_refused(place, tmp_path, capsys):
    rows = [{**row, "text": "w1", "messages": [turn("user", "w2")]} for row in rows_in("plain")]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    assert run(place, path, tmp_path / "pair", text_column=["prompt", "completion"], task="causal-lm") == 0
    assert_scored(tmp_path / "pair", language_batches(rows_in("plain"), chat_tokenizer(), batch_size=5))
    other = jsonl(tmp_path / "other.jsonl", [{"body": row["text"], "note": "w1"} for row in rows_in("text")])
    assert run(place, other, tmp_path / "body", text_column=["body"]) == 0
    settings = {"dataset_text_field": "body"}
    bodies = [{"body": row["text"]} for row in rows_in("text")]
    assert_scored(tmp_path / "body", language_batches(bodies, chat_tokenizer(), settings, batch_size=5))
    assert run(place, other, tmp_path / "no", text_column=["body", "note"], task="causal-lm") == 2
    assert "the columns body, note are in none of the formats" in error(capsys) and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"body": "a", "id": 1}],
            {},
            "has no label column of label, labels, class, target, category, and is in none",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {"task": "causal-lm"}, "are preferences"),
        (rows_in("plain"), {"text_column": ["prompt", "answer"]}, "has no column answer; its columns are prompt"),
        ([{"prompt": "w1", "completion": ""}], {}, "row 0 has an empty completion"),
        (rows_in("turns"), {"max_length": 4}, "no label token is left in any of the examples: with max_length=4"),
        (rows_in("messages"), {"model": "base"}, "the tokenizer has no chat template"),
        (rows_in("messages"), {"model": "bert"}, "is no causal language model"),
        (rows_in("messages"), {"split": "test"}, "has no split 'test'"),
        (rows_in("messages"), {"examples": 0}, "examples must be at least 1, got 0"),
        (rows_in("messages"), {"max_memory": "much"}, "much"),
    ],
)
def test_mistakes(rows, changes, message, place, tmp_path, capsys):
    assert run(place, jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", **changes) == 2
    assert message in error(capsys) and not (tmp_path / "out").exists()


def test_without_trl_there_is_an_error_before_the_model_is_loaded(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    monkeypatch.setattr("peft_linear.cli.recommend.load_model", None)
    assert run(place, jsonl(tmp_path / "rows.jsonl", rows_in("text")), tmp_path / "out") == 2
    assert "pip install 'peft-linear[trl]'" in error(capsys)


def test_dtype_and_memory(place, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", rows_in("plain"))
    assert run(place, path, tmp_path / "half", dtype="bfloat16") == 0
    assert run(place, path, tmp_path / "less", max_memory="100KB") == 0
    assert run(place, path, tmp_path / "full") == 0
    half, less, full = (
        ModuleKernels.load(tmp_path / name / "kernels.safetensors") for name in ("half", "less", "full")
    )
    name = full.names[0]
    assert not torch.equal(half[name], full[name]) and torch.allclose(half[name], full[name], rtol=0.2, atol=1.0)
    assert torch.allclose(less[name], full[name])


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"text": "a"}, "causal-lm"),
        ({"text": "a", "label": 1}, "classification"),
        ({"sentence": "a", "label": 1}, "classification"),
        *[(rows_in(kind, 1)[0], "causal-lm") for kind in FORMATS],
    ],
)
def test_the_task_is_inferred(row, task, tmp_path):
    data = load_text_data(jsonl(tmp_path / "x.jsonl", [row, row]), "auto")
    assert data.task == task and (data.label_column is None) == (task == "causal-lm")


def test_a_task_that_is_given_is_taken(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": 1, "content": "b"}])
    assert load_text_data(path, "causal-lm").text_columns == ("text",)
    path = jsonl(tmp_path / "y.jsonl", [{"content": "b"}])
    assert load_text_data(path, "causal-lm").text_columns == ("content",)
    with pytest.raises(FileError, match="A pair of texts is for a classifier: rename its columns to prompt"):
        load_text_data(jsonl(tmp_path / "z.jsonl", [{"premise": "a", "hypothesis": "b"}]), "causal-lm")


def test_help_names_the_columns(capsys):
    with pytest.raises(SystemExit):
        main(["recommend", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for column in ("messages", "prompt and completion", "instruction, input and output", "conversations", "text;"):
        assert column in text
    for flag in ("--dtype", "--max-memory", "--assistant-only-loss"):
        assert flag in text


def test_arguments_of_sft_are_made_once(tmp_path):
    """A dict of settings gives what an SFTConfig with them gives."""
    one = language_batches(rows_in("plain"), chat_tokenizer(), {"max_length": 9, "per_device_train_batch_size": 5})
    other = language_batches(rows_in("plain"), chat_tokenizer(), sft_arguments(tmp_path, max_length=9))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(one, other, strict=True))
