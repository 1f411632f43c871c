# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A computation from its batches to its blocks: what lies where, what is finished already, who does what."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import PeftLinearError
from ...kernels import ModuleKernels
from ...kernels.saving import INDEX
from ..adapter_spaces import ParameterMatrix, formed_rows
from ..batches import gather_labels
from ..job import OTHER, Jacobians, Job
from ..passes import capturing, capturing_other, not_finite
from .blocks import BASE, BlockStore, RankBlocks
from .jacobian_store import JacobianStore
from .memory import MemoryPlan, format_memory
from .processes import Team
from .products import MatrixKernel, kernels_at_work, matrix_kernel, nested_kernels
from .run_folder import RunFolder


Capturing = Callable[[Job], AbstractContextManager[Callable[[int], tuple[Jacobians, Tensor]]]]


@dataclass
class Result:
    """The blocks of every rank, and what they have in common."""

    outputs: Tensor  # (N, C) float64
    of_rank: dict[int, RankBlocks]
    base: Tensor
    labels: Tensor | None  # (N,)
    record: dict[str, Any] = field(default_factory=dict)  # for the provenance


class Run:
    """Jacobians of all batches first, then one kernel after the other; each step is divided over the team."""

    def __init__(
        self,
        job: Job,
        folders: Mapping[int, str],  # of every rank, ascending: where its result lies in the folder
        team: Team,
        folder: RunFolder,
        limit: int | None,
        product_bytes: int,
        progress: bool,
    ) -> None:
        self.job, self.folders, self.team, self.folder = job, folders, team, folder
        self.limit, self.product_bytes, self.progress = limit, product_bytes, progress
        self.plan: MemoryPlan | None = None
        self.labels: Tensor | None = None
        self.resumed = {"batches": 0, "blocks": 0}
        in_files = folder.kept or team.size > 1
        sizes = [batch.size for batch in job.batches]
        self.of_layers = JacobianStore("", sizes, folder, in_files, job.device)
        self.of_others = JacobianStore("-other", sizes, folder, in_files, job.device)
        self.tasks = [*job.candidates, *([BASE] if job.has_head else [])]
        self.blocks = BlockStore(self.tasks, folders, folder, in_files)

    def is_finished(self) -> bool:
        """Whether the folder holds the whole result already."""
        indices = {f"{folder}{INDEX}" for folder in self.folders.values()}
        return indices <= self.folder.finished.keys() and all(map(self.blocks.is_finished, self.tasks))

    def load(self) -> dict[int, ModuleKernels]:
        """The result of the finished run that the folder holds, by rank."""
        return {rank: self._load(folder) for rank, folder in self.folders.items()}

    def _load(self, folder: str) -> ModuleKernels:
        kernels = ModuleKernels.load(self.folder.path / folder)
        self._make_plan(kernels.num_outputs)
        blocks = kernels.blocks
        if self._plan().blocks_in_memory:
            blocks = {name: block.clone() for name, block in blocks.items()}
        storage = self._storage(blocks) | {"resumed_batches": len(self.job.batches), "resumed_blocks": len(self.tasks)}
        return replace(kernels, blocks=blocks, provenance={**kernels.provenance, "storage": storage})

    def complete(self) -> Result:
        start = time.perf_counter()
        self._capture("Jacobians", self.of_layers, capturing)
        if self.job.head_other:
            self._capture("other head parameters", self.of_others, capturing_other)
        passes = time.perf_counter()
        self._take_grams()
        result = self.team.each("collecting", self._collect)  # no process goes on before all have what they need
        result.record = {
            "num_batches": len(self.job.batches),
            "storage": self._storage(next(iter(result.of_rank.values())).blocks),
            "processes": self.team.size,
            "seconds_passes": passes - start,
            "seconds_gram": time.perf_counter() - passes,
        }
        return result

    def _storage(self, blocks: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "parts": "files" if self.of_layers.in_files else "memory",
            "blocks": "memory" if isinstance(blocks, dict) else "files",
            "max_memory": self.limit,
            "product_bytes": self._plan().product_bytes,
            "resumed_batches": self.resumed["batches"],
            "resumed_blocks": self.resumed["blocks"],
        }

    def _capture(self, stage: str, store: JacobianStore, capturing: Capturing) -> None:
        numbers = range(len(self.job.batches))
        finished = [number for number in numbers if store.file_of(number) in self.folder.finished]
        for number in finished:
            store.adopt(number)
        self.resumed["batches"] = max(self.resumed["batches"], len(finished))
        if finished:
            self._make_plan(store.outputs[finished[0]].shape[1])
        missing = [number for number in numbers if number not in store.outputs]
        if not missing:
            return

        with capturing(self.job) as capture:

            def work(number: int) -> tuple[dict[str, str], int]:
                jacobians, outputs = capture(number)
                return store.put(number, jacobians, outputs), outputs.shape[1]

            def done(results: list[tuple[dict[str, str], int]]) -> None:
                for files, num_outputs in results:
                    self.folder.record(files)
                    self._make_plan(num_outputs)
                limit = self._plan().jacobian_bytes
                if limit is not None:
                    store.keep_within(limit - (self.of_layers.held_bytes if store is self.of_others else 0))

            self.team.divide(stage, missing, work, done, self.progress, "batch")
        for number in missing:
            store.adopt(number)

    def _make_plan(self, num_outputs: int) -> None:
        """As soon as the number of outputs is known; what cannot work fails here, before the passes."""
        if self.plan is not None:
            return
        rows = num_outputs * sum(batch.size for batch in self.job.batches)
        blocks = len(self.job.candidates) * len(self.folders)
        draws = max(matrix.draws for matrices in self.job.matrices.values() for matrix in matrices)
        squares = kernels_at_work(draws, len(self.folders)) + 1  # and the kernel of the task head
        self.plan = MemoryPlan.make(self.limit, rows, blocks, self.product_bytes, squares)
        self.labels = gather_labels(list(self.job.batches), torch.empty(0, num_outputs), self.job.function)
        if self.team.size > 1 and not self.folder.kept and not self.plan.blocks_in_memory:
            raise PeftLinearError(
                f"{blocks} blocks of {format_memory(8 * rows**2)} do not fit max_memory, so they stay in files, and "
                "those of several processes need a `folder`; pass one that all processes share, or raise max_memory"
            )
        self.blocks.in_files |= not self.plan.blocks_in_memory

    def _plan(self) -> MemoryPlan:
        assert self.plan is not None
        return self.plan

    def _take_grams(self) -> None:
        missing = [task for task in self.tasks if not self.blocks.is_finished(task)]
        self.resumed["blocks"] = len(self.tasks) - len(missing)
        if self.team.size > 1:  # most expensive first, so that those of one round take about the same time
            missing.sort(key=lambda task: -sum(m.features * m.channels for m in self._matrices(task).values()))

        def work(task: str) -> dict[str, str]:
            return self.blocks.put(task, self._finite(task))

        def done(results: list[dict[str, str]]) -> None:
            for files in results:
                self.folder.record(files)

        self.team.divide("Gram matrices", missing, work, done, self.progress, "module")

    def _matrices(self, task: str) -> dict[str, ParameterMatrix]:
        """The parameter matrices of a task by key, without the head's parameters that belong to no layer."""
        names = self.job.head_layers if task == BASE else [task]
        return {
            key: matrix
            for name in names
            for key, matrix in zip(self.job.keys(name), self.job.matrices[name], strict=True)
        }

    def _finite(self, task: str) -> Iterator[tuple[int, MatrixKernel]]:
        for rank, kernel in self._kernels(task):
            if not bool(kernel.gram.isfinite().all()):
                raise not_finite("the task head" if task == BASE else task, next(self.job.model.parameters()).dtype)
            yield rank, kernel
            del kernel  # or it would be kept in memory until the next one is there

    def _kernels(self, task: str) -> Iterator[tuple[int, MatrixKernel]]:
        """The kernel of every rank; an adapter that the model carries, and the task head, have one for all of them."""
        nested = {key: matrix for key, matrix in self._matrices(task).items() if matrix.nested}
        if len(self.folders) > 1 and nested:
            [(key, matrix)] = nested.items()
            jacobians = self.of_layers.jacobians(key, matrix.features, matrix.channels)
            if jacobians is not None:
                ranks, product_bytes = list(self.folders), self._plan().product_bytes
                yield from nested_kernels(jacobians, matrix, ranks, product_bytes, self.job.signed, self.job.precision)
                self.of_layers.release([key])
                return
        kernel = self._kernel(task)
        for rank in self.folders:
            yield rank, kernel

    def _kernel(self, task: str) -> MatrixKernel:
        """The sum over the matrices of a task; the spread is that of the first, the only one with several draws."""
        matrices = self._matrices(task)
        stores = dict.fromkeys(matrices, self.of_layers)
        if task == BASE and self.job.head_other:
            matrices[OTHER], stores[OTHER] = formed_rows(self.job.head_other), self.of_others
        total: Tensor | None = None
        spread, methods = None, []
        for key, matrix in matrices.items():
            jacobians = stores[key].jacobians(key, matrix.features, matrix.channels)
            if jacobians is None:
                methods.append("zero")
                continue
            kernel = matrix_kernel(jacobians, matrix, self._plan().product_bytes, self.job.signed, self.job.precision)
            del jacobians
            stores[key].release([key])
            spread = kernel.spread if spread is None else spread
            methods.append(kernel.method)
            total = kernel.gram if total is None else total.add_(kernel.gram)
        if total is None:
            n = sum(outputs.numel() for outputs in self.of_layers.outputs.values())
            total = torch.zeros(n, n, dtype=torch.float64)
        return MatrixKernel(total, spread, "+".join(methods))

    def _collect(self) -> Result:
        values = torch.cat([self.of_layers.outputs[number] for number in range(len(self.job.batches))])
        n, in_memory = values.numel(), self._plan().blocks_in_memory
        return Result(
            outputs=values,
            of_rank={rank: self.blocks.of_rank(rank, n, in_memory) for rank in self.folders},
            base=self.blocks.base(n),
            labels=self.labels,
        )
