# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Files and folders are written whole or not at all."""

from __future__ import annotations

import pytest

from peft_linear.errors import FileError
from peft_linear.files import atomic_directory, atomic_file, write_text


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "a" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    write_text(path, "newer")
    assert path.read_text() == "newer"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_an_exception_leaves_the_old_file_and_no_trace(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "folder"
    with atomic_directory(path) as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises(FileError, match="exists and is not empty"), atomic_directory(path):
        pass
    with pytest.raises(RuntimeError), atomic_directory(path, overwrite=True) as temporary:
        (temporary / "two").write_text("2")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["one"]
    with atomic_directory(path, overwrite=True) as temporary:
        (temporary / "two").write_text("2")
    assert [p.name for p in path.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="exists and is not a folder"), atomic_directory(tmp_path / "file"):
        pass
