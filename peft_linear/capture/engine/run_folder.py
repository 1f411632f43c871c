# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The folder of a computation: files that are whole or absent, a record of those that are finished, and resumption.

manifest.json             the fingerprint of the run
finished.jsonl            one line a finished file, with its sha256; a line cut short by a crash is ignored
parts/000012.safetensors  the Jacobians of one batch (rows, or their factors) and its outputs; removed at the end
blocks/00003.safetensors  the kernel of one module
kernels.safetensors       at the end: everything else, and which block lies where

Where several ranks are asked for, blocks and kernels of each lie in a folder of their own, rank-8/blocks/… and
rank-8/kernels.safetensors, which can be moved and loaded by itself; the kernel of the task head stays in blocks/.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from ...errors import FileError, PeftLinearError
from ...files import atomic_file, file_digest, is_file, make_folder, write_text
from ...kernels.module_kernels import ModuleKernels
from ...kernels.saving import INDEX
from ...kernels.tensor_files import save_file
from ...schema import Place, read_as, read_json
from .fingerprint import differences
from .processes import Team


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


MANIFEST, FINISHED, PARTS, BLOCKS = "manifest.json", "finished.jsonl", "parts", "blocks"
LOCK = ".lock"  # held while a process computes in the folder
FORMAT = "peft_linear.compute_ntk/1"


class _Manifest(TypedDict):
    format: str
    fingerprint: Mapping[str, Mapping[str, Any]]


