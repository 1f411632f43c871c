# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The tasks of the selection benchmark: pretrained models, and labelled data that fine-tune them.

Four text classifications on the shipped encoder, a causal language model and a vision transformer that are pretrained
here. `family` says which tasks criteria were developed on ("validation") and which were kept for the end ("test").
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification

from examples.benchmarks.selection.vision import image_batch, pretrained_on_digits, read_digits, with_new_head
from examples.common.language_model import LanguageModelOptions, PretrainedLanguageModel, read_corpus
from examples.common.tasks import DEMO_MODEL, Task, load_quietly, load_task
from peft_linear.capture.targets import resolve_always_trained, resolve_targets
from peft_linear.cli.data import TextData, collator, tokenize
from peft_linear.files import atomic_directory


Batch = dict[str, Tensor]
IGNORED = -100  # label of a token that is not predicted


@dataclass(frozen=True)
class Sizes:
    """Examples of each split, tokens of a text, and how models are pretrained here."""

    train: int = 640
    validation: int = 128
    test: int = 256
    max_length: int = 24
    pretrain_steps: int = 3000
    layers: int = 6  # of the vision transformer


STRUCTURE_STEPS = 100  # of pretraining, where modules and their shapes alone are needed
QUICK_SIZES = Sizes(train=24, validation=8, test=16, max_length=16, pretrain_steps=3, layers=2)


def sizes_for_report(sizes: Sizes) -> Sizes:
    """The same tasks with models that are pretrained briefly: a report needs names and shapes of modules only."""
    return replace(sizes, pretrain_steps=min(sizes.pretrain_steps, STRUCTURE_STEPS))


@dataclass(frozen=True)
class SelectionTask:
    """A pretrained model and data that fine-tune it; `batch` makes model inputs with labels from examples."""

    key: str
    words: str
    family: str  # "validation" or "test"
    make_model: Callable[[int], nn.Module]  # by seed: of the head, where there is one
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    batch: Callable[[Sequence[Any]], Batch]
    length: Callable[[Any], int] = field(default=lambda example: 0)  # examples of a length are evaluated together
    outputs: str = "logits"  # of the kernels
    lora: Mapping[str, Any] = field(default_factory=dict)  # fields of LoraConfig

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        """The candidates, in model order: name -> (inputs, outputs)."""
        model = self.make_model(0)
        found = resolve_targets(model, "all-linear", reserved=resolve_always_trained(model))
        return {name: matrix_shape(module) for name, module in found.items()}

    @cached_property
    def head(self) -> str | None:
        """The always trained module."""
        model = self.make_model(0)
        return next((name for name in ("classifier", "score") if hasattr(model, name)), None)

    def parameters(self, names: Sequence[str], rank: int) -> int:
        """Of LoRA adapters of that rank on `names`."""
        return rank * sum(sum(self.modules[name]) for name in names)

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Training batches without end, in an order that depends on the seed only."""
        order, generator = list(range(len(self.train))), random.Random(seed)
        while True:
            generator.shuffle(order)
            for first in range(0, len(order) - batch_size + 1, batch_size):
                yield self.batch([self.train[i] for i in order[first : first + batch_size]])

    def in_order_of_length(self, examples: Sequence[Any], batch_size: int = 64) -> Iterator[Batch]:
        ordered = sorted(examples, key=self.length)
        return (self.batch(ordered[first : first + batch_size]) for first in range(0, len(ordered), batch_size))

    def calibration(self, count: int, seed: int, batch_size: int = 16) -> list[Batch]:
        """Batches of `count` training examples sampled with `seed` (all, if there are fewer)."""
        chosen = random.Random(seed).sample(list(self.train), min(count, len(self.train)))
        return [self.batch(chosen[first : first + batch_size]) for first in range(0, len(chosen), batch_size)]


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module, in the other order for GPT-2's Conv1D, which is the same for LoRA."""
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return int(columns), int(rows)


def counted(batch: Batch) -> int:
    """How many predictions the mean loss of a batch is over: examples, or tokens that are predicted."""
    labels = batch["labels"]
    return len(labels) if labels.ndim == 1 else int((labels[:, 1:] != IGNORED).sum())


def of_text(key: str, words: str, family: str, task: Task) -> SelectionTask:
    """A text classification as `load_task` loads it."""
    return SelectionTask(
        key=key,
        words=words,
        family=family,
        make_model=lambda seed: task.new_model(seed).eval(),
        train=task.train,
        validation=task.validation,
        test=task.test,
        batch=lambda rows: dict(task.collator(list(rows))),
        length=lambda row: len(row["input_ids"]),
        lora={"task_type": "SEQ_CLS"},
    )


def topics(sizes: Sizes, cache: Path) -> SelectionTask:
    limits = (sizes.train, sizes.validation, sizes.test)
    task = load_task(DEMO_MODEL, "debian_topics", sizes.max_length, limits)
    return of_text("topics", "the subject of a text, 8 classes", "validation", task)


