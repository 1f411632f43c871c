# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The bench's tasks: 480 training, 64 validation and 128 test examples each, always the same ones.

Shipped tasks are read from `data/`; those of the package `reasoning-gym` are generated. `KEPT` names the tasks
that no decision may be tuned on.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from peft_linear.errors import PeftLinearError


DATA = Path(__file__).parent / "data"
SPLITS = {"train": 480, "validation": 64, "test": 128}
TUNING = ("translation_fr", "code", "word_sorting", "spam", "domain_text", "caesar_cipher")
KEPT = ("translation_it", "family_relationships")
GENERATED = {"caesar_cipher": 11, "word_sorting": 12, "family_relationships": 13}  # family of reasoning-gym: seed


@dataclass(frozen=True)
class Example:
    """The loss is on `completion` and the end token; an empty prompt means plain text, with loss on every token."""

    prompt: str
    completion: str
    entry: dict = field(default_factory=dict, compare=False, repr=False)  # what reasoning-gym's verifier reads


@dataclass(frozen=True)
class Task:
    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    verify: Callable[[str, Example], bool] | None  # is this answer right? None: there is no one right answer


@cache
def load_task(name: str) -> Task:
    if name in GENERATED:
        examples = generate(name, seed=GENERATED[name])
        verify = partial(verify_generated, name)
    elif name in (*TUNING, *KEPT):
        examples = read_shipped(name)
        verify = verify_word if name == "spam" else None
    else:
        raise PeftLinearError(f"no task {name!r}; there are {[*TUNING, *KEPT]}")
    parts, start = [], 0
    for count in SPLITS.values():
        parts.append(tuple(examples[start : start + count]))
        start += count
    return Task(name, *parts, verify=verify)


def read_shipped(name: str) -> list[Example]:
    """The rows of data/<name>.jsonl.gz, which are in the order of SPLITS."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [Example(row["prompt"], row["completion"]) for row in map(json.loads, lines)]


def generate(name: str, seed: int) -> list[Example]:
    """Questions of one family of reasoning-gym; of questions that differ in names alone, the first."""
    try:
        import reasoning_gym
    except ImportError:
        raise PeftLinearError(f"task {name!r} needs the package reasoning-gym; pip install -e '.[llm]'") from None
    wanted = sum(SPLITS.values())
    examples: list[Example] = []
    seen: set[str] = set()
    for entry in reasoning_gym.create_dataset(name, seed=seed, size=4 * wanted):
        prompt = shorten(name, entry["question"])
        key = question_key(name, prompt)
        if key in seen:
            continue
        seen.add(key)
        examples.append(Example(prompt, str(entry["answer"]), entry))
        if len(examples) == wanted:
            return examples
    raise PeftLinearError(f"reasoning-gym gave {len(examples)} different questions of {name!r}, {wanted} are needed")


def shorten(name: str, question: str) -> str:
    """`word_sorting` without its explanation, of which every question repeats 60 words."""
    if name != "word_sorting":
        return question.strip()
    order, words = re.search(r"in (ascending|descending) order .*: (.*)", question.rsplit("\n\n", 1)[1]).groups()
    return f"Sort in {order} ASCII order: {words.strip()}"


def question_key(name: str, prompt: str) -> str:
    """What two questions share when one answers the other, such as a set of words."""
    if name == "word_sorting":
        return " ".join(sorted(re.findall(r"\w+", prompt.split(":", 1)[1])))
    return " ".join(prompt.split())


def verify_generated(name: str, answer: str, example: Example) -> bool:
    """reasoning-gym's own verifier gives full marks."""
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(name)(answer, example.entry) == 1.0


def verify_word(answer: str, example: Example) -> bool:
    return answer.strip() == example.completion
