# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A vision transformer for the selection benchmark, pretrained here on some of scikit-learn's digits."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, set_seed


Example = tuple[Tensor, int]


def read_digits(known: Sequence[int]) -> tuple[list[Example], list[Example]]:
    """Images of the digits `known`, and of the others; labels count from 0 in each."""
    from sklearn.datasets import load_digits

    images, numbers = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(numbers))
    parts: tuple[list[Example], list[Example]] = ([], [])
    labels = {
        number: label
        for part in (known, [n for n in range(10) if n not in known])
        for label, number in enumerate(part)
    }
    for i in order:
        image = torch.tensor(images[i] / 8 - 1, dtype=torch.float32).view(1, 8, 8)
        parts[int(numbers[i]) not in known].append((image, labels[int(numbers[i])]))
    return parts


def image_batch(examples: Sequence[Example]) -> dict[str, Tensor]:
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def pretrained_on_digits(examples: Sequence[Example], layers: int, steps: int) -> nn.Module:
    """AdamW with a linear decay on images shifted by up to a pixel."""
    set_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=5,
    )
    model, generator = ViTForImageClassification(config).train(), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        batch = image_batch(generator.sample(list(examples), 32))
        shift = (generator.randint(-1, 1), generator.randint(-1, 1))
        batch["pixel_values"] = torch.roll(batch["pixel_values"], shift, dims=(2, 3))
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def with_new_head(pretrained: nn.Module, seed: int) -> nn.Module:
    model = copy.deepcopy(pretrained)
    set_seed(seed)
    model.classifier = nn.Linear(model.config.hidden_size, model.config.num_labels)
    nn.init.normal_(model.classifier.weight, std=0.02)
    nn.init.zeros_(model.classifier.bias)
    return model.eval()
