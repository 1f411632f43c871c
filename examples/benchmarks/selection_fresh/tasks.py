# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Tasks for the selection benchmark that are sampled with a fixed seed each, so that none is chosen by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from examples.benchmarks.selection.tasks import (
    SelectionTask,
    Sizes,
    by_section,
    from_sections,
    of_digits,
    of_section,
    of_text,
)


CLASSES = (2, 3, 4, 6, 8, 12)
TRAIN = (64, 160, 320, 640)  # examples
LAYERS = (4, 6, 8)  # of a vision transformer
KNOWN_TO_LANGUAGE_MODEL = "science"  # the section of the task that the default was developed on

Make = Callable[[Sizes, Path], SelectionTask]


def text(seed: int, sizes: Sizes, cache: Path) -> SelectionTask:
    """Sections of the archive; the seed decides which, and the numbers of classes and training examples."""
    generator = random.Random(f"text {seed}")
    classes, train = generator.choice(CLASSES), min(generator.choice(TRAIN), sizes.train)
    sections = by_section("debian_descriptions")
    needed = sum(count // classes for count in (train, sizes.validation, sizes.test))
    large = sorted(name for name, texts in sections.items() if len(texts) >= needed)
    chosen = generator.sample(large, classes)
    words = f"{train} examples of {classes} sections: {', '.join(chosen)}"
    return of_text(f"text_{seed}", words, "fresh", from_sections(chosen, sections, sizes, train))


def vision(seed: int, sizes: Sizes, cache: Path) -> SelectionTask:
    """Digits that the model was not pretrained on; the seed decides which, and its depth."""
    generator = random.Random(f"vision {seed}")
    known, train, layers = sorted(generator.sample(range(10), 5)), generator.choice(TRAIN), generator.choice(LAYERS)
    sizes = replace(sizes, layers=min(layers, sizes.layers) if sizes.pretrain_steps < 100 else layers)
    words = f"{train} examples; {layers} layers, pretrained on {', '.join(map(str, known))}"
    return of_digits(f"vision_{seed}", words, "fresh", known, sizes, cache, min(train, sizes.train))


def language(seed: int, sizes: Sizes, cache: Path) -> SelectionTask:
    """A section that the model was not pretrained on."""
    generator = random.Random(f"language {seed}")
    sections = by_section("debian_descriptions")
    needed = sizes.train + sizes.validation + sizes.test
    large = sorted(s for s, texts in sections.items() if len(texts) >= needed and s != KNOWN_TO_LANGUAGE_MODEL)
    section = generator.choice(large)
    words = f"a language model learns the section {section}"
    return of_section(f"language_{seed}", words, section, sizes, cache, "fresh")


KINDS: dict[str, Callable[[int, Sizes, Path], SelectionTask]] = {"text": text, "vision": vision, "language": language}


def fresh_task(key: str) -> Make:
    """The task of a name such as “text_3”."""
    kind, _, number = key.partition("_")
    if kind not in KINDS or not number.isdecimal():
        raise SystemExit(f"no task is called {key!r}; they are called after {', '.join(KINDS)}, as in “text_3”")
    return partial(KINDS[kind], int(number))
