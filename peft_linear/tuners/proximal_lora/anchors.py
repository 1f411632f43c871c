# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The anchor θ0 of an adapter: its factors at the pretrained model, in memory and in a file beside the adapter.

`adapter_model.safetensors` has LoRA's tensor names and nothing else, so that every LoRA consumer can read it. The
anchor is saved beside it in `proximal_anchor.safetensors`: the initial A of every module (`<module>.lora_A`), and the
initial B only where it was not zero (`<module>.lora_B`). That file is read only to continue training. It holds the
sha256 of its own content and of the adapter's weights (tensors by name, whatever the file format), and is believed
only if both are right. It is removed before new weights are written, so that a save that is interrupted leaves no
anchor beside weights of another save.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import FileError
from ...files import atomic_file, tensor_digest
from ...schema import Place, check_same, parse_json, read_as, shortened


ANCHOR_NAME = "proximal_anchor.safetensors"
WEIGHT_NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
_SHARDS = "adapter_model-*-of-*.safetensors"
_FORMAT, _EARLIER_FORMAT = "2", "1"
_EARLIER_KEYS = {"format", "proximal_anchor", "modules"}
_KEYS = {*_EARLIER_KEYS, "adapter_sha256", "sha256"}
_REMEDY = (
    f"restore both files of one save; or delete {ANCHOR_NAME}, load the adapter, and train on from a guess (with a "
    "warning) or call peft_linear.tuners.proximal_lora.reset_proximal_anchor(model), which makes the loaded weights "
    "the anchor"
)


@dataclass
class FactorAnchor:
    """The initial values of the two factors of one module; `None` stands for zeros."""

    a: Tensor | None  # shaped as lora_A
    b: Tensor | None  # shaped as lora_B

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> FactorAnchor:
        """A copy of the present factors, gathered if they are sharded; zeros take no memory."""
        return cls(_copy_unless_zero(a), _copy_unless_zero(b))

    @classmethod
    def continuing(cls, a: Tensor, b: Tensor, initial: FactorAnchor) -> FactorAnchor:
        """A guess of the anchor of weights that were trained elsewhere and came without theirs.

        `initial` is the anchor of a new adapter with the same configuration. Where one of its factors is zero, so is
        the product BA at the pretrained model: that factor is anchored at zero (exact), the other at its present value
        (a guess). Where neither is zero (PiSSA and similar schemes), the initial factors follow from the base weights.
        """
        if initial.a is not None and initial.b is not None:
            return initial
        return cls(
            None if initial.a is None else a.detach().clone(),
            None if initial.b is None else b.detach().clone(),
        )

    def follow(self, a: Tensor, b: Tensor) -> None:
        """Moves the anchor to the device and dtype of the factors."""
        if self.a is not None and (self.a.device != a.device or self.a.dtype != a.dtype):
            self.a = self.a.to(device=a.device, dtype=a.dtype)
        if self.b is not None and (self.b.device != b.device or self.b.dtype != b.dtype):
            self.b = self.b.to(device=b.device, dtype=b.dtype)


@dataclass(frozen=True)
class StoredAnchors:
    """What an anchor file holds: the anchors, and the digest of the weights they were saved with."""

    anchors: dict[str, FactorAnchor]
    weights: str | None  # None: written by an earlier version, which kept no digest


