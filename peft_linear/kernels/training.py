# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`predict_training`: loss and accuracy of fine-tuning some modules, train and held out, from kernels alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError, OutputError
from ..functional.adam_simulation import simulate_adam
from ..functional.simulation import TrainingCurve, simulate_training
from .module_kernels import ModuleKernels


def predict_training(
    kernels: ModuleKernels,
    names: Iterable[str] | None = None,
    *,
    held_out: Sequence[int] | Tensor | None = None,
    labels: Tensor | None = None,  # (N,) integers, or (N, C) float targets
    ridge: float = 0.0,
    pull_base: bool = False,
    **settings: Any,
) -> TrainingCurve:
    """Loss and accuracy, step by step, of the linearised model whose `names` are trained: any subset, no network.

    Gradient descent where the kernels are gradients' (`simulate_training`, exact for the linear model), Adam where
    they are those of `compute_sign_kernel` (`simulate_adam`, an approximation).

    Args:
        kernels: of the examples to train on *and* of those to hold out, taken in one call.
        names: the modules to train; default all. The always-trained parameters are always trained.
        held_out: numbers of the examples that are not trained on. They enter through K(x, X) alone.
        labels: of all N examples; default: the kernels' own.
        ridge: λ.
        pull_base: whether λ pulls the always-trained parameters too. ProximalLoRA does not pull them, and Adam is
            less well approximated with it.
        settings: those of `TrainingSettings`, `steps` and `learning_rate` first, and others of the two functions.
            `batches` number the training examples, in their order and without the held-out ones.

    Raises:
        OutputError: there are no labels.
        KernelError: numbers of examples that do not exist or are repeated, nothing left to train on, or as the two
            functions.
        TargetError: a name has no kernel.
    """
    labels = kernels.labels if labels is None else torch.as_tensor(labels)
    if labels is None:
        raise OutputError("the kernels hold no labels; pass labels= (class numbers or targets of the outputs' shape)")
    held = torch.as_tensor([] if held_out is None else held_out, dtype=torch.long)
    count, width = kernels.outputs.shape
    if held.numel() and (int(held.min()) < 0 or int(held.max()) >= count or len(held.unique()) < len(held)):
        raise KernelError(f"held_out must be different numbers in [0, {count}), got {held.tolist()}")
    kept = torch.ones(count, dtype=torch.bool)
    kept[held] = False
    train = kept.nonzero()[:, 0]
    if not len(train):
        raise KernelError(f"all {count} examples are held out; leave some to train on")
    gram = kernels.subset(kernels.names if names is None else [names] if isinstance(names, str) else list(names))
    rows, held_rows = (_rows(examples, width) for examples in (train, held))
    signed = kernels.provenance.get("kernel") == "sign"
    if (ridge > 0 or signed) and not pull_base and bool(kernels.base.any()):
        settings["base"] = kernels.base[torch.cat([rows, held_rows])][:, rows]
    if held.numel():
        settings["held_out"] = (gram[held_rows][:, rows], kernels.outputs[held], labels[held])
    simulate = simulate_adam if signed else simulate_training
    return simulate(gram[rows][:, rows], kernels.outputs[train], labels[train], ridge=ridge, **settings)


def _rows(examples: Tensor, width: int) -> Tensor:
    return (examples[:, None] * width + torch.arange(width)).flatten()
