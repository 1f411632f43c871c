# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all: into a temporary neighbour first, then renamed over the target."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from .errors import FileError


_REMEDIES = {
    errno.ENAMETOOLONG: "a name in the path is longer than the file system takes, often 255 bytes: shorten it",
    errno.ENOTDIR: "a parent in the path is a file: choose another path",
    errno.EEXIST: "a parent in the path is a file: choose another path",
    errno.EISDIR: "it is a folder: pass the path of a file",
    errno.EACCES: "you may not write there: change the permissions of its folder or choose another path",
    errno.EPERM: "you may not write there: change the permissions of its folder or choose another path",
    errno.EROFS: "the file system is read-only: choose another path",
    errno.ENOSPC: "the disk is full: free some space",
}


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; it replaces `path` when the block ends without an exception.

    Raises:
        FileError: the file cannot be made there. What the block raises is passed on as it is.
    """
    target = Path(path)
    if _is_folder(target):
        raise FileError(f"{target} is a folder; pass the path of a file")
    with _folders_for(target), _temporary_file(target) as temporary:
        yield temporary
        with _explained(target):
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)


@contextmanager
def atomic_directory(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it becomes `path` when the block ends without an exception.

    An old folder and the new one are exchanged in one step on Linux and macOS, so that at every moment one of the two
    is whole at `path`. Where the file system cannot do that the old one is first renamed to `.<name>….old/replaced`
    beside it; a process that is killed right then leaves it there. A link to a folder stays, its target is replaced.

    Raises:
        FileError: `path` is a file, exists and is not an empty folder while `overwrite` is false, or cannot be made.
    """
    target = Path(path)
    with _explained(target):
        target = Path(os.path.realpath(target)) if target.is_symlink() else target
        occupied = target.is_dir() and any(target.iterdir())
        file = os.path.lexists(target) and not target.is_dir()
    if file:
        raise FileError(f"{target} exists and is not a folder; choose another output path")
    if occupied and not overwrite:
        raise FileError(f"the folder {target} exists and is not empty; choose another one or pass overwrite=True")
    with _folders_for(target):
        with _explained(target):
            temporary = Path(tempfile.mkdtemp(prefix=_hidden(target), suffix=".tmp", dir=target.parent))
        try:
            yield temporary
            with _explained(target):
                os.chmod(temporary, 0o777 & ~_umask())
                _replace_folder(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes `content`, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def tensor_digest(names: Iterable[str], get: Callable[[str], Tensor], about: str = "") -> str:
    """sha256 of tensors by name, and of `about`: the same for every order, file format and metadata.

    Names, dtypes, shapes and bits count. One tensor is in memory at a time, besides what `get` keeps.
    """
    digest = hashlib.sha256(about.encode("utf-8", "surrogatepass"))
    for name in sorted(names):
        tensor = get(name).detach().cpu().contiguous()
        entry = repr((name, str(tensor.dtype), tuple(tensor.shape))).encode("utf-8", "surrogatepass")
        digest.update(b"\n%d:%b" % (len(entry), entry))
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_file(path: str | os.PathLike) -> bool:
    """Whether it is one; raises FileError for a path that cannot be."""
    with _explained(Path(path)):
        return Path(path).is_file()


def make_folder(path: str | os.PathLike) -> None:
    """Makes a folder and its parents, where they are missing; raises FileError where that cannot be."""
    with _explained(Path(path)):
        Path(path).mkdir(parents=True, exist_ok=True)


def file_digest(path: str | os.PathLike) -> str:
    """sha256 of a file. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _temporary_file(target: Path) -> Iterator[Path]:
    with _explained(target):
        handle, name = tempfile.mkstemp(prefix=_hidden(target), suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _folders_for(target: Path) -> Iterator[None]:
    """The missing parents of `target`; after an exception those that were made, and are empty, are gone again."""
    made: list[Path] = []
    try:
        with _explained(target):
            missing: list[Path] = []
            folder = target.parent
            while not folder.is_dir() and folder != folder.parent:
                missing.append(folder)
                folder = folder.parent
            for each in reversed(missing):
                _make_folder(each, made)
        yield
    except BaseException:
        for each in reversed(made):
            with suppress(OSError):
                os.rmdir(each)
        raise


def _make_folder(path: Path, made: list[Path]) -> None:
    """Makes a folder and lists it in `made`, unless another process has made it meanwhile."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        made.append(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """An error of the operating system, or of a path that cannot be, becomes a `FileError` with a remedy."""
    try:
        yield
    except FileError:
        raise
    except (OSError, ValueError) as error:
        remedy = _REMEDIES.get(getattr(error, "errno", None) or 0, "choose another path")
        raise FileError(f"cannot write {path} ({getattr(error, 'strerror', None) or error}); {remedy}") from error


def _is_folder(path: Path) -> bool:
    with _explained(path):
        return path.is_dir()


def _hidden(target: Path) -> str:
    return f".{target.name[:20]}."  # short: with what is added, a long name would be too long


def _replace_folder(new: Path, target: Path) -> None:
    """Puts `new` in the place of `target`; the old folder, if any, is removed or left at `new`."""
    if not target.is_dir():
        os.replace(new, target)
    elif not exchange(new, target):
        aside = Path(tempfile.mkdtemp(prefix=_hidden(target), suffix=".old", dir=target.parent))
        os.replace(target, aside / "replaced")
        try:
            os.replace(new, target)
        except BaseException:
            os.replace(aside / "replaced", target)
            os.rmdir(aside)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step that cannot be interrupted; False, and nothing done, where that cannot be."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform.startswith("linux") and hasattr(library, "renameat2"):
        here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return library.renameat2(here, first, here, second, flag) == 0  # type: ignore[union-attr]
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return library.renamex_np(first, second, 2) == 0  # type: ignore[union-attr]  # RENAME_SWAP
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