@dataclass(frozen=True)
class AnchorSource:
    """The folder or Hub repository that an adapter was loaded from."""

    path: str
    hub_kwargs: Mapping[str, Any]
    seen: str | None = None  # checksum of the anchor file when the weights were loaded; None: not looked at

    def seen_now(self) -> AnchorSource:
        """This source, to be read later: a folder's anchor that is replaced until then is refused."""
        return replace(self, seen=self._checksum()) if os.path.isdir(self.path) else self

    def _checksum(self) -> str:
        file = self.path_of(ANCHOR_NAME)
        try:
            return "none" if file is None else (_open_tensors(file).metadata() or {}).get("sha256", "none")
        except (SafetensorError, OSError):
            return "none"

    def exists(self) -> bool:
        """Whether there is an anchor file."""
        return self.path_of(ANCHOR_NAME) is not None

    def read(self, shapes: Mapping[str, tuple[torch.Size, torch.Size]]) -> dict[str, FactorAnchor] | None:
        """The anchors saved with the adapter's weights, or None if there is no such file.

        Warns for a file of an earlier version, of which it cannot be checked that it belongs to the weights.

        Args:
            shapes: Of the factors A and B in memory, by module.

        Raises:
            FileError: the file cannot be read or was changed, or does not belong to the adapter beside it.
        """
        file = self.path_of(ANCHOR_NAME)
        if file is None:
            return None
        if self.seen is not None and self.seen != self._checksum():
            raise _foreign(
                self.path, "it was replaced after the adapter was loaded from there; load the adapter again"
            )
        stored = read_anchors(file)
        _check_factors(stored.anchors, shapes, self.path)
        if stored.weights is None:
            warnings.warn(
                f"{ANCHOR_NAME} at {self.path} was written by an earlier version of peft_linear: it cannot be checked "
                "whether it belongs to the adapter's weights beside it. Save the adapter again to have that checked"
            )
        else:
            self._check_weights(stored.weights)
        return stored.anchors

    def _check_weights(self, expected: str) -> None:
        files = self._weight_files()
        if not files:
            warnings.warn(f"found no weights beside {ANCHOR_NAME} at {self.path} to compare it with")
        elif weights_digest(files) != expected:
            raise _foreign(
                self.path,
                f"{files[0].name} is not what it was saved with (edited, saved again in another precision, of another "
                "adapter, damaged, or the save was interrupted)",
            )

    def _weight_files(self) -> list[Path]:
        """In the order in which peft looks for them."""
        for name in WEIGHT_NAMES:
            if file := self.path_of(name):
                return [file]
        return sorted(self._folder().glob(_SHARDS)) if os.path.isdir(self.path) else []

    def _folder(self) -> Path:
        return Path(self.path) / (self.hub_kwargs.get("subfolder") or "")

    def path_of(self, name: str) -> Path | None:
        """The file of that name beside the adapter's weights; None where there is none."""
        folder = self._folder()
        if folder.is_dir() or os.path.isdir(self.path):
            return folder / name if (folder / name).is_file() else None
        try:
            return Path(hf_hub_download(self.path, name, **self.hub_kwargs))
        except (EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled):
            return None
        except Exception as error:
            warnings.warn(f"could not look for {name} at {self.path}: {error}")
            return None


def save_anchors(folder: str | os.PathLike, anchors: Mapping[str, FactorAnchor], weights_name: str) -> None:
    """Writes the anchors beside weights that were just written, with the digest of those.

    Raises:
        FileError: the weights cannot be read back.
    """
    write_anchors(Path(folder) / ANCHOR_NAME, anchors, weights_digest([Path(folder) / weights_name]))


