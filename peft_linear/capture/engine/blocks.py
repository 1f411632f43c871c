# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Finished kernels of a computation, by module and rank: in memory, or in one file each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.tensor_files import BlockFiles, open_file
from .products import MatrixKernel
from .run_folder import BLOCKS, RunFolder


BASE = "(base)"  # the task of the head's kernel, which is the same at every rank


@dataclass
class RankBlocks:
    """The blocks of every candidate at one rank (lazy where they do not fit into memory), and what belongs to them."""

    blocks: Mapping[str, Tensor]
    spread: dict[str, float]
    methods: dict[str, str]  # by which each kernel was computed
    zero: list[str]  # candidates whose block is zero
    files: dict[str, str]  # the file of each block in the rank's folder, where there are files


class BlockStore:
    """Kernels by task (a candidate, or `BASE`) and rank, in memory, or in files if `in_files` when they come."""

    def __init__(self, tasks: Sequence[str], folders: Mapping[int, str], folder: RunFolder, in_files: bool) -> None:
        """`folders`: the part of `folder` in which the result of each rank lies, "" or with a slash at its end."""
        self.tasks = tasks
        self.in_files = in_files
        self._folders = folders
        self._folder = folder
        self._held: dict[tuple[str, int], tuple[Tensor, dict[str, Any]]] = {}

    def files_of(self, task: str) -> dict[int, str]:
        """The file of a task's kernel, by rank."""
        name = f"{BLOCKS}/{self.tasks.index(task):05d}.safetensors"
        return {rank: name if task == BASE else f"{folder}{name}" for rank, folder in self._folders.items()}

    def is_finished(self, task: str) -> bool:
        """Whether the folder holds its kernels of every rank already."""
        return all(file in self._folder.finished for file in self.files_of(task).values())

    def put(self, task: str, kernels: Iterable[tuple[int, MatrixKernel]]) -> dict[str, str]:
        """Keeps kernels as they come, rank by rank; the files written for them, with their sha256."""
        files: dict[str, str] = {}
        for rank, kernel in kernels:
            about = {"spread": kernel.spread, "method": kernel.method, "zero": not bool(kernel.gram.any())}
            name = self.files_of(task)[rank]
            if not self.in_files:
                self._held[task, rank] = kernel.gram, about
            elif name not in files:
                files[name] = self._folder.write(name, {"block": kernel.gram}, {"about": json.dumps(about)})
            del kernel  # or it would be kept in memory until the next one is there
        return files

    def of_rank(self, rank: int, n: int, in_memory: bool) -> RankBlocks:
        """All blocks (n, n) of one rank; those in files are read if they are to be `in_memory`."""
        candidates = [task for task in self.tasks if task != BASE]
        about = {task: self._about(task, rank) for task in self.tasks}
        blocks: Mapping[str, Tensor]
        if not self.in_files:
            blocks = {task: self._held[task, rank][0] for task in candidates}
        else:
            places = {task: (self._folder.path / self.files_of(task)[rank], "block") for task in candidates}
            blocks = BlockFiles(places, (n, n), self._folder.owner)
            if in_memory:
                blocks = {task: blocks[task].clone() for task in candidates}
        files = {task: self.files_of(task)[rank].removeprefix(self._folders[rank]) for task in candidates}
        return RankBlocks(
            blocks=blocks,
            spread={task: about[task]["spread"] for task in candidates if about[task]["spread"] is not None},
            methods={("base" if task == BASE else task): about[task]["method"] for task in self.tasks},
            zero=[task for task in candidates if about[task]["zero"]],
            files=files if self.in_files else {},
        )

    def base(self, n: int) -> Tensor:
        """The kernel of the task head, (n, n), zeros where there is none."""
        if BASE not in self.tasks:
            return torch.zeros(n, n, dtype=torch.float64)
        rank, file = next(iter(self.files_of(BASE).items()))
        if not self.in_files:
            return self._held[BASE, rank][0]
        with open_file(self._folder.path / file) as opened:
            return opened.get_tensor("block").clone()

    def _about(self, task: str, rank: int) -> dict[str, Any]:
        if not self.in_files:
            return self._held[task, rank][1]
        with open_file(self._folder.path / self.files_of(task)[rank]) as file:
            return json.loads(file.metadata()["about"])
