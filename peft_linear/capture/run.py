# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A computation from its batches to its blocks: what lies where, what is finished already, who does what."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import PeftLinearError
from ..kernels import ModuleKernels
from ..kernels.module_kernels import INDEX
from ..kernels.tensor_files import BlockFiles, open_file
from .accumulate import TermKernel, term_kernel
from .batches import gather_labels
from .memory import MemoryPlan, format_memory
from .parts import PartStore
from .passes import OTHER, Job, Parts, capturing, capturing_other
from .processes import Team
from .run_folder import BLOCKS, RunFolder
from .terms import Term


BASE = "(base)"  # the task of the head's kernel
Capturing = Callable[[Job], AbstractContextManager[Callable[[int], tuple[Parts, Tensor]]]]


@dataclass
class Result:
    """Blocks of every candidate (lazy where they do not fit into memory) and what belongs to them."""

    outputs: Tensor  # (N, C) float64
    blocks: Mapping[str, Tensor]
    base: Tensor
    labels: Tensor | None  # (N,)
    spread: dict[str, float]
    ways: dict[str, str]
    zero: list[str]  # candidates whose block is zero
    files: dict[str, str]  # the file of each block in the folder, where there are files
    record: dict[str, Any] = field(default_factory=dict)  # for the provenance


class Run:
    """Parts of all batches first, then one kernel after the other; each step is divided over the team."""

    def __init__(
        self, job: Job, team: Team, folder: RunFolder, limit: int | None, product_bytes: int, progress: bool
    ) -> None:
        self.job, self.team, self.folder = job, team, folder
        self.limit, self.product_bytes, self.progress = limit, product_bytes, progress
        self.plan: MemoryPlan | None = None
        self.labels: Tensor | None = None
        self.resumed = {"batches": 0, "blocks": 0}
        in_files = folder.kept or team.size > 1
        sizes = [batch.size for batch in job.batches]
        self.linear = PartStore("", sizes, folder, in_files, job.device)
        self.other = PartStore("-other", sizes, folder, in_files, job.device)
        self.tasks = [*job.candidates, *([BASE] if job.has_head else [])]
        self.results: dict[str, tuple[Tensor, dict[str, Any]]] = {}  # where they are held

    def is_finished(self) -> bool:
        """Whether the folder holds the whole result already."""
        return all(file in self.folder.finished for file in [INDEX, *map(self._file_of, self.tasks)])

    def load(self) -> ModuleKernels:
        """The result of the finished run that the folder holds."""
        kernels = ModuleKernels.load(self.folder.path)
        self._make_plan(kernels.num_outputs)
        blocks = kernels.blocks
        if self._plan().blocks_in_memory:
            blocks = {name: block.clone() for name, block in blocks.items()}
        storage = self._storage(blocks) | {"resumed_batches": len(self.job.batches), "resumed_blocks": len(self.tasks)}
        return replace(kernels, blocks=blocks, provenance={**kernels.provenance, "storage": storage})

    def complete(self) -> Result:
        start = time.perf_counter()
        self._capture("Jacobians", self.linear, capturing)
        if self.job.head_other:
            self._capture("other head parameters", self.other, capturing_other)
        passes = time.perf_counter()
        self._take_grams()
        result = self.team.each("collecting", self._collect)  # nobody goes on before all have what they need
        result.record = {
            "num_batches": len(self.job.batches),
            "ways": result.ways,
            "storage": self._storage(result.blocks),
            "processes": self.team.size,
            "seconds_passes": passes - start,
            "seconds_gram": time.perf_counter() - passes,
        }
        return result

    def _storage(self, blocks: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "parts": "files" if self.linear.in_files else "memory",
            "blocks": "memory" if isinstance(blocks, dict) else "files",
            "max_memory": self.limit,
            "product_bytes": self._plan().product_bytes,
            "resumed_batches": self.resumed["batches"],
            "resumed_blocks": self.resumed["blocks"],
        }

    def _capture(self, stage: str, store: PartStore, capturing: Capturing) -> None:
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
                parts, outputs = capture(number)
                return store.put(number, parts, outputs), outputs.shape[1]

            def done(results: list[tuple[dict[str, str], int]]) -> None:
                for files, num_outputs in results:
                    self.folder.record(files)
                    self._make_plan(num_outputs)
                limit = self._plan().parts_bytes
                if limit is not None:
                    store.keep_within(limit - (self.linear.held_bytes if store is self.other else 0))

            self.team.divide(stage, missing, work, done, self.progress, "batch")
        for number in missing:
            store.adopt(number)

    def _make_plan(self, num_outputs: int) -> None:
        """As soon as the number of outputs is known; what cannot work fails here, before the long part."""
        if self.plan is not None:
            return
        rows, blocks = num_outputs * sum(batch.size for batch in self.job.batches), len(self.job.candidates)
        self.plan = MemoryPlan.make(self.limit, rows, blocks, self.product_bytes)
        self.labels = gather_labels(list(self.job.batches), torch.empty(0, num_outputs), self.job.function)
        if self.team.size > 1 and not self.folder.kept and not self.plan.blocks_in_memory:
            raise PeftLinearError(
                f"{blocks} blocks of {format_memory(8 * rows**2)} do not fit max_memory, so they stay in files, and "
                "those of several processes need a `folder`; pass one that all processes share, or raise max_memory"
            )

    def _plan(self) -> MemoryPlan:
        assert self.plan is not None
        return self.plan

    def _blocks_in_files(self) -> bool:
        return self.folder.kept or self.team.size > 1 or not self._plan().blocks_in_memory

    def _file_of(self, task: str) -> str:
        return f"{BLOCKS}/{self.tasks.index(task):05d}.safetensors"

    def _take_grams(self) -> None:
        missing = [task for task in self.tasks if self._file_of(task) not in self.folder.finished]
        self.resumed["blocks"] = len(self.tasks) - len(missing)
        if self.team.size > 1:  # the dearest first, so that those of one round take about the same time
            missing.sort(key=lambda task: -sum(t.features * t.channels for t in self._terms(task).values()))

        def work(task: str) -> dict[str, str]:
            gram, spread, way = self._kernel(task)
            about = {"spread": spread, "way": way, "zero": not bool(gram.any())}
            if not self._blocks_in_files():
                self.results[task] = gram, about
                return {}
            name = self._file_of(task)
            return {name: self.folder.write(name, {"block": gram}, {"about": json.dumps(about)})}

        def done(results: list[dict[str, str]]) -> None:
            for files in results:
                self.folder.record(files)

        self.team.divide("Gram matrices", missing, work, done, self.progress, "module")

    def _terms(self, task: str) -> dict[str, Term]:
        """Terms of a task by key; those of the other head parameters, which are no linear map's, not among them."""
        names = self.job.head_linear if task == BASE else [task]
        return {
            key: term for name in names for key, term in zip(self.job.keys(name), self.job.terms[name], strict=True)
        }

    def _kernel(self, task: str) -> TermKernel:
        """The sum over the terms of a task; the spread is that of its first term, the only one with several draws."""
        terms = self._terms(task)
        stores = dict.fromkeys(terms, self.linear)
        if task == BASE and self.job.head_other:
            width = sum(parameter.numel() for parameter in self.job.head_other)
            terms[OTHER], stores[OTHER] = Term(_same, _same, features=width, channels=1), self.other
        total: Tensor | None = None
        spread, ways = None, []
        for key, term in terms.items():
            parts = stores[key].parts(key, term.features, term.channels)
            if parts is None:
                ways.append("zero")
                continue
            kernel = term_kernel(parts, term, self._plan().product_bytes, self.job.signed, self.job.product_dtype)
            del parts
            stores[key].release([key])
            spread = kernel.spread if spread is None else spread
            ways.append(kernel.way)
            total = kernel.gram if total is None else total.add_(kernel.gram)
        if total is None:
            n = sum(outputs.numel() for outputs in self.linear.outputs.values())
            total = torch.zeros(n, n, dtype=torch.float64)
        return TermKernel(total, spread, "+".join(ways))

    def _collect(self) -> Result:
        values = torch.cat([self.linear.outputs[number] for number in range(len(self.job.batches))])
        n = values.numel()
        files: dict[str, str] = {}
        if self._blocks_in_files():
            files = {task: self._file_of(task) for task in self.tasks}
            about = {task: self._about(file) for task, file in files.items()}
            places = {task: (self.folder.path / file, "block") for task, file in files.items()}
            blocks: Mapping[str, Tensor] = BlockFiles(places, (n, n), self.folder.owner)
            base = blocks[BASE].clone() if BASE in blocks else None
            if self._plan().blocks_in_memory:
                blocks = {name: blocks[name].clone() for name in self.job.candidates}
            else:
                blocks = BlockFiles({name: places[name] for name in self.job.candidates}, (n, n), self.folder.owner)
        else:
            about = {task: about for task, (_, about) in self.results.items()}
            blocks = {task: gram for task, (gram, _) in self.results.items()}
            base = blocks.pop(BASE, None)
        names = list(self.job.candidates)
        return Result(
            outputs=values,
            blocks=blocks,
            base=torch.zeros(n, n, dtype=torch.float64) if base is None else base,
            labels=self.labels,
            spread={name: about[name]["spread"] for name in names if about[name]["spread"] is not None},
            ways={("base" if task == BASE else task): about[task]["way"] for task in self.tasks},
            zero=[name for name in names if about[name]["zero"]],
            files={name: file for name, file in files.items() if name != BASE},
        )

    def _about(self, name: str) -> dict[str, Any]:
        with open_file(self.folder.path / name) as file:
            return json.loads(file.metadata()["about"])


def _same(x: Tensor) -> Tensor:
    return x