def write_anchors(path: str | os.PathLike, anchors: Mapping[str, FactorAnchor], weights: str) -> None:
    """Writes the anchors of an adapter atomically; what is read back is equal bit for bit.

    Args:
        path: The file.
        anchors: By module.
        weights: `weights_digest` of the adapter's weights.
    """
    tensors = {}
    for name, anchor in anchors.items():
        if anchor.a is not None:
            tensors[f"{name}.lora_A"] = anchor.a.detach().contiguous()
        if anchor.b is not None:
            tensors[f"{name}.lora_B"] = anchor.b.detach().contiguous()
    modules = json.dumps(list(anchors))
    metadata = {
        "format": "pt",
        "proximal_anchor": _FORMAT,
        "modules": modules,
        "adapter_sha256": weights,
        "sha256": tensor_digest(tensors, tensors.__getitem__, about=modules + weights),
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_anchors(path: str | os.PathLike) -> StoredAnchors:
    """Reads what `write_anchors` wrote, on the CPU. What earlier versions wrote is read too, without checksums.

    Raises:
        FileError: not a safetensors file, a safetensors file without anchors, or one that was changed since.
    """
    place = Place(os.fspath(path), _REMEDY)
    try:
        with _open_tensors(path) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise FileError(f"the anchor file {path} cannot be read ({error}); {_REMEDY}") from error
    known = {_FORMAT: _KEYS, _EARLIER_FORMAT: _EARLIER_KEYS}.get(metadata.get("proximal_anchor", ""))
    if known is None or set(metadata) != known:
        raise FileError(
            f"{path} is not an anchor file of format {_FORMAT} (metadata: {shortened(str(metadata))}): it was "
            f"changed, or written by something else or a later version of peft_linear; {_REMEDY}"
        )
    modules = read_as(tuple[str, ...], parse_json(metadata["modules"], place.at("modules")), place.at("modules"))
    if known == _KEYS:
        about = metadata["modules"] + metadata["adapter_sha256"]
        check_same(metadata["sha256"], tensor_digest(tensors, tensors.__getitem__, about), place)
    _check_tensors(modules, tensors, place)
    if known == _EARLIER_KEYS:
        _check_none_lost(modules, tensors, place)
    anchors = {name: FactorAnchor(tensors.get(f"{name}.lora_A"), tensors.get(f"{name}.lora_B")) for name in modules}
    return StoredAnchors(anchors, metadata.get("adapter_sha256"))


def weights_digest(files: Sequence[Path]) -> str:
    """sha256 of what the weights of an adapter are, in one file or several: names, dtypes, shapes and bits.

    Raises:
        FileError: a file cannot be read.
    """
    with ExitStack() as stack:
        get: dict[str, Callable[[str], Tensor]] = {}
        for path in files:
            get |= _open_weights(path, stack)
        return tensor_digest(get, lambda name: get[name](name))


def _open_weights(path: Path, stack: ExitStack) -> dict[str, Callable[[str], Tensor]]:
    """For each tensor of a file what reads it, as long as `stack` is open."""
    try:
        if path.suffix == ".safetensors":
            file = stack.enter_context(_open_tensors(path))
            return dict.fromkeys(file.keys(), file.get_tensor)
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {key: content.__getitem__ for key, value in content.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch.load raises many
        raise FileError(f"the adapter's weights {path} cannot be read ({error}); save the adapter again") from error


def _open_tensors(path: str | os.PathLike) -> Any:
    return safe_open(path, framework="pt", device="cpu")


def _check_tensors(modules: Sequence[str], tensors: Mapping[str, Tensor], place: Place) -> None:
    """Raises `FileError` for a tensor that is of no module, and for one that is no anchor."""
    expected = {f"{name}.{factor}" for name in modules for factor in ("lora_A", "lora_B")}
    if unknown := sorted(set(tensors) - expected):
        raise place.at(unknown[0]).error("a factor of one of the modules that the file lists", "an unknown name")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise place.at(name).error("of a floating dtype", str(tensor.dtype))
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit floats have no isfinite
        if not bool(torch.isfinite(wide).all()):
            raise place.at(name).error("finite", "NaN or infinite values")


def _check_none_lost(modules: Sequence[str], tensors: Mapping[str, Tensor], place: Place) -> None:
    """Raises `FileError` for a module without any factor. Of a file with a checksum no tensor can be lost."""
    for name in modules:
        if not {f"{name}.lora_A", f"{name}.lora_B"} & set(tensors):
            raise place.at(name).error("there with one factor at least", "none: both would be read as zeros")


def _check_factors(
    anchors: Mapping[str, FactorAnchor], shapes: Mapping[str, tuple[torch.Size, torch.Size]], where: str
) -> None:
    """Raises `FileError` unless there is an anchor for exactly these factors, of their shapes."""
    if missing := [name for name in shapes if name not in anchors]:
        raise _foreign(where, f"module {missing[0]!r} of the adapter is missing in it")
    if others := [name for name in anchors if name not in shapes]:
        raise _foreign(where, f"it has module {others[0]!r}, which the adapter does not have")
    for name, (a, b) in shapes.items():
        for letter, start, shape in (("A", anchors[name].a, a), ("B", anchors[name].b, b)):
            if start is not None and start.shape != shape:
                raise _foreign(where, f"lora_{letter} of {name!r} has shape {tuple(start.shape)}, not {tuple(shape)}")


def _foreign(where: str, reason: str) -> FileError:
    return FileError(f"{ANCHOR_NAME} at {where} does not belong to the adapter beside it: {reason}; {_REMEDY}")


def _copy_unless_zero(tensor: Tensor) -> Tensor | None:
    value = tensor.detach()
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.clone() if bool(torch.any(value != 0)) else None
