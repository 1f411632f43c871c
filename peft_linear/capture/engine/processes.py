# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Several processes that compute one result: how work is divided, and how a failure of one ends it for all."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from tqdm.auto import tqdm

from ...errors import ProcessError


T = TypeVar("T")
_groups: weakref.WeakKeyDictionary[Any, Any] = (
    weakref.WeakKeyDictionary()
)  # the default process group -> the one for messages
PATIENCE = timedelta(minutes=30)  # that processes wait for each other: longer than one batch or one kernel takes


class Team:
    """The processes of this run; a single process is a team of one, and does not use torch.distributed."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group

    @classmethod
    def assemble(cls) -> Team:
        """All processes of the default process group, or of the launcher that started this process.

        Under `accelerate launch` or torchrun the process group is set up through accelerate where it is not yet.
        Messages go over a group of their own with the gloo back end, so that they need no device. It lasts as long as
        the default group: destroying it right after a message can deadlock (observed with torch 2.6).

        Raises:
            ProcessError: the other processes do not answer.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
                return cls()
            PartialState(cpu=not torch.cuda.is_available() or _flag("ACCELERATE_USE_CPU"))
            if not dist.is_initialized():  # accelerate was initialised before, without CPU processes
                dist.init_process_group("gloo", timeout=PATIENCE)
        if dist.get_world_size() == 1:
            return cls()
        if dist.group.WORLD not in _groups:
            try:
                _groups[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=PATIENCE)
            except RuntimeError as error:
                raise ProcessError(
                    f"process {dist.get_rank()} waited {PATIENCE} for the others; call compute_ntk on all processes, "
                    "or with resources=Resources(distributed=False) on those that are to work alone"
                ) from error
        return cls(dist.get_rank(), dist.get_world_size(), _groups[dist.group.WORLD])

    def each(self, stage: str, work: Callable[[], T]) -> T:
        """`work()` on every process, and its own result to each; fails as `gather` does."""
        own: list[T] = []
        self.gather(stage, lambda: own.append(work()))
        return own[0]

    def gather(self, stage: str, work: Callable[[], T]) -> list[T]:
        """`work()` on every process; what each of them returned, in order of rank.

        If one raises, all do: the one its own exception, the others a ProcessError that quotes it.

        Raises:
            ProcessError: another process failed, died, or did not answer in time.
        """
        if self.size == 1:
            return [work()]
        value, failure = None, None
        try:
            value = work()
        except Exception as error:
            failure = error
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        answers: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(answers, (value, message), group=self._group)
        except RuntimeError as error:
            _groups.clear()  # the group is unusable now
            if failure is not None:
                raise failure from error
            raise ProcessError(
                f"a process of this run died or did not answer within {PATIENCE}, noticed by process {self.rank} "
                f"in the stage {stage!r}; see the other processes' output for the reason, and start all of them again"
            ) from error
        if failure is not None:
            raise failure
        for rank, (_, message) in enumerate(answers):
            if message is not None:
                raise ProcessError(
                    f"process {rank} failed in the stage {stage!r}, which ends the run of all: {message}"
                )
        return [value for value, _ in answers]

    def divide(
        self,
        stage: str,
        tasks: Sequence[T],
        work: Callable[[T], Any],
        done: Callable[[list[Any]], None],
        progress: bool,
        unit: str,
    ) -> None:
        """`work` on every task, in rounds of one task a process; after each, `done(results)` on all processes."""
        with tqdm(total=len(tasks), desc=stage, unit=unit, disable=not progress or self.rank != 0) as bar:
            for start in range(0, len(tasks), self.size):
                mine = tasks[start + self.rank : start + self.rank + 1]
                results = list(chain.from_iterable(self.gather(stage, partial(_all, work, mine))))
                self.each(stage, partial(done, results))
                bar.update(len(results))


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "y", "on")


def _all(work: Callable[[T], Any], tasks: Sequence[T]) -> list[Any]:
    return [work(task) for task in tasks]
