# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels with a planted answer: the right modules are known before anything is computed."""

import torch

from peft_linear.kernels.module_kernels import ModuleKernels


KINDS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "intermediate.dense", "output.dense")  # fmt: skip
BERT_NAMES = tuple(f"bert.encoder.layer.{layer}.{kind}" for layer in range(6) for kind in KINDS)


def planted_kernels(
    names=BERT_NAMES[:8],
    informative=(2, 5),
    examples=36,
    classes=3,
    strength=1.0,
    head=0.05,
    sizes=None,
    seed=0,
    output_kind="logits",
):
    """Kernels in which the modules numbered `informative` see the classes and the others see noise of equal trace.

    An informative module's kernel is that of features which share a direction within a class (a weak copy of it within
    noise), so examples of a class help each other; a noise module's features are independent of the class.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.arange(examples) % classes
    blocks = {}
    for index, name in enumerate(names):
        features = normal(examples, 40)
        if index in informative:
            features = features + 3.0 * strength * normal(classes, 40)[labels]
        features = features / features.norm() * examples**0.5
        # outputs share the features, each with its own weights, as the rows of a linear layer do
        blocks[name] = torch.kron(features @ features.T, torch.eye(classes, dtype=torch.float64))
    base_features = normal(examples, 12)
    base = head * torch.kron(base_features @ base_features.T / 12, torch.eye(classes, dtype=torch.float64))
    sizes = sizes or [1000] * len(names)
    outputs = 0.1 * normal(examples, classes)
    if output_kind != "logits":
        rows = torch.arange(examples) * classes + labels
        blocks = {name: block[rows][:, rows] for name, block in blocks.items()}
        base, outputs = base[rows][:, rows], outputs.log_softmax(dim=1).gather(1, labels[:, None])
    return ModuleKernels(
        blocks=blocks,
        base=base,
        outputs=outputs,
        labels=labels,
        num_parameters=dict(zip(names, sizes, strict=True)),
        shapes=dict.fromkeys(names, (384, 384)),
        output_kind=output_kind,
        provenance={"model": "planted", "draws": 1},
    )
