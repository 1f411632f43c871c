# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Tasks for the selection benchmark that are drawn by a number, so that nobody has chosen them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from selection_tasks import SelectionTask, Sizes, by_section, from_sections, of_digits, of_section, of_text


CLASSES = (2, 3, 4, 6, 8, 12)
TRAIN = (64, 160, 320, 640)  # examples
LAYERS = (4, 6, 8)  # of a vision transformer
KNOWN_TO_LANGUAGE_MODEL = "science"  # the section of the task that the default was settled on

Make = Callable[[Sizes, Path], SelectionTask]


def text(number: int, sizes: Sizes, cache: Path) -> SelectionTask:
    """Sections of the archive, as many classes and training examples as the number says."""
    drawn = random.Random(f"text {number}")
    classes, train = drawn.choice(CLASSES), min(drawn.choice(TRAIN), sizes.train)
    sections = by_section("debian_descriptions")
    needed = sum(count // classes for count in (train, sizes.validation, sizes.test))
    large = sorted(name for name, texts in sections.items() if len(texts) >= needed)
    chosen = drawn.sample(large, classes)
    words = f"{train} examples of {classes} sections: {', '.join(chosen)}"
    return of_text(f"text_{number}", words, "fresh", from_sections(chosen, sections, sizes, train))


def vision(number: int, sizes: Sizes, cache: Path) -> SelectionTask:
    """Digits that the model has not seen; how deep it is, and which it has seen, by number."""
    drawn = random.Random(f"vision {number}")
    known, train, layers = sorted(drawn.sample(range(10), 5)), drawn.choice(TRAIN), drawn.choice(LAYERS)
    sizes = replace(sizes, layers=min(layers, sizes.layers) if sizes.pretrain_steps < 100 else layers)
    words = f"{train} examples; {layers} layers, pretrained on {', '.join(map(str, known))}"
    return of_digits(f"vision_{number}", words, "fresh", known, sizes, cache, min(train, sizes.train))


def language(number: int, sizes: Sizes, cache: Path) -> SelectionTask:
    """A section that the model has not seen."""
    drawn = random.Random(f"language {number}")
    sections = by_section("debian_descriptions")
    needed = sizes.train + sizes.validation + sizes.test
    large = sorted(s for s, texts in sections.items() if len(texts) >= needed and s != KNOWN_TO_LANGUAGE_MODEL)
    section = drawn.choice(large)
    words = f"a language model learns the section {section}"
    return of_section(f"language_{number}", words, section, sizes, cache, "fresh")


KINDS: dict[str, Callable[[int, Sizes, Path], SelectionTask]] = {"text": text, "vision": vision, "language": language}


def fresh_task(key: str) -> Make:
    """The task of a name such as “text_3”."""
    kind, _, number = key.partition("_")
    if kind not in KINDS or not number.isdecimal():
        raise SystemExit(f"no task is called {key!r}; they are called after {', '.join(KINDS)}, as in “text_3”")
    return partial(KINDS[kind], int(number))
