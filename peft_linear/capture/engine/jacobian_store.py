# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What is kept of every batch until the Gram matrices are taken: in memory, or in one file a batch.

A tensor that several Jacobians of a batch have in common, as the inputs of queries, keys and values, is kept once.
The folder of these files is called "parts".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...functional.gram import BatchJacobian
from ...kernels.tensor_files import open_file
from ..shared_inputs import identity
from .run_folder import PARTS, RunFolder


_ROWS, _INPUTS, _COTANGENTS, _OUTPUTS = "rows:", "inputs:", "cotangents:", "outputs"
_SHARED = "shared"  # metadata of a file: {a tensor that is not in it: the one that is the same}, as JSON


class JacobianStore:
    """Jacobians by batch and key: in memory until `keep_within` moves them into files, or in files from the start."""

    def __init__(self, name: str, sizes: Sequence[int], folder: RunFolder, in_files: bool, device: torch.device):
        self.in_files = in_files
        self.held_bytes = 0
        self.outputs: dict[int, Tensor] = {}  # of every batch, (B, C) float64
        self._name = name
        self._sizes = sizes  # examples of every batch
        self._folder = folder
        self._device = device
        self._held: dict[int, dict[str, BatchJacobian]] = {}
        self._uses: dict[int, Counter[tuple]] = {}  # of each tensor of a held batch, by its Jacobians
        self._stored: dict[int, dict[str, str]] = {}  # of batches in files: the tensor in the file, by name

    def file_of(self, number: int) -> str:
        return f"{PARTS}/{number:06d}{self._name}.safetensors"

    def put(self, number: int, jacobians: Mapping[str, BatchJacobian | None], outputs: Tensor) -> dict[str, str]:
        """Keeps the Jacobians of a batch and its outputs (B, C); the files written for it, with their sha256."""
        self.outputs[number] = outputs.detach().to("cpu", torch.float64)
        self._held[number] = {key: jacobian for key, jacobian in jacobians.items() if jacobian is not None}
        self._uses[number] = Counter(map(identity, _tensors(self._held[number].values())))
        self.held_bytes += _total_bytes(self._held[number].values())
        return self._write(number) if self.in_files else {}

    def keep_within(self, limit: int) -> None:
        """Moves everything into files, now and from now on, if it takes more than `limit` bytes."""
        if not self.in_files and self.held_bytes > limit:
            self.in_files = True
            for number in list(self._held):
                self._write(number)

    def adopt(self, number: int) -> None:
        """Reads the index of a batch's file that this process has not written itself."""
        if number in self._held or number in self._stored:
            return
        with open_file(self._folder.path / self.file_of(number)) as file:
            self._stored[number] = {name: name for name in file.keys()}  # noqa: SIM118
            self._stored[number] |= json.loads((file.metadata() or {}).get(_SHARED, "{}"))
            self.outputs[number] = file.get_tensor(_OUTPUTS).clone()

    def jacobians(self, key: str, features: int, channels: int) -> Sequence[BatchJacobian] | None:
        """Those of one key in the order of the batches, lazy where they lie in files; None where all are zero."""
        loaders = [self._loader(number, key) for number in range(len(self._sizes))]
        known = next((loader() for loader in loaders if loader is not None), None)
        if known is None:
            return None
        dtype = known.dtype if isinstance(known, Tensor) else known[0].dtype
        as_rows = isinstance(known, Tensor)
        del known
        return _Batches(
            [
                loader or partial(self._zeros, number, as_rows, features, channels, dtype)
                for number, loader in enumerate(loaders)
            ],
            in_files=bool(self._stored),
        )

    def release(self, keys: Sequence[str]) -> None:
        """Forgets Jacobians that are held in memory."""
        for number, held in self._held.items():
            for tensor in _tensors(held.pop(key) for key in keys if key in held):
                self._uses[number][identity(tensor)] -= 1
                self.held_bytes -= 0 if self._uses[number][identity(tensor)] else tensor.nbytes

    def _loader(self, number: int, key: str) -> Callable[[], BatchJacobian] | None:
        if number in self._stored:
            names = self._stored[number]
            found = f"{_ROWS}{key}" in names or f"{_INPUTS}{key}" in names
            return partial(self._load, number, key) if found else None
        jacobian = self._held[number].get(key)
        return None if jacobian is None else lambda: jacobian

    def _load(self, number: int, key: str) -> BatchJacobian:
        names = self._stored[number]
        with open_file(self._folder.path / self.file_of(number), str(self._device)) as file:
            if f"{_ROWS}{key}" in names:
                return file.get_tensor(names[f"{_ROWS}{key}"])
            return file.get_tensor(names[f"{_INPUTS}{key}"]), file.get_tensor(names[f"{_COTANGENTS}{key}"])

    def _zeros(self, number: int, as_rows: bool, features: int, channels: int, dtype: torch.dtype) -> BatchJacobian:
        """Zeros that take no memory."""
        size, outputs = self.outputs[number].shape
        zero = torch.zeros((), dtype=dtype, device=self._device)
        if as_rows:
            return zero.expand(size * outputs, features, channels)
        return zero.expand(size, 1, features), zero.expand(size, outputs, 1, channels)

    def _write(self, number: int) -> dict[str, str]:
        tensors = {_OUTPUTS: self.outputs[number]}
        held = self._held.pop(number)
        for key, jacobian in held.items():
            if isinstance(jacobian, Tensor):
                tensors[f"{_ROWS}{key}"] = jacobian
            else:
                tensors[f"{_INPUTS}{key}"], tensors[f"{_COTANGENTS}{key}"] = jacobian
        first: dict[tuple, str] = {}
        stored = {name: first.setdefault(identity(tensor), name) for name, tensor in tensors.items()}
        shared = {name: other for name, other in stored.items() if name != other}
        kept = {name: tensor for name, tensor in tensors.items() if name not in shared}
        file = self.file_of(number)
        checksum = self._folder.write(file, kept, {_SHARED: json.dumps(shared)} if shared else None)
        self.held_bytes -= _total_bytes(held.values())
        del self._uses[number]
        self._stored[number] = stored
        return {file: checksum}


class _Batches(Sequence[BatchJacobian]):
    def __init__(self, loaders: Sequence[Callable[[], BatchJacobian]], in_files: bool) -> None:
        self._loaders = loaders
        self.in_files = in_files

    def __len__(self) -> int:
        return len(self._loaders)

    def __getitem__(self, index: Any) -> Any:
        return self._loaders[index]()


def _tensors(jacobians: Iterable[BatchJacobian]) -> list[Tensor]:
    return [tensor for one in jacobians for tensor in ((one,) if isinstance(one, Tensor) else one)]


def _total_bytes(jacobians: Iterable[BatchJacobian]) -> int:
    """Of tensors that are all in memory; what several Jacobians share counts once."""
    return sum({identity(tensor): tensor.nbytes for tensor in _tensors(jacobians)}.values())
