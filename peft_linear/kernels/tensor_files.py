# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Safetensors files written one tensor at a time, and blocks that are read when they are accessed."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FileError


Shape = tuple[int, ...]
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64"}
_CHUNK = 2**26  # bytes written at a time


class LazyBlocks(Mapping[str, Tensor]):
    """float64 blocks, all of one shape, that are not held in memory: each access reads or computes one."""

    def __init__(self, names: Mapping[str, Any], shape: Shape) -> None:
        self._names = dict(names)
        self.shape = shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


class BlockFiles(LazyBlocks):
    """Blocks in safetensors files: memory-mapped at each access, and freed with the last reference to it."""

    def __init__(self, places: Mapping[str, tuple[Path, str]], shape: Shape, owner: Any = None) -> None:
        """`places`: file and name of the tensor in it, by module; `owner` (a temporary folder) is kept as long."""
        super().__init__(places, shape)
        self._owner = owner

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._names[name]
        with open_file(path) as file:
            return file.get_tensor(key)


class BlocksOfRows(LazyBlocks):
    """The same rows and columns of each of other lazy blocks."""

    def __init__(self, blocks: LazyBlocks, rows: Tensor) -> None:
        super().__init__(dict.fromkeys(blocks), (len(rows), len(rows)))
        self._blocks, self._rows = blocks, rows

    def __getitem__(self, name: str) -> Tensor:
        return self._blocks[name][self._rows][:, self._rows]


class SomeBlocks(LazyBlocks):
    """Those of other lazy blocks that have these names."""

    def __init__(self, blocks: LazyBlocks, names: Iterable[str]) -> None:
        super().__init__(dict.fromkeys(names), blocks.shape)
        self._blocks = blocks

    def __getitem__(self, name: str) -> Tensor:
        return self._blocks[name]


class ScaledBlocks(LazyBlocks):
    """Other lazy blocks, each divided by its scale."""

    def __init__(self, blocks: LazyBlocks, scales: Mapping[str, float]) -> None:
        super().__init__(dict.fromkeys(blocks), blocks.shape)
        self._blocks, self._scales = blocks, scales

    def __getitem__(self, name: str) -> Tensor:
        return self._blocks[name] / self._scales[name]


def open_file(path: str | os.PathLike, device: str = "cpu") -> Any:
    """`safetensors.safe_open`.

    Raises:
        FileError: there is no such file, or it is not a whole safetensors file.
    """
    if not os.path.isfile(path):
        raise FileError(f"there is no file {os.fspath(path)!r}; was it, or its folder, moved or removed?")
    try:
        return safe_open(path, framework="pt", device=device)
    except SafetensorError as error:
        raise FileError(f"{os.fspath(path)!r} is not a whole safetensors file: {error}") from error


def save_file(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
    blocks: LazyBlocks | None = None,
    checksum: bool = False,
) -> str:
    """`safetensors.torch.save_file` without its copy of every tensor; returns the file's sha256 where asked for it.

    `blocks` are written after `tensors`, as "block/{name}", one in memory at a time.
    """
    entries: list[tuple[str, torch.dtype, Shape]] = [(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()]
    if blocks is not None:
        entries += [(f"block/{name}", torch.float64, blocks.shape) for name in blocks]
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, dtype, shape in entries:
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            if checksum:
                digest.update(data)

        write(struct.pack("<Q", len(text)))
        write(text)
        for key, _, _ in entries:
            tensor = tensors[key] if key in tensors else blocks[key.removeprefix("block/")]  # type: ignore[index]
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                data = flat.view(torch.uint8).numpy().data
                for start in range(0, len(data), _CHUNK):
                    write(data[start : start + _CHUNK])
    return digest.hexdigest() if checksum else ""
