# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Predictors of a choice of layers before training: condition numbers, and our own criteria, from one kernel.

The kernel is that of the very adapters that are trained afterwards (same A, B = 0), in float64: one pass over the
calibration examples serves all choices, since the kernel of a choice is the sum of its modules' blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.common.tasks import Task
from examples.paper.training import Protocol, adapted, lora_a
from peft_linear import ModuleKernels, Spectrum, compute_ntk
from peft_linear.capture.ntk import compute_sign_kernel
from peft_linear.functional.simulation import SMOOTHNESS, one_hot_targets
from peft_linear.selection.criteria import CRITERIA, applicable_criteria
from peft_linear.selection.problem import Problem
from peft_linear.selection.views import default_ridge


PAPERS_RIDGE = 1e-4
RELATIVE_RIDGE = 1e-4
PAPER = "κ, σ = 1e-4"
CONDITIONS = {  # label: what it is
    PAPER: "adapter kernel, the paper's fixed ridge",
    "κ, no ridge": "adapter kernel",
    "κ, σ = 1e-4·tr(K)/n": "adapter kernel, a ridge in proportion to it: the same for every scale of the kernel",
    "κ, σ = 1e-4, sign kernel": "the authors' code multiplies J with sign(J); symmetrised, |eigenvalues|",
    "κ with head, σ = 1e-4": "the kernel of everything that is trained",
    "κ with head, no ridge": "the kernel of everything that is trained",
    "κ with head, fitted ridge": "the same, with the one ridge of least leave-one-out error of all layers",
}
COUNT = "number of layers"


@dataclass(frozen=True)
class Start:
    """LoRA's start of one seed, and the kernels there."""

    matrices: Mapping[str, Tensor]  # LoRA's A of every layer
    kernels: ModuleKernels
    sign_kernels: ModuleKernels


def kernels_at_start(
    task: Task, layers: Mapping[int, Sequence[str]], seed: int, protocol: Protocol, examples: int
) -> Start:
    """Adapters on all layers, from `seed`, and their kernels on `examples` calibration examples, in float64."""
    names = [name for of_layer in layers.values() for name in of_layer]
    model = adapted(task.new_model(seed), names, protocol)
    matrices = lora_a(model)
    model.double()
    batches = task.calibration(examples, seed=seed)
    given = {"targets": names, "rank": protocol.rank, "lora_alpha": protocol.lora_alpha, "progress": False}
    kernels = compute_ntk(model, batches, **given)
    return Start(matrices, kernels, compute_sign_kernel(model, batches, **given))


def predictors(start: Start, names: Sequence[str], loss: str) -> dict[str, float]:
    """{predictor: number} for LoRA on `names`; `utility` has the direction of each."""
    found = conditions(start, names)
    problem = problem_of(start.kernels, loss)
    gram = start.kernels.subset(names)
    for criterion in applicable_criteria(problem):
        if criterion != "condition_number":  # it is among the conditions
            found[criterion] = CRITERIA[criterion](gram, problem)
    return found


def conditions(start: Start, names: Sequence[str]) -> dict[str, float]:
    """The condition numbers of `CONDITIONS`."""
    adapter = sum_of_blocks(start.kernels, names)
    spectrum, full = Spectrum.from_gram(adapter), start.kernels.spectrum(names)
    mean = spectrum.trace / len(spectrum)
    signed = torch.linalg.eigvalsh(sum_of_blocks(start.sign_kernels, names)).abs()
    numbers = (
        spectrum.condition_number(PAPERS_RIDGE),
        spectrum.condition_number(),
        spectrum.condition_number(RELATIVE_RIDGE * mean),
        (float(signed.max()) + PAPERS_RIDGE) / (float(signed.min()) + PAPERS_RIDGE),
        full.condition_number(PAPERS_RIDGE),
        full.condition_number(),
        full.condition_number(default_ridge(start.kernels)),
    )
    return dict(zip(CONDITIONS, numbers, strict=True))


def sum_of_blocks(kernels: ModuleKernels, names: Sequence[str]) -> Tensor:
    """The kernel of the adapters alone, without the head's."""
    return torch.stack([kernels[name] for name in names]).sum(dim=0)


def problem_of(kernels: ModuleKernels, loss: str) -> Problem:
    """The learning problem of the loss that is trained: one-hot targets are those of the squared loss."""
    labels = kernels.labels
    if loss == "squared":
        labels = one_hot_targets(labels, kernels.outputs.shape)
    curvature = SMOOTHNESS["cross_entropy"] * largest(kernels) / kernels.num_examples
    return Problem(kernels.outputs, labels, kernels.output_kind, default_ridge(kernels), learning_rate=1.0 / curvature)


def stable_rate(kernels: ModuleKernels, loss: str) -> float:
    """`N/(s·λ1)`: with it gradient descent on the linear model of *all* layers cannot diverge, so on no choice."""
    return kernels.num_examples / (SMOOTHNESS[loss] * largest(kernels))


def largest(kernels: ModuleKernels) -> float:
    return float(kernels.spectrum().eigenvalues[0])


def utility(name: str, value: float) -> float:
    """The number with the sign that makes higher better, by the claim of its authors."""
    if name in CONDITIONS:
        return -value
    return CRITERIA[name].utility(value) if name in CRITERIA else value


def layer_choices(layers: Sequence[int], count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """`count` different sets of layers, every size as often as its number of sets allows, sampled with `seed`.

    Raises:
        SystemExit: there are not so many sets.
    """
    total = 2 ** len(layers) - 1
    if not 1 <= count <= total:
        raise SystemExit(f"{len(layers)} layers have {total} non-empty sets; cannot choose {count} of them")
    room = [math.comb(len(layers), size) for size in range(1, len(layers) + 1)]
    wanted = [0] * len(layers)
    while sum(wanted) < count:
        for place in range(len(layers)):
            if wanted[place] < room[place] and sum(wanted) < count:
                wanted[place] += 1
    generator = np.random.default_rng(seed)
    chosen: set[tuple[int, ...]] = set()
    for size, number in enumerate(wanted, start=1):
        of_size: set[tuple[int, ...]] = set()
        while len(of_size) < number:
            of_size.add(tuple(sorted(int(layer) for layer in generator.choice(layers, size, replace=False))))
        chosen |= of_size
    return sorted(chosen, key=lambda choice: (len(choice), choice))
