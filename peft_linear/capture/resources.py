# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`Resources`: what a computation of kernels may use; it affects the result by rounding only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import PeftLinearError
from .engine.memory import parse_memory


@dataclass(frozen=True)
class Resources:
    """Memory, files, processes and precision of a computation, and whether it shows its progress.

    Args:
        max_memory: bytes, or a size like "4GB" or "512MiB", that the computation may keep (in each process): rows of
            all batches, products at work and finished blocks together; more goes to files. It covers neither the
            model, nor the batches, nor what a single batch needs (its activations and rows). At least about 27·n²
            bytes; where the blocks do not fit, the result is lazy (see ModuleKernels). None: no limit.
        folder: keeps rows and finished blocks here, checksummed, so that a run that was killed resumes where it
            stopped when it is called again with the same arguments, and gives the same kernels to the bit. Holds the
            kernels at the end (`ModuleKernels.load(folder)`); of several ranks, those of rank 8 in the folder
            "rank-8" in it. None: memory, or a temporary folder.
        distributed: where several processes run (under `accelerate launch` or torchrun), divide the work among them:
            all ranks must then call the computation with the same model and the same batches (not their own shard),
            and all get the same kernels. They need a file system in common, with `folder` on it or, on a single
            machine, the system's temporary folder. False: this process works alone.
        precision: torch.float64 multiplies the rows of a float32 model in float64. None: in their own dtype (float32
            for models in half precision), at most 4,096 products in one sum and all other sums in float64, which is
            about twice as fast and tells eigenvalues down to about 1e-7·λ1 from rounding (`Spectrum.noise_floor`
            follows); with torch.float64, down to about 1e-12·λ1.
        progress: show progress bars.
        check: before the first kernel, compare what is assembled with autograd's gradients on a few examples (see
            `capture.self_check`), and raise an error where they differ: "shapes" on the first batch of every
            structure (keys, dimensions, types, which first dimensions agree), "first" on the first batch, "off".
            The result is `kernels.provenance["check"]`.

    Raises:
        PeftLinearError: no size of memory, or another precision or check.
    """

    max_memory: int | str | None = None
    folder: str | os.PathLike | None = None
    distributed: bool = True
    precision: torch.dtype | None = None
    progress: bool = True
    check: Literal["shapes", "first", "off"] = "shapes"

    def __post_init__(self) -> None:
        parse_memory(self.max_memory)
        if self.precision not in (None, torch.float32, torch.float64):
            raise PeftLinearError(
                f"precision must be None, torch.float32 or torch.float64, got {self.precision!r}; it is that of the "
                "products of Jacobian rows"
            )
        if self.check not in ("shapes", "first", "off"):
            raise PeftLinearError(
                f'check must be "shapes", "first" or "off", got {self.check!r}; it says which batches the '
                "self-check tries"
            )

    @property
    def memory_limit(self) -> int | None:
        """`max_memory` in bytes."""
        return parse_memory(self.max_memory)


DEFAULT_RESOURCES = Resources()
