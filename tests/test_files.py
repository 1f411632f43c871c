# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile

import pytest
import torch

from peft_linear.errors import FileError
from peft_linear.files import atomic_directory, atomic_file, exchange, tensor_digest, write_bytes, write_text


class Killed(BaseException):
    """What a process that is killed would not live to see."""


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed"])
def exchanges(request, monkeypatch):
    """Whether the file system can exchange two folders in one step."""
    if not request.param:
        monkeypatch.setattr("peft_linear.files.exchange", lambda one, other: False)
    elif os.name != "posix":
        pytest.skip("folders cannot be exchanged here")
    return request.param


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


def test_a_folder_is_replaced_as_a_whole(tmp_path, exchanges):
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


def test_two_folders_are_exchanged_in_one_step(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "one", tmp_path / "other")
    assert os.listdir(tmp_path / "one") == ["other"] and os.listdir(tmp_path / "other") == ["one"]
    assert not exchange(tmp_path / "one", tmp_path / "missing")
    assert os.listdir(tmp_path / "one") == ["other"]


def steps_of_replacing(folder, monkeypatch, kill_at=None):
    """Replaces `folder`; every call of the operating system from number `kill_at` on raises. Returns their number."""
    count = 0

    def counted(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if kill_at is not None and count >= kill_at:
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, names in (
            (os, ("replace", "rename", "unlink", "rmdir", "mkdir", "chmod")),
            (shutil, ("rmtree",)),
            (tempfile, ("mkdtemp",)),
        ):
            for name in names:
                patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr("peft_linear.files.exchange", counted(exchange_of_now()))
        with atomic_directory(folder, overwrite=True) as temporary:
            (temporary / "file").write_text("new")
            (temporary / "more").write_text("new")
    return count


def exchange_of_now():
    from peft_linear import files

    return files.exchange


def test_at_every_step_the_old_or_the_new_folder_is_whole(tmp_path, monkeypatch, exchanges):
    def made(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
        return tmp_path / name

    steps = steps_of_replacing(made("whole"), monkeypatch)
    assert steps >= 3
    for step in range(1, steps + 1):
        folder = made(f"at{step}")
        with pytest.raises(Killed):
            steps_of_replacing(folder, monkeypatch, kill_at=step)
        if not folder.exists():  # where folders cannot be exchanged: the old one is beside, whole
            assert not exchanges
            (folder,) = tmp_path.glob(f".at{step}.*.old/replaced")
        content = {path.name: path.read_text() for path in folder.iterdir()}
        assert content in ({"file": "old"}, {"file": "new", "more": "new"})


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_linear.files.exchange", lambda one, other: False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    replace = os.replace

    def fail_once(source, target):
        if target == tmp_path / "folder" and source.suffix == ".tmp":
            raise OSError(errno.EBUSY, "busy")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(FileError, match="cannot write .*busy"), atomic_directory(tmp_path / "folder", overwrite=True):
        pass
    assert os.listdir(tmp_path / "folder") == ["old"] and os.listdir(tmp_path) == ["folder"]


def test_a_link_to_a_folder_stays_a_link(tmp_path, exchanges):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with atomic_directory(tmp_path / "link", overwrite=True) as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "there") == ["new"]


LONG = "x" * 300


@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), lambda path: make_folder(path)])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        (LONG, r"cannot write .*x \(File name too long\); a name in the path is longer than the file system takes"),
        (f"new/{LONG}/file", r"File name too long\); a name .* shorten it"),
        ("new/a/b/" + LONG, r"File name too long"),
        ("file/below", "a parent in the path is a file: choose another path"),
        ("file/far/below", "a parent in the path is a file: choose another path"),
        ("nul\0", "null byte.*choose another path"),
    ],
)
def test_a_path_that_cannot_be_is_an_error_with_a_remedy_and_leaves_nothing(tmp_path, write, path, message):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match=message):
        write(tmp_path / path)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def make_folder(path):
    with atomic_directory(path):
        pass


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * 251])
def test_the_longest_names_that_the_file_system_takes_are_written(tmp_path, name):
    write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]
    make_folder(tmp_path / "in" / name)
    assert os.listdir(tmp_path / "in") == [name]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "you may not write there: change the permissions"),
        (errno.EPERM, "you may not write there: change the permissions"),
        (errno.EROFS, "the file system is read-only: choose another path"),
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EIO, "choose another path"),
    ],
)
@pytest.mark.parametrize("function", ["os.mkdir", "tempfile.mkstemp", "tempfile.mkdtemp", "os.replace"])
def test_what_the_operating_system_refuses_is_an_error_with_a_remedy(tmp_path, monkeypatch, number, remedy, function):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(function, refuse)
    with pytest.raises(FileError, match=rf"cannot write .*{os.strerror(number)}\); {remedy}"):
        if function == "tempfile.mkdtemp":
            make_folder(tmp_path / "new" / "folder")
        else:
            write_text(tmp_path / "new" / "file", "x")
    monkeypatch.undo()
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(FileError, match="you may not write there"):
        write_text(tmp_path / "closed" / "new" / "file", "x")


def test_a_folder_in_the_way_of_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="folder is a folder; pass the path of a file"):
        write_text(tmp_path / "folder", "x")


def test_an_error_of_the_writer_is_passed_on_and_new_folders_are_gone(tmp_path):
    with pytest.raises(OSError, match="disk full"), atomic_file(tmp_path / "a" / "b" / "file"):
        raise OSError("disk full")
    assert not os.listdir(tmp_path)
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "a" / "b"):
        (tmp_path / "a" / "another's").touch()
        raise RuntimeError
    assert os.listdir(tmp_path / "a") == ["another's"]


def test_a_parent_that_another_process_makes_meanwhile(tmp_path, monkeypatch):
    mkdir = os.mkdir

    def late(path, *args, **kwargs):
        mkdir(path, *args, **kwargs)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "mkdir", late)
    write_bytes(tmp_path / "a" / "b" / "file", b"x")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"x"


def digest(tensors, about=""):
    return tensor_digest(tensors, tensors.__getitem__, about)


def test_the_digest_of_tensors_depends_on_every_bit_and_on_no_order():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0), "c": torch.zeros(0, 4)}
    first = digest(tensors)
    assert digest(dict(reversed(tensors.items()))) == first == digest({k: t.clone() for k, t in tensors.items()})
    others = [
        tensors | {"a": tensors["a"].view(3, 2)},
        tensors | {"a": tensors["a"].to(torch.bfloat16)},
        tensors | {"a": tensors["a"].view(torch.int32)},
        tensors | {"b": torch.tensor(-1.0)},
        tensors | {"c": torch.zeros(0, 5)},
        {"a": tensors["a"], "b": tensors["b"]},
        {"a": tensors["b"], "b": tensors["a"], "c": tensors["c"]},
        {"\ud800": tensors["a"], "b": tensors["b"], "c": tensors["c"]},
    ]
    found = [first, digest(tensors, "about"), *map(digest, others)]
    assert len(set(found)) == len(found)
