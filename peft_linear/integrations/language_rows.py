# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of supervised fine-tuning data: which of the five formats they are in, and their form as TRL takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PeftLinearError


FORMATS = {
    "messages": "messages: a list of {role, content}",
    "prompt-completion": "prompt and completion: two texts, or two lists of {role, content}",
    "text": "text: one text",
    "alpaca": "instruction and output, with or without input, system and history (Alpaca)",
    "sharegpt": "conversations: a list of {from, value} (ShareGPT)",
}
FIVE_FORMATS = "; ".join(FORMATS.values())
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"},
    **{"model": "assistant", "system": "system", "tool": "tool", "observation": "tool"},
}
PREPARED = "prepared"  # has input_ids already
KEPT = ("tools", "chat_template_kwargs")  # columns that TRL passes to the chat template

# The two texts of https://github.com/tatsu-lab/stanford_alpaca, for tokenizers without a chat template.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

Row = Mapping[str, Any]


def find_format(row: Row, text_column: str = "text") -> str | None:
    """The format of a row by its columns: a key of `FORMATS`, "prepared" (it has token ids), or None."""
    if "input_ids" in row:
        return PREPARED
    if {"chosen", "rejected", "image", "images"} & set(row):
        return None
    if "prompt" in row:  # TRL looks for it first
        return "prompt-completion" if "completion" in row else None
    if isinstance(row.get("messages"), (list, tuple)):
        return "messages"
    if isinstance(row.get("conversations"), (list, tuple)):
        return "sharegpt"
    if isinstance(row.get(text_column), str):
        return "text"
    return "alpaca" if {"instruction", "output"} <= set(row) else None


def to_trl_rows(
    rows: Sequence[Row], chat_template: bool = True, text_column: str = "text", numbers: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Rows as `SFTTrainer` takes them: ShareGPT becomes `messages`, Alpaca `prompt` and `completion`.

    ShareGPT's roles become those of chat templates (human: user, gpt: assistant), which TRL alone does not do. The
    turns of Alpaca rows are messages with a chat template (instruction and input on lines of their own), and the text
    of the Alpaca project without one.

    Args:
        rows: All in the format of the first.
        chat_template: Whether the tokenizer has one.
        text_column: Name of the column of the format `text`.
        numbers: Of the rows in their dataset, for messages of errors.

    Raises:
        PeftLinearError: columns of none of the formats, a role that is not known, a row without one of its values, or
            an empty completion.
    """
    if not len(rows):
        raise PeftLinearError("the dataset has no rows; pass at least one example")
    found = find_format(rows[0], text_column)
    if found is None:
        raise PeftLinearError(unknown_format(rows[0]))
    converted = []
    numbers = range(len(rows)) if numbers is None else numbers
    for number, row in zip(numbers, rows, strict=True):
        if found != PREPARED and find_format(row, text_column) != found:
            raise PeftLinearError(
                f"row {number} has the columns {', '.join(map(str, row))}, or values in them, that are not of the "
                f"format of row {numbers[0]} ({FORMATS[found]}); fix the row"
            )
        converted.append(_converted(row, found, number, chat_template))
    return converted


def is_chat(row: Row) -> bool:
    """Whether a row that `to_trl_rows` returned needs a chat template."""
    return any(isinstance(row.get(name), (list, tuple)) for name in ("messages", "prompt", "completion"))


def _converted(row: Row, found: str, number: int, chat_template: bool) -> dict[str, Any]:
    kept = {name: row[name] for name in KEPT if row.get(name) is not None}
    if found in ("messages", "sharegpt"):
        messages = _messages(row["messages" if found == "messages" else "conversations"], number)
        if found == "sharegpt" and row.get("system"):
            messages = [{"role": "system", "content": row["system"]}, *messages]
        return {"messages": messages, **kept}
    if found == "alpaca":
        return {**_from_alpaca(row, number, chat_template), **kept}
    if found != "prompt-completion":
        return dict(row)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        _require_text(completion, "completion", number)
        return dict(row)
    if isinstance(prompt, str) or isinstance(completion, str) or prompt is None or completion is None:
        raise PeftLinearError(
            f"row {number} has a {type(prompt).__name__} as prompt and a {type(completion).__name__} as completion; "
            "both must be texts, or both lists of {role, content}"
        )
    if not completion:
        raise PeftLinearError(f"row {number} has an empty completion, of which nothing can be learned; leave it out")
    return {"prompt": _messages(prompt, number), "completion": _messages(completion, number, "completion"), **kept}


def _messages(messages: Any, number: int, what: str = "conversation") -> list[dict[str, Any]]:
    """Messages with role and content; those of ShareGPT are renamed."""
    if not isinstance(messages, (list, tuple)) or not len(messages):
        raise PeftLinearError(f"row {number} has no messages ({messages!r:.60}); a row needs at least one")
    renamed: list[dict[str, Any]] = []
    for message in messages:
        if not isinstance(message, Mapping) or not ({"role"} <= set(message) or {"from", "value"} <= set(message)):
            raise PeftLinearError(
                f"row {number} has the message {message!r:.80}, which is neither {{role, content}} nor {{from, value}}"
            )
        message = dict(message)
        if "role" not in message:
            role = ROLES.get(str(message.pop("from")).lower())
            if role is None:
                raise PeftLinearError(
                    f"row {number} has a message from {messages[len(renamed)]['from']!r}; known are: "
                    f"{', '.join(ROLES)}. Convert the row to `messages` with the roles of your chat template"
                )
            message = {"role": role, "content": message.pop("value"), **message}
        elif not message.get("tool_calls") and message.get("content") is None:
            raise PeftLinearError(f"row {number} has a message of {message['role']!r} without content; fix the row")
        if what == "completion" and not message.get("tool_calls"):
            _require_text(message["content"], "completion", number)
        renamed.append(message)
    return renamed


def _from_alpaca(row: Row, number: int, chat_template: bool) -> dict[str, Any]:
    instruction, context = row["instruction"], row.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(context, str):
        raise PeftLinearError(f"row {number} has an instruction or input that is no text: {dict(row)!r:.80}")
    _require_text(row["output"], "output", number)
    earlier, system = row.get("history") or [], row.get("system")
    if not chat_template:
        if earlier or system:
            raise PeftLinearError(
                f"row {number} has history or system, which need a chat template; set tokenizer.chat_template"
            )
        text = (ALPACA_WITH_INPUT if context else ALPACA).format(instruction=instruction, input=context)
        return {"prompt": text, "completion": row["output"]}
    prompt = [{"role": "system", "content": system}] if system else []
    for question, answer in earlier:
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt.append({"role": "user", "content": f"{instruction}\n{context}" if context else instruction})
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["output"]}]}


def _require_text(value: Any, name: str, number: int) -> None:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise PeftLinearError(f"row {number} has an empty {name}, of which nothing can be learned; leave it out")


def unknown_format(row: Row) -> str:
    """What an error says of a row for which `find_format` found nothing."""
    columns = ", ".join(map(str, row))
    if {"chosen", "rejected"} & set(row):
        return f"rows with the columns {columns} are preferences, and supervised data are taken: {FIVE_FORMATS}"
    if {"image", "images"} & set(row):
        return f"rows with the columns {columns} hold images; pass the batches of your trainer's DataLoader instead"
    return f"rows with the columns {columns} are in none of the five formats: {FIVE_FORMATS}"
