# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What is to be computed of one model: `Job` for the passes, `Prepared` for the whole computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..functional.gram import BatchJacobian
from .adapter_spaces import ParameterMatrix
from .batches import Batch
from .layers import Layer
from .outputs import OutputFunction


Jacobians = dict[str, BatchJacobian | None]  # of one batch, by the key of each parameter matrix
OTHER = "other head parameters"  # the key of their rows


@dataclass(frozen=True)
class Job:
    """What is to be computed: of which layers, in which parameter matrices, on which batches."""

    model: nn.Module
    candidates: Mapping[str, Layer]
    head_layers: Mapping[str, Layer]  # that are always trained, in full
    head_other: Sequence[nn.Parameter]  # and other such parameters
    matrices: Mapping[str, list[ParameterMatrix]]  # of candidates and head_layers
    batches: Sequence[Batch]
    function: OutputFunction
    device: torch.device
    signed: bool = False  # the kernel of sign descent
    precision: torch.dtype | None = None  # of products of rows; None: that of the rows

    @property
    def has_head(self) -> bool:
        return bool(self.head_layers or self.head_other)

    @property
    def layers(self) -> dict[str, Layer]:
        """All that are recorded."""
        return {**self.candidates, **self.head_layers}

    def keys(self, name: str) -> list[str]:
        """The keys of a layer's parameter matrices."""
        return [f"{name}#{number}" for number in range(len(self.matrices[name]))]


@dataclass(frozen=True)
class Prepared:
    """A request for kernels of one model: the job but for its batches, and what is known before the first pass."""

    job: Job
    arguments: dict[str, Any]  # of the request, as JSON; "targets" and "always_trained" by full name
    folders: dict[int, str]  # every rank, ascending: where its kernels lie in a run's folder
    largest: dict[str, int]  # adapter parameters of each candidate at the largest rank
    in_head: int  # parameters that are always trained

    def num_parameters(self, rank: int) -> dict[str, int]:
        """Adapter parameters of each candidate at `rank`; an adapter that the model carries keeps its own."""
        return {
            name: number * rank // max(self.folders) if self.job.matrices[name][0].nested else number
            for name, number in self.largest.items()
        }