class RunFolder:
    """A folder that the user named (`kept`: checksummed, recorded, resumable) or a temporary one, made when needed."""

    def __init__(self, team: Team, path: str | os.PathLike | None = None) -> None:
        self.kept = path is not None
        self.finished: dict[str, str] = {}  # relative path: sha256
        self._team = team
        self.owner: Any = None  # keeps a temporary folder alive
        self._path = None if path is None else Path(path)
        self._lock: Any = None

    @property
    def path(self) -> Path:
        if self._path is None:
            self.owner = _TemporaryFolder()
            self._path = self.owner.path
        return self._path

    def open(self, fingerprints: Sequence[Mapping[str, Any]]) -> None:
        """Agrees on one folder for all processes, and adopts what is finished in it: files whose checksum is right.

        `fingerprints` are those of all processes; a temporary folder of the main process serves where none is named.

        Raises:
            PeftLinearError: the processes have different models, data or arguments.
            FileError: the folder holds another run, or something else, or not every process can read it.
        """
        for rank, fingerprint in enumerate(fingerprints):
            found = differences(fingerprints[0], fingerprint, ("process 0", f"process {rank}"))
            if found:
                raise PeftLinearError(
                    f"process {rank} computes something else than process 0: it differs in {'; '.join(found)}. "
                    "Give every process the same model, arguments and batches, not its own shard: the work is divided "
                    "inside"
                )
        main = self._team.rank == 0
        path, token = self._team.gather(
            "opening the folder", lambda: self._start(fingerprints[0]) if main else ("", "")
        )[0]
        if not self.kept:
            self._path = Path(path)
        self._team.each("opening the folder", lambda: self._find(token))
        recorded = self._recorded()
        mine = list(recorded)[self._team.rank :: self._team.size]
        right = self._team.gather(
            "checking finished files", lambda: [name for name in mine if self._sha256(name) == recorded[name]]
        )
        self.finished = {name: recorded[name] for names in right for name in names}
        if main:
            (self.path / token).unlink(missing_ok=True)

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
        """Writes a file, whole or not at all; returns its sha256, to be passed to `record` ("" in a temporary one)."""
        with atomic_file(self.path / name) as temporary:
            return save_file(tensors, temporary, metadata, checksum=self.kept)

    def record(self, files: Mapping[str, str]) -> None:
        """Notes files that any of the processes has finished."""
        self.finished |= files
        if self.kept and self._team.rank == 0 and files:
            lines = [json.dumps({"file": name, "sha256": sha}) for name, sha in files.items()]
            with open(self.path / FINISHED, "a", encoding="utf-8") as record:
                record.write("".join(f"\n{line}" for line in lines))
                record.flush()
                os.fsync(record.fileno())

    def finish(self, results: Mapping[str, tuple[ModuleKernels, Mapping[str, str]]]) -> None:
        """At the end of a run, called by all processes: writes the index, removes what the result does not need.

        `results`: kernels and the file of each block, by the part of this folder in which they lie ("" for itself).
        """
        if self._path is None or self._team.rank != 0:
            return
        if self.kept:
            for folder, (kernels, files) in results.items():
                checksums = {file: self.finished[f"{folder}{file}"] for file in files.values()}
                kernels.save_index(self.path / folder, files, checksums)
                self.record({f"{folder}{INDEX}": self._sha256(f"{folder}{INDEX}") or ""})
        if self.kept or any(kernels.lazy for kernels, _ in results.values()):
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
        else:
            self.discard()

    def release(self) -> None:
        """Lets another process compute in the folder; also done when this one ends."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _take(self, path: Path) -> None:
        """Raises FileError where another process computes in the folder."""
        if is_file(path) or fcntl is None:
            return
        make_folder(path)
        lock = open(path / LOCK, "w", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (path / LOCK).exists() or (path / LOCK).stat().st_ino != os.fstat(lock.fileno()).st_ino:
                raise BlockingIOError  # its owner has just removed it
        except BlockingIOError as error:
            lock.close()
            raise FileError(
                f"another process computes kernels in the folder {os.fspath(path)!r}; wait for it to end and call "
                "again, or pass another folder"
            ) from error
        except OSError:  # a file system without locks
            lock.close()
            return
        self._lock = lock

    def discard(self) -> None:
        """Removes a temporary folder; one that the user named stays, for the run to be resumed."""
        if not self.kept and self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)

    def _start(self, fingerprint: Mapping[str, Any]) -> tuple[str, str]:
        """On the main process: checks or begins the folder; its path, and the name of a file to find it by."""
        path = self.path
        if self.kept:
            self._take(path)
            self._check(path, fingerprint)
        handle, token = tempfile.mkstemp(prefix=".shared-", suffix=".token", dir=path)
        os.close(handle)
        return os.fspath(path), Path(token).name

    def _check(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        if path.exists() and not path.is_dir():
            raise FileError(f"folder={os.fspath(path)!r} is a file; pass a folder, or a path that does not exist yet")
        if (path / MANIFEST).is_file():
            place = Place(os.fspath(path / MANIFEST), "pass another folder, or remove this one")
            value = read_json(path / MANIFEST, place)
            if isinstance(value, dict) and value.get("format") != FORMAT:
                raise FileError(f"{place.file} holds {value.get('format')!r}, expected {FORMAT!r}; {place.remedy}")
            there = read_as(_Manifest, value, place)
            found = differences(there["fingerprint"], fingerprint, ("there", "here"))
            if found:
                raise FileError(
                    f"the folder {os.fspath(path)!r} holds the run of something else: it differs in "
                    f"{'; '.join(found)}. Pass the same model, data and arguments to resume it, or another folder"
                )
            for unfinished in [*path.glob("**/.*.tmp"), *path.glob(".*.token")]:
                unfinished.unlink(missing_ok=True)
        elif path.is_dir() and any(not _is_leftover(entry.name) for entry in path.iterdir()):
            raise FileError(
                f"the folder {os.fspath(path)!r} is not empty and holds no run of compute_ntk; pass another one"
            )
        else:
            write_text(path / MANIFEST, json.dumps({"format": FORMAT, "fingerprint": fingerprint}, indent=1))

    def _recorded(self) -> dict[str, str]:
        path = self.path / FINISHED
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        entries = [entry for entry in map(_parse, lines) if entry is not None]
        return {entry["file"]: entry["sha256"] for entry in entries}

    def _sha256(self, name: str) -> str | None:
        try:
            return file_digest(self.path / name)
        except OSError:
            return None

    def _find(self, token: str) -> None:
        if not (self.path / token).exists():
            raise FileError(
                f"process {self._team.rank} cannot read what process 0 writes to {os.fspath(self.path)!r}; pass "
                "`folder` on a file system that all processes share"
            )


class _TemporaryFolder:
    """A folder that is removed with the last reference to this object, or with the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="peft_linear_ntk_"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _is_leftover(name: str) -> bool:
    """Whether a file is our lock, or what a killed process has left of one that it was writing."""
    return name == LOCK or (name.startswith(".") and name.endswith((".tmp", ".token")))


def _parse(line: str) -> dict[str, str] | None:
    """An entry of the record; None for an empty line, or one that a killed run has left unfinished."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    right = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("file", "sha256"))
    return entry if right and "\0" not in entry["file"] else None
