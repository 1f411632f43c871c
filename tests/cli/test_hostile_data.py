# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Data that cannot be what the command needs: one error line, exit code 2, nothing written."""

import json

import pytest
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from peft_linear.cli.data import load_text_data, tokenize
from peft_linear.cli.main import main
from peft_linear.cli.models import load_model
from peft_linear.cli.recommend import parse_budget_argument
from peft_linear.errors import BudgetError, FileError, PeftLinearError
from tests.helpers.tiny import WORDS, save_data, save_model, tiny_tokenizer


def labelled(values):
    return [{"text": "a1 b2", "label": value} for value in values]


def jsonl(rows):
    return "\n".join(json.dumps(row) for row in rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    save_model(folder / "bert")
    save_model(folder / "gpt2", causal=True)
    save_data(folder / "data.jsonl")
    return folder


def run(place, data, tmp_path, capsys, **changes):
    given = {"model": place / "bert", "dataset": data, "budget": 2, "device": "cpu", "output": tmp_path / "out"}
    flat = [part for key, value in {**given, **changes}.items() for part in (f"--{key}", str(value))]
    code = main(["recommend", *flat, "--quiet"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-linear recommend: error")]
    assert not (tmp_path / "out").exists()
    return code, lines


CHAT = [{"messages": [{"role": "user", "content": "a1"}]}]
DEEP = '{"text": ' + "[" * 100_000
FILES = {
    "id column": (
        "x.jsonl",
        jsonl(labelled([10**7, 3, 10**7])),
        "2 distinct values in 3 rows and numbers up to 10000000",
    ),
    "an id a row": ("x.jsonl", jsonl(labelled(range(40))), "40 distinct values in 40 rows"),
    "a text a row": ("x.jsonl", jsonl(labelled([f"w{i}" for i in range(40)])), "ids or texts, not up to 1000 classes"),
    "several labels": ("x.jsonl", jsonl(labelled([[0, 2], [1]])), "holds list values, such as [0, 2]: several labels"),
    "an object as label": ("x.jsonl", jsonl(labelled([{"a": 1}])), "holds dict values"),
    "two minus signs": ("x.jsonl", jsonl(labelled(["0", "1", "--5"])), None),
    "a raised two": ("x.jsonl", jsonl(labelled(["0", "1", "²"])), None),
    "a long number": ("x.jsonl", jsonl(labelled(["0", "1", "9" * 5000])), None),
    "infinite": ("x.jsonl", '{"text": "a", "label": 0.5}\n{"text": "a", "label": Infinity}', None),
    "deep JSON": ("x.jsonl", DEEP, "x.jsonl, line 1 is not valid JSON: lists or objects are nested too deeply"),
    "deep JSON array": ("x.json", "[" * 100_000, "nested too deeply; a row is one flat object"),
    "a long CSV field": (
        "x.csv",
        'text,label\n"' + "a" * 200_000 + '",0\n',
        "line 2 cannot be read as CSV: field larger",
    ),
    "more fields": ("x.csv", "text,label\na, b,0\n", "line 2 has more fields than the header names"),
    "messages": (
        "x.jsonl",
        jsonl([{**row, "label": 0} for row in CHAT]),
        "holds chats (messages) and labels (label); pass --task",
    ),
    "prompts": (
        "x.jsonl",
        jsonl([{"prompt": "a", "completion": "b", "label": 0}]),
        "holds chats (prompt, completion) and labels (label); pass --task",
    ),
}


@pytest.mark.parametrize("case", [case for case, (_, _, message) in FILES.items() if message])
def test_data_of_another_kind_are_one_line_and_leave_nothing(case, place, tmp_path, capsys):
    name, content, message = FILES[case]
    (tmp_path / name).write_text(content, encoding="utf-8")
    code, lines = run(place, tmp_path / name, tmp_path, capsys)
    assert code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("case", ["two minus signs", "a raised two", "a long number"])
def test_labels_that_only_look_like_numbers_are_words(case, tmp_path):
    name, content, _ = FILES[case]
    (tmp_path / name).write_text(content, encoding="utf-8")
    data = load_text_data(tmp_path / name)
    assert data.num_labels == 3 and sorted(data.label_of(row) for row in data.rows()) == [0, 1, 2]


def test_a_target_that_is_not_finite_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 0.5}\n{"text": "a", "label": 1.5}', encoding="utf-8")
    data = load_text_data(tmp_path / "x.jsonl")
    with pytest.raises(FileError, match="label inf is no finite number in .*; fix the row"):
        data.label_of({"text": "a", "label": float("inf")})


def test_chats_are_not_classified(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(jsonl([{**CHAT[0], "label": 1}]), encoding="utf-8")
    for columns in (None, ["messages"]):
        with pytest.raises(FileError, match="holds chats .messages., which are not classified; pass --task causal-lm"):
            load_text_data(path, "classification", text_columns=columns)


@pytest.mark.parametrize("content", ["[1]", '{"labels": 3}', "{"])
def test_label_names_that_are_none(content, tmp_path):
    (tmp_path / "train.jsonl").write_text(jsonl(labelled([0, 1])), encoding="utf-8")
    (tmp_path / "labels.json").write_text(content, encoding="utf-8")
    with pytest.raises(FileError, match=r"labels.json (must hold|is not valid JSON)"):
        load_text_data(tmp_path)


def test_text_that_the_tokenizer_cannot_read(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud800", "label": 0}', encoding="utf-8")
    data = load_text_data(tmp_path / "x.jsonl")
    with pytest.raises(FileError, match="the tokenizer cannot read"):
        tokenize(data, data.rows(), tiny_tokenizer())


def test_an_encoder_is_no_causal_language_model(place, tmp_path, capsys):
    code, lines = run(place, place / "data.jsonl", tmp_path, capsys, task="causal-lm")
    assert code == 2 and "BertLMHeadModel of" in lines[0] and "is no causal language model" in lines[0]


def test_models_that_see_only_earlier_tokens_are_taken(place, tmp_path):
    assert isinstance(
        load_model(str(place / "gpt2"), "causal-lm")[0], AutoModelForCausalLM.from_pretrained(place / "gpt2").__class__
    )
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        is_decoder=True,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "decoder")
    tiny_tokenizer().save_pretrained(tmp_path / "decoder")
    assert load_model(str(tmp_path / "decoder"), "causal-lm")[0].config.is_decoder
    with pytest.raises(PeftLinearError, match="depend on later tokens, which it is to predict; pass a model such as"):
        load_model(str(place / "bert"), "causal-lm")


@pytest.mark.parametrize("text", ["--5", "²", "9" * 5000, "1²", "٣%"])
def test_budgets_that_only_look_like_numbers(text):
    with pytest.raises(BudgetError, match="cannot read the budget"):
        parse_budget_argument(text)


def test_several_labels_are_refused_also_where_classes_have_names(tmp_path):
    (tmp_path / "train.jsonl").write_text(jsonl(labelled([[0, 1], [1]])), encoding="utf-8")
    (tmp_path / "labels.json").write_text('{"labels": ["a", "b"]}', encoding="utf-8")
    with pytest.raises(FileError, match="several labels an example, which the command line does not read"):
        load_text_data(tmp_path)
