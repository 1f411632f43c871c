# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels on disk: one file, or a folder with a file for each block and an index; each with a digest of its content.

The metadata of a file hold "format", "record" (everything that is no tensor, as JSON) and "digest" (sha256 of the
record and of every tensor). The record of an index holds the sha256 of every other file of its folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError
from torch import Tensor

from ..errors import FileError
from ..files import atomic_file, file_digest, tensor_digest
from ..schema import Place, as_json, check_same, parse_json, read_as
from .tensor_files import BlockFiles, LazyBlocks, open_file, save_file


FORMAT = "peft_linear.ModuleKernels/2"
EARLIER = "peft_linear.ModuleKernels/1"  # without a digest
INDEX = "kernels.safetensors"  # the file that is looked for in a folder
REMEDY = "compute the kernels again, or take another copy of the file"
_SMALL = ("base", "outputs", "labels")


class _Required(TypedDict):
    names: tuple[str, ...]
    num_parameters: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    output_kind: str
    space: str
    rank: int
    lora_alpha: float
    spread: Mapping[str, float]
    provenance: Mapping[str, Any]


class _Record(_Required, total=False):
    base_parameters: int
    files: Mapping[str, str]  # of each block, in a folder
    checksums: Mapping[str, str]  # sha256 of each of these files


def write_kernels(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    blocks: LazyBlocks | None = None,
) -> None:
    """Writes one file, whole or not at all. Lazy blocks are read twice: for the digest, and to be copied."""
    text = json.dumps(as_json(record, Place(os.fspath(path), "keep such values elsewhere")), allow_nan=False)

    def get(key: str) -> Tensor:
        return tensors[key] if key in tensors or blocks is None else blocks[key.removeprefix("block/")]

    keys = [*tensors, *(f"block/{name}" for name in blocks or ())]
    metadata = {"format": FORMAT, "record": text, "digest": tensor_digest(keys, get, about=text)}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata, blocks=blocks)


def read_kernels(
    path: str | os.PathLike, lazy: bool
) -> tuple[dict[str, Any], Mapping[str, Tensor], dict[str, Tensor]]:
    """The record, the blocks and the other tensors of what `ModuleKernels.save` or `save_index` wrote.

    Raises:
        FileError: see `ModuleKernels.load`.
    """
    file_path = _file_of(path)
    place = Place(repr(os.fspath(file_path)), REMEDY)
    try:
        with open_file(file_path) as file:
            record = _checked_record(file, place)
            names, files = record.pop("names"), record.pop("files", None)
            checksums = record.pop("checksums", {})
            small = {key: file.get_tensor(key) for key in _SMALL if key in file.keys() or key != "labels"}  # noqa: SIM118
            if files is None:
                places = {name: (file_path, f"block/{name}") for name in names}
            else:
                _check_files(file_path.parent, checksums)
                places = {name: (file_path.parent / _entry(files, name, place), "block") for name in names}
            blocks: Mapping[str, Tensor] = BlockFiles(places, tuple(small["base"].shape))
            if not lazy and files is None:
                blocks = {name: file.get_tensor(f"block/{name}") for name in names}
    except SafetensorError as error:
        raise FileError(f"{place.file} does not hold whole kernels: {error}; {REMEDY}") from error
    return record, blocks, small


def _file_of(path: str | os.PathLike) -> Path:
    if not os.path.exists(path):
        raise FileError(f"there is no file {os.fspath(path)!r}; pass the path that ModuleKernels.save wrote")
    if not os.path.isdir(path):
        return Path(path)
    if not (Path(path) / INDEX).is_file():
        raise FileError(
            f"the folder {os.fspath(path)!r} holds no {INDEX}: no kernels, those of several ranks (load one "
            "of its rank-... folders), or a computation that is not finished (run compute_ntk with the same "
            "arguments and folder to finish it)"
        )
    return Path(path) / INDEX


def _checked_record(file: Any, place: Place) -> dict[str, Any]:
    """The record of an open file whose digest is right; of an earlier format, without looking at one."""
    metadata = file.metadata() or {}
    if metadata.get("format") not in (FORMAT, EARLIER):
        raise FileError(f"{place.file} holds {metadata.get('format')!r}, expected {FORMAT!r}")
    text = metadata.get("record", "")
    if metadata["format"] == FORMAT:
        found = tensor_digest(file.keys(), file.get_tensor, about=text)
        check_same(metadata.get("digest", ""), found, place)
    return dict(read_as(_Record, parse_json(text, place), place))


def _check_files(folder: Path, checksums: Mapping[str, str]) -> None:
    for name, expected in checksums.items():
        try:
            found = file_digest(folder / name)
        except OSError as error:
            raise FileError(f"{os.fspath(folder / name)!r} cannot be read ({error}); {REMEDY}") from error
        check_same(expected, found, Place(repr(os.fspath(folder / name)), REMEDY))


def _entry(files: Mapping[str, str], name: str, place: Place) -> str:
    if name not in files:
        raise place.at("files").error(f"a mapping with {name!r}", f"one with {', '.join(files)}")
    return files[name]
