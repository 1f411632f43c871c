# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`KernelRequest`: which kernels of a model are wanted; the owner of the defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import PeftLinearError
from ..functional.outputs import Outputs, resolve_output
from ..kernels import ModuleKernels
from .adapter_spaces import Space, check_adapter_arguments, count_parameters, full_matrices, place_of, space_matrices
from .conditions import check_no_global_hooks, check_present, device_of, unwrapped
from .engine.computation import compute_kernels
from .job import Job, Prepared
from .layers import Layer, layer_of
from .outputs import OutputFunction
from .parameters import head_parameters, split_parameters
from .resources import DEFAULT_RESOURCES, Resources
from .targets import Targets, resolve_always_trained, resolve_targets


@dataclass(frozen=True)
class KernelRequest:
    """The arguments of `compute_ntk` that its result depends on, as it documents them, and their defaults.

    Raises:
        PeftLinearError: they are out of range.
    """

    targets: Targets = "all-linear"
    space: Space = "lora"
    rank: int = 8
    lora_alpha: float = 16.0
    draws: int = 1
    outputs: Outputs = "logits"
    always_trained: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rank, Sequence) and not isinstance(self.rank, str):
            raise PeftLinearError(
                f"rank must be a positive integer, got {self.rank!r}; several ranks share their passes in "
                f"peft_linear.capture.ntk.compute_ntk_at_ranks(model, batches, ranks={self.rank!r})"
            )
        check_adapter_arguments(self.space, self.rank, self.lora_alpha, self.draws)
        resolve_output(self.outputs)

    def candidates(self, model: nn.Module) -> dict[str, int]:
        """Parameters of an adapter on each candidate, by full name in model order; needs no batches and no pass.

        Raises:
            TargetError: unknown or unusable targets.
        """
        _, layers = self._find(model)
        return {name: count_parameters(layer, self.space, self.rank) for name, layer in layers.items()}

    def layers(self, model: nn.Module) -> dict[str, Layer]:
        """The layer of each candidate. Raises what `candidates` does."""
        return self._find(model)[1]

    def compute(
        self, model: nn.Module, batches: Iterable[Mapping[str, Any]], resources: Resources = DEFAULT_RESOURCES
    ) -> ModuleKernels:
        """The kernels. Raises what `compute_ntk` does."""
        return compute_kernels(self.prepare(model), batches, resources)[self.rank]

    def compute_sign(
        self, model: nn.Module, batches: Iterable[Mapping[str, Any]], resources: Resources = DEFAULT_RESOURCES
    ) -> ModuleKernels:
        """The sign kernels. Raises what `compute_ntk` does."""
        return compute_kernels(self.prepare(model, signed=True), batches, resources)[self.rank]

    def compute_at_ranks(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        ranks: Sequence[int],
        resources: Resources = DEFAULT_RESOURCES,
    ) -> dict[int, ModuleKernels]:
        """The kernels at each of `ranks`, in their order; `rank` does not count. Raises what `compute_ntk` does."""
        kernels = compute_kernels(self.prepare(model, ranks), batches, resources)
        return {rank: kernels[rank] for rank in ranks}

    def prepare(self, model: nn.Module, ranks: Sequence[int] | None = None, signed: bool = False) -> Prepared:
        """Finds the modules, and what their kernels are made of, at the largest rank.

        Raises:
            PeftLinearError: `ranks` are not different positive integers, or the space has no such ranks.
            TargetError: unknown or unusable targets.
        """
        self._check_ranks(ranks)
        model = unwrapped(model)
        check_present(model)
        if self.space == "lora":
            check_no_global_hooks()
        folders = {self.rank: ""} if ranks is None else {rank: f"rank-{rank}/" for rank in sorted(ranks)}
        head, layers = self._find(model)
        head_layers, head_other = split_parameters(head, model)
        rank = max(folders)
        matrices = {
            name: space_matrices(layer, self.space, rank, self.lora_alpha, self.draws, self.seed)
            for name, layer in layers.items()
        }
        for layer in layers.values():
            layer.place = place_of(layer, self.space)
        for layer in head_layers.values():
            layer.place = "base"
        job = Job(
            model=model,
            candidates=layers,
            head_layers=head_layers,
            head_other=head_other,
            matrices=matrices | {name: full_matrices(layer) for name, layer in head_layers.items()},
            batches=(),
            function=OutputFunction.of(model, self.outputs, self.seed),
            device=device_of(model),
            signed=signed,
        )
        return Prepared(
            job=job,
            arguments=self._arguments(layers, head, self.rank if ranks is None else sorted(ranks), signed),
            folders=folders,
            largest={name: count_parameters(layer, self.space, rank) for name, layer in layers.items()},
            in_head=sum(parameter.numel() for parameter in head_parameters(head)),
        )

    def _find(self, model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Layer]]:
        """The modules that are always trained, and the candidates."""
        head = resolve_always_trained(model, self.always_trained)
        chosen = resolve_targets(model, self.targets, reserved=head)
        return head, {name: layer_of(name, module) for name, module in chosen.items()}

    def _check_ranks(self, ranks: Sequence[int] | None) -> None:
        if ranks is None:
            return
        if isinstance(ranks, str) or not isinstance(ranks, Sequence) or not ranks:
            raise PeftLinearError(f"ranks must be positive integers such as (4, 8, 16), got {ranks!r}")
        for rank in ranks:
            check_adapter_arguments(self.space, rank, self.lora_alpha, self.draws)
        if len(set(ranks)) < len(ranks):
            raise PeftLinearError(f"ranks={ranks!r} names a rank twice; there is one result for each")
        if self.space != "lora":
            raise PeftLinearError(
                f'ranks={ranks!r} are ranks that share the random A of space="lora", got space={self.space!r}; '
                "call compute_ntk once for each of them"
            )

    def _arguments(
        self, candidates: Iterable[str], head: Iterable[str], rank: int | list[int], signed: bool
    ) -> dict[str, Any]:
        output = resolve_output(self.outputs)
        return {
            "targets": list(candidates),
            "always_trained": sorted(head),
            "space": self.space,
            "rank": rank,
            "lora_alpha": self.lora_alpha,
            "draws": self.draws,
            "outputs": output.name,
            **output.arguments,
            "kernel": "sign" if signed else "gradient",
            "seed": self.seed,
        }
