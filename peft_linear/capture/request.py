# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What `compute_ntk` is asked for: the arguments that its result depends on, checked, and the job they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import PeftLinearError
from .outputs import OutputFunction, OutputKind, label_shift
from .parameters import head_parameters, split_parameters
from .passes import Job
from .targets import Targets, base_model, resolve_always_trained, resolve_targets
from .terms import Space, check_adapter_arguments, linear_parameter_terms, module_terms


@dataclass(frozen=True)
class Request:
    """Arguments of `compute_ntk`, as it documents them.

    Raises:
        PeftLinearError: they are out of range.
    """

    targets: Targets
    space: Space
    rank: int | Sequence[int]
    lora_alpha: float
    draws: int
    outputs: OutputKind
    always_trained: Sequence[str] | None
    seed: int
    num_projections: int
    kernel: Literal["gradient", "sign"]
    product_dtype: torch.dtype | None

    def __post_init__(self) -> None:
        for rank in self.ranks:
            check_adapter_arguments(self.space, rank, self.lora_alpha, self.draws)
        if self.by_rank:
            self._check_ranks()
        if self.kernel not in ("gradient", "sign"):
            raise PeftLinearError(f'kernel must be "gradient" or "sign", got {self.kernel!r}')
        if self.product_dtype not in (None, torch.float32, torch.float64):
            raise PeftLinearError(
                f"product_dtype must be None, torch.float32 or torch.float64, got {self.product_dtype!r}"
            )

    @property
    def by_rank(self) -> bool:
        """Whether `rank` is a sequence, be it of one: then there is a result for each."""
        return isinstance(self.rank, Sequence) and not isinstance(self.rank, str)

    @property
    def ranks(self) -> tuple[int, ...]:
        """As they are given."""
        return tuple(self.rank) if self.by_rank else (self.rank,)  # type: ignore[arg-type, return-value]

    @property
    def folders(self) -> dict[int, str]:
        """Every rank, ascending, and the part of a run's folder in which its kernels lie."""
        return {rank: f"rank-{rank}/" if self.by_rank else "" for rank in sorted(self.ranks)}

    def prepare(self, model: nn.Module) -> Prepared:
        """Finds the modules and makes their terms, at the largest rank.

        Raises:
            TargetError, OutputError: as `compute_ntk`.
        """
        function = OutputFunction(
            self.outputs, shift=label_shift(base_model(model)), num_projections=self.num_projections, seed=self.seed
        )
        head = resolve_always_trained(model, self.always_trained)
        chosen = resolve_targets(model, self.targets, reserved=head)
        head_linear, head_other = split_parameters(head)
        terms, num_parameters = {}, {}
        for name, module in chosen.items():
            terms[name], num_parameters[name] = module_terms(
                name, module, self.space, max(self.ranks), self.lora_alpha, self.draws, self.seed
            )
        terms |= {name: linear_parameter_terms(module) for name, module in head_linear.items()}
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        signed = self.kernel == "sign"
        job = Job(model, chosen, head_linear, head_other, terms, (), function, device, signed, self.product_dtype)
        in_head = sum(parameter.numel() for parameter in head_parameters(head))
        return Prepared(job, self._arguments(list(chosen), sorted(head)), num_parameters, in_head)

    def _check_ranks(self) -> None:
        if not self.ranks:
            raise PeftLinearError(f"rank={self.rank!r} names no rank; pass one, or several, such as rank=(4, 8, 16)")
        if len(set(self.ranks)) < len(self.ranks):
            raise PeftLinearError(f"rank={self.rank!r} names a rank twice; there is one result for each")
        if self.space != "lora":
            raise PeftLinearError(
                f'rank={self.rank!r} are ranks that share the random A of space="lora", got space={self.space!r}; '
                "call compute_ntk once for each of them"
            )

    def _arguments(self, targets: list[str], always_trained: list[str]) -> dict[str, Any]:
        return {
            "targets": targets,
            "always_trained": always_trained,
            "space": self.space,
            "rank": sorted(self.ranks) if self.by_rank else self.rank,
            "lora_alpha": self.lora_alpha,
            "draws": self.draws,
            "outputs": self.outputs,
            "num_projections": self.num_projections,
            "kernel": self.kernel,
            "product_dtype": str(self.product_dtype),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Prepared:
    """A request about one model: the job but for its batches, the arguments as JSON, and what each adapter trains."""

    job: Job
    arguments: dict[str, Any]
    largest: dict[str, int]  # adapter parameters of each candidate at the largest rank
    in_head: int  # parameters that are trained whatever is chosen

    def num_parameters(self, rank: int, largest_rank: int) -> dict[str, int]:
        """Adapter parameters of each candidate at `rank`; an adapter that the model carries keeps its own."""
        return {
            name: number * rank // largest_rank if self.job.terms[name][0].nested else number
            for name, number in self.largest.items()
        }
