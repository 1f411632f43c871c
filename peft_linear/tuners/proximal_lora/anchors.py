# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The anchor θ0 of an adapter: its factors at the pretrained model, in memory and in a file beside the adapter.

`adapter_model.safetensors` has LoRA's tensor names and nothing else, so that every LoRA consumer can read it. The
anchor is saved beside it in `proximal_anchor.safetensors`: the initial A of every module (`<module>.lora_A`), and the
initial B only where it was not zero (`<module>.lora_B`). That file is read only to continue training.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import FileError
from ...files import atomic_file


ANCHOR_NAME = "proximal_anchor.safetensors"
_FORMAT = "1"


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
class AnchorSource:
    """The folder or Hub repository that an adapter was loaded from."""

    path: str
    hub_kwargs: Mapping[str, Any]

    def read(self) -> dict[str, FactorAnchor] | None:
        """The anchors saved beside the adapter, or None if there is no such file.

        Raises:
            FileError: the file exists and cannot be read.
        """
        file = self._file()
        return None if file is None else read_anchors(file)

    def _file(self) -> Path | None:
        subfolder = self.hub_kwargs.get("subfolder") or ""
        folder = Path(self.path) / subfolder
        if folder.is_dir() or os.path.isdir(self.path):
            return folder / ANCHOR_NAME if (folder / ANCHOR_NAME).is_file() else None
        try:
            return Path(hf_hub_download(self.path, ANCHOR_NAME, **self.hub_kwargs))
        except (EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled):
            return None
        except Exception as error:
            warnings.warn(f"could not look for {ANCHOR_NAME} at {self.path}: {error}")
            return None


def write_anchors(path: str | os.PathLike, anchors: Mapping[str, FactorAnchor]) -> None:
    """Writes the anchors of an adapter atomically; what is read back is equal bit for bit."""
    tensors = {}
    for name, anchor in anchors.items():
        if anchor.a is not None:
            tensors[f"{name}.lora_A"] = anchor.a.detach().contiguous()
        if anchor.b is not None:
            tensors[f"{name}.lora_B"] = anchor.b.detach().contiguous()
    metadata = {"format": "pt", "proximal_anchor": _FORMAT, "modules": json.dumps(list(anchors))}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_anchors(path: str | os.PathLike) -> dict[str, FactorAnchor]:
    """Reads what `write_anchors` wrote, on the CPU.

    Raises:
        FileError: not a safetensors file, or a safetensors file without anchors.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("proximal_anchor") != _FORMAT:
                raise FileError(
                    f"{path} is not an anchor file of format {_FORMAT} (metadata {metadata}); it was written by "
                    "something else or by a later version of peft_linear"
                )
            names = set(file.keys())
            return {
                module: FactorAnchor(
                    file.get_tensor(f"{module}.lora_A") if f"{module}.lora_A" in names else None,
                    file.get_tensor(f"{module}.lora_B") if f"{module}.lora_B" in names else None,
                )
                for module in json.loads(metadata["modules"])
            }
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise FileError(f"the anchor file {path} cannot be read ({error}); restore it or delete it") from error


def _copy_unless_zero(tensor: Tensor) -> Tensor | None:
    value = tensor.detach()
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.clone() if bool(torch.any(value != 0)) else None
