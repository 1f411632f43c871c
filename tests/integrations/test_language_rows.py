# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which format rows are in, what TRL is given in their place, and rows that are refused."""

import pytest

from peft_linear.errors import PeftLinearError
from peft_linear.integrations.language_rows import FORMATS, find_format, to_trl_rows
from tests.helpers.language import TRL_KIND, rows_in, turn


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("text", "text"),
        ("plain", "prompt-completion"),
        ("turns", "prompt-completion"),
        ("messages", "messages"),
        ("alpaca", "alpaca"),
        ("sharegpt", "sharegpt"),
    ],
)
def test_formats_are_found_and_become_what_trl_takes(kind, name):
    rows = rows_in(kind)
    assert find_format(rows[0]) == name and name in FORMATS
    assert to_trl_rows(rows) == rows_in(TRL_KIND.get(kind, kind))


def test_other_columns_decide_nothing():
    row = {"id": 3, "text": "a", "messages": [turn("user", "b")], "label": 1}
    assert to_trl_rows([row]) == [{"messages": [turn("user", "b")]}]
    assert find_format({"body": "a"}, text_column="body") == "text" and find_format({"body": "a"}) is None
    assert find_format({"input_ids": [1], "text": "a"}) == "prepared"
    with_tools = {"messages": [turn("user", "b")], "tools": "[]", "source": "x"}
    assert to_trl_rows([with_tools]) == [{"messages": [turn("user", "b")], "tools": "[]"}]


def test_everything_an_alpaca_row_may_hold():
    row = {
        "instruction": "do",
        "input": "this",
        "output": "done",
        "system": "be kind",
        "history": [["before", "then"]],
    }
    (chat,) = to_trl_rows([row])
    assert chat == {
        "prompt": [
            turn("system", "be kind"),
            turn("user", "before"),
            turn("assistant", "then"),
            turn("user", "do\nthis"),
        ],
        "completion": [turn("assistant", "done")],
    }
    (text,) = to_trl_rows([{"instruction": "do", "input": None, "output": "done"}], chat_template=False)
    assert text["prompt"].endswith("### Instruction:\ndo\n\n### Response:\n") and "### Input" not in text["prompt"]
    (text,) = to_trl_rows([{"instruction": "do", "input": "this", "output": "done"}], chat_template=False)
    assert "### Input:\nthis\n\n### Response:\n" in text["prompt"] and text["completion"] == "done"
    with pytest.raises(PeftLinearError, match="row 0 has history or system, which need a chat template"):
        to_trl_rows([row], chat_template=False)


def test_roles_of_sharegpt_and_its_keys_elsewhere():
    said = [{"from": "System", "value": "a"}, {"from": "HUMAN", "value": "b"}, {"from": "gpt", "value": "c"}]
    expected = [turn("system", "a"), turn("user", "b"), turn("assistant", "c")]
    assert to_trl_rows([{"conversations": said}, {"conversations": expected}]) == [{"messages": expected}] * 2
    assert to_trl_rows([{"messages": said}]) == [{"messages": expected}]
    assert to_trl_rows([{"conversations": said[1:], "system": "a"}]) == [{"messages": expected}]


GOOD = turn("user", "a")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the dataset has no rows"),
        ([{"body": "a", "id": 1}], "the columns body, id are in none of the five formats: messages: a list of"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "are preferences, and supervised data are taken"),
        ([{"prompt": "a"}], "the columns prompt are in none of the five formats"),
        ([{"messages": [GOOD], "images": []}], "the columns messages, images hold images"),
        ([{"messages": [GOOD]}, {"messages": None}], "row 1 has the columns messages, or values in them"),
        ([{"text": "a"}, {"text": 3}], r"row 1 has the columns text, .* format of row 0 \(text: one text\)"),
        ([{"messages": [GOOD]}, {"messages": []}], "row 1 has no messages"),
        ([{"messages": ["a"]}], "row 0 has the message 'a', which is neither {role, content} nor {from, value}"),
        ([{"messages": [{"role": "user", "content": None}]}], "row 0 has a message of 'user' without content"),
        ([{"conversations": [{"from": "narrator", "value": "a"}]}], "a message from 'narrator'; known are: human"),
        ([{"prompt": "a", "completion": [GOOD]}], "row 0 has a str as prompt and a list as completion"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}], "row 1 has an empty completion"),
        ([{"prompt": [GOOD], "completion": []}], "row 0 has an empty completion"),
        ([{"prompt": [GOOD], "completion": [turn("assistant", "")]}], "row 0 has an empty completion"),
        ([{"instruction": "a", "input": "", "output": ""}], "row 0 has an empty output"),
        ([{"instruction": None, "output": "a"}], "row 0 has an instruction or input that is no text"),
    ],
)
def test_rows_that_are_refused(rows, message):
    with pytest.raises(PeftLinearError, match=message):
        to_trl_rows(rows)