def pairs(sizes: Sizes, cache: Path) -> SelectionTask:
    limits = (sizes.train, sizes.validation, sizes.test)
    task = load_task(DEMO_MODEL, "debian_pairs", 2 * sizes.max_length, limits)
    return of_text("pairs", "do two texts have one subject, 2 classes", "test", task)


def fine_grained(sizes: Sizes, cache: Path) -> SelectionTask:
    """The 20 largest sections of the archive, equally often."""
    sections = by_section("debian_descriptions")
    largest = sorted(sections, key=lambda name: (-len(sections[name]), name))[:20]
    task = from_sections(largest, sections, sizes, sizes.train)
    return of_text("fine_grained", "the section of a package, 20 classes", "validation", task)


def few_shot(sizes: Sizes, cache: Path) -> SelectionTask:
    """Four sections that no other task has, 16 examples of each."""
    sections = by_section("debian_descriptions")
    others = sorted(sections, key=lambda name: (-len(sections[name]), name))[20:]
    task = from_sections(others[:4], sections, sizes, min(64, sizes.train))
    return of_text("few_shot", "64 examples of 4 classes", "validation", task)


def by_section(corpus: str) -> dict[str, list[str]]:
    """The texts of each section, in the corpus's order."""
    found: dict[str, list[str]] = {}
    for row in read_corpus(corpus):
        found.setdefault(row["section"], []).append(row["text"])
    return found


def from_sections(chosen: Sequence[str], sections: Mapping[str, list[str]], sizes: Sizes, train: int) -> Task:
    """A classification of balanced classes, each text in one split; as many of a class as its section has."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for label, section in enumerate(chosen):
        texts = iter(random.Random(label).sample(sections[section], len(sections[section])))
        for split, count in (("train", train), ("validation", sizes.validation), ("test", sizes.test)):
            share = count // len(chosen)
            splits[split] += [{"text": text, "label": label} for text, _ in zip(texts, range(share), strict=False)]
    data = TextData(splits, ("text",), "label", tuple(chosen))
    _, tokenizer = load_quietly(DEMO_MODEL, data.label_names)
    features = [tokenize(data, rows, tokenizer, sizes.max_length) for rows in splits.values()]
    return Task(DEMO_MODEL, "sections", data, *features, tokenizer, collator(data, tokenizer), sizes.max_length)


def language_model(sizes: Sizes, cache: Path) -> SelectionTask:
    """A GPT-2 of four layers, pretrained on all sections but one, which it then learns."""
    return of_section("language_model", "a language model learns a new section", "science", sizes, cache)


def of_section(
    key: str, words: str, section: str, sizes: Sizes, cache: Path, family: str = "validation"
) -> SelectionTask:
    """A language model that is pretrained on all sections but one learns that one."""
    options = LanguageModelOptions(
        section=section,
        pretrain_steps=sizes.pretrain_steps,
        train=sizes.train,
        test=sizes.test + sizes.validation,
    )
    pretrained = PretrainedLanguageModel(options, cache)
    train, validation, test = pretrained.split(0)
    return SelectionTask(
        key=key,
        words=words,
        family=family,
        make_model=lambda seed: copy.deepcopy(pretrained.base),
        train=train,
        validation=validation[: sizes.validation],
        test=test[len(test) // 2 :][: sizes.test],
        batch=language_batch,
        length=len,
        outputs="log_likelihood",
        lora={"task_type": "CAUSAL_LM", "fan_in_fan_out": True},
    )


def language_batch(texts: Sequence[list[int]]) -> Batch:
    """Padded tokens, and the same as labels with padding ignored."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, IGNORED)}


def digits(sizes: Sizes, cache: Path) -> SelectionTask:
    """A vision transformer on scikit-learn's digits: pretrained to tell 0 to 4 apart, it then learns 5 to 9."""
    return of_digits("digits", "a vision transformer learns new digits, 5 classes", "test", range(5), sizes, cache)


def of_digits(
    key: str, words: str, family: str, known: Sequence[int], sizes: Sizes, cache: Path, train: int | None = None
) -> SelectionTask:
    """A vision transformer that is pretrained on the digits `known` learns the others, from `train` examples."""
    old, new = read_digits(known)
    name = f"digits_{sizes.layers}_{sizes.pretrain_steps}"
    if list(known) != list(range(5)):
        name += "_" + "".join(map(str, known))
    if not (cache / name).is_dir():
        with atomic_directory(cache / name) as temporary:
            pretrained_on_digits(old, sizes.layers, sizes.pretrain_steps).save_pretrained(temporary)
    pretrained = ViTForImageClassification.from_pretrained(cache / name)
    first, second = sizes.validation, sizes.validation + sizes.test
    return SelectionTask(
        key=key,
        words=words,
        family=family,
        make_model=lambda seed: with_new_head(pretrained, seed),
        train=new[second:][: train or sizes.train],
        validation=new[:first],
        test=new[first:second],
        batch=image_batch,
    )


TASKS: dict[str, Callable[[Sizes, Path], SelectionTask]] = {
    "topics": topics,
    "fine_grained": fine_grained,
    "few_shot": few_shot,
    "language_model": language_model,
    "pairs": pairs,
    "digits": digits,
}
