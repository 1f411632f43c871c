# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels that were changed after they were saved are refused, in one file and in a folder; earlier files load."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peft_linear.errors import FileError
from peft_linear.kernels import ModuleKernels
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same kernels in a file and in a folder."""
    folder = tmp_path_factory.mktemp("kernels")
    kernels = ntk(
        small.seeded(small.bert),
        small.text_batches(),
        targets=["query"],
        draws=2,
        folder=folder / "run",
        max_memory=2**20,
    )
    kernels.save(folder / "file")
    return folder


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_flipped_bit_of_a_file_is_an_error(saved, lazy, tmp_path):
    content, draw = (saved / "file").read_bytes(), random.Random(int(lazy))
    bits = draw.sample(range(8 * len(content)), 60) + draw.sample(range(8 * 4000), 240)  # the header is 1 % of it
    for bit in bits:
        (tmp_path / "file").write_bytes(content)
        flip(tmp_path / "file", bit)
        with pytest.raises(FileError):
            ModuleKernels.load(tmp_path / "file", lazy=lazy)
    assert ModuleKernels.load(saved / "file", lazy=lazy).names


def test_a_flipped_bit_of_any_file_that_is_read_of_a_folder_is_an_error(saved):
    index = saved / "run" / "kernels.safetensors"
    files = [index, *sorted((saved / "run" / "blocks").iterdir())[:2]]  # the third is the head's: the index has it
    draw = random.Random(0)
    for path in files:
        for bit in draw.sample(range(8 * path.stat().st_size), 40):
            flip(path, bit)
            with pytest.raises(FileError):
                ModuleKernels.load(saved / "run")
            flip(path, bit)
    files[1].rename(saved / "elsewhere")
    with pytest.raises(FileError, match="cannot be read.*compute the kernels again"):
        ModuleKernels.load(saved / "run")
    (saved / "elsewhere").rename(files[1])
    expected = ModuleKernels.load(saved / "file")
    assert torch.equal(ModuleKernels.load(saved / "run").subset(), expected.subset())


def test_the_error_says_that_it_was_changed(saved, tmp_path):
    content = (saved / "file").read_bytes()
    (tmp_path / "file").write_bytes(content)
    flip(tmp_path / "file", 8 * len(content) - 3)
    with pytest.raises(FileError, match="changed after it was saved: its checksum is .*; compute the kernels again"):
        ModuleKernels.load(tmp_path / "file")


def earlier(saved, path, **changes):
    """The kernels of `saved` as an earlier version wrote them, without a digest."""
    with safe_open(saved / "file", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["record"]) | changes
    record = {key: value for key, value in record.items() if value is not None}
    save_file(tensors, path, {"format": "peft_linear.ModuleKernels/1", "record": json.dumps(record)})


def test_a_file_of_an_earlier_version_loads(saved, tmp_path):
    earlier(saved, tmp_path / "file", base_parameters=None)
    kernels, expected = ModuleKernels.load(tmp_path / "file"), ModuleKernels.load(saved / "file")
    assert torch.equal(kernels.subset(), expected.subset()) and kernels.base_parameters == 0
    assert kernels.provenance == expected.provenance and kernels.spread == expected.spread
    assert kernels.shapes == expected.shapes and kernels.num_parameters == expected.num_parameters


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"names": None}, "names"),
        ({"names": ["other"]}, "does not hold whole kernels"),
        ({"rank": "8"}, "rank must be"),
        ({"shapes": {"a": [1]}}, "shapes"),
        ({"unknown": 1}, "unknown"),
        ({"names": [], "files": {}, "shapes": 3}, "shapes"),
        ({"files": {"other": "x"}}, "files must be a mapping with"),
    ],
)
def test_a_record_that_is_not_one_is_an_error(saved, tmp_path, changes, message):
    earlier(saved, tmp_path / "file", **changes)
    with pytest.raises(FileError, match=message):
        ModuleKernels.load(tmp_path / "file")
