# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`ProximalReference`: what must not be forgotten, as statistics of the pretrained model on reference data.

Function space measures an adapter's change E = s·BA − s·B0A0 of a weight by `g·tr(E C Eᵀ)`: C is the second moment of
the module's inputs, g the mean square of the cotangents of its outputs, for log p with labels sampled from the model.
Half of the sum over modules is KL(pretrained ‖ tuned) in nats a predicted token, to second order and as far as the
Kronecker-factored approximation of the Fisher matrix with `S ≈ g·I` holds (Martens and Grosse, arXiv 1503.05671).

It travels with the adapter, in a file `proximal_reference.safetensors` beside it, which only training reads.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import FileError, PeftLinearError
from ...files import atomic_file, tensor_digest
from ...functional.second_moment import SecondMoment
from ...schema import Place, check_same, parse_json, read_as


REFERENCE_NAME = "proximal_reference.safetensors"
_FORMAT = "1"
_REMEDY = "collect the reference again with collect_reference(model, batches), or restore the file"


@dataclass(frozen=True)
class _Header:
    """What the file says beside its tensors."""

    inputs: Mapping[str, str]
    scales: Mapping[str, float]
    shares: Mapping[str, float]
    tokens: int
    rank: int


@dataclass(frozen=True, eq=False)
class ProximalReference:
    """Statistics of the modules of a model on reference data; made by `collect_reference`.

    Args:
        moments: C by name of an input: that of the first module that gets it. float32 (float64 for a float64 model).
        inputs: {module: name of its input}. Modules with one input (q, k and v; gate and up) share its C.
        scales: {module: g}, in nats a predicted token.
        shares: {name of an input: the share of tr C that the low-rank part holds}; the rest is on the diagonal alone.
        tokens: Predicted tokens (or examples, of a classifier) in the reference.
        rank: Rows of the low-rank part, at most.
    """

    moments: Mapping[str, SecondMoment]
    inputs: Mapping[str, str]
    scales: Mapping[str, float]
    shares: Mapping[str, float]
    tokens: int
    rank: int

    @property
    def names(self) -> tuple[str, ...]:
        """Its modules, in model order."""
        return tuple(self.inputs)

    def unit(self, names: Collection[str]) -> float:
        """The mean of g·tr(C)/d_in over modules: `proximal_lambda` counts in units of it, on every model alike."""
        total = 0.0
        for name in names:
            moment = self.moment(name)
            total += self.scales[name] * float(moment.trace()) / moment.diagonal.shape[-1]
        return total / len(names)

    @property
    def num_bytes(self) -> int:
        """In memory and in its file."""
        return sum(t.numel() * t.element_size() for m in self.moments.values() for t in (m.diagonal, m.factors))

    def moment(self, name: str) -> SecondMoment:
        """C of a module, by its full name."""
        return self.moments[self.inputs[name]]

    def check(self, widths: Mapping[str, int], adapter_name: str) -> None:
        """Raises `PeftLinearError` unless it has C of that width, {module: d_in}, for every one of these modules."""
        missing = [name for name in widths if name not in self.inputs]
        if missing:
            raise PeftLinearError(
                f"the reference has no statistics of {missing[0]!r}" + _others(missing) + f" of adapter "
                f"{adapter_name!r}; it has those of {len(self.inputs)} modules ({_some(self.inputs)}). Collect it "
                "from the model that is adapted, with `targets` that hold the adapter's modules"
            )
        for name, width in widths.items():
            found = self.moment(name).diagonal.shape[-1]
            if found != width:
                raise PeftLinearError(
                    f"the reference has inputs of width {found} for {name!r}, the adapter {adapter_name!r} has "
                    f"{width}: it was collected from another model; call collect_reference on this one"
                )

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, whole or not at all. What `load` reads back is equal bit for bit."""
        tensors = {}
        for key, moment in self.moments.items():
            tensors[f"{key}.diagonal"] = moment.diagonal.contiguous().cpu()
            tensors[f"{key}.factors"] = moment.factors.contiguous().cpu()
        header = json.dumps(
            {name: getattr(self, name) for name in ("inputs", "scales", "shares", "tokens", "rank")}, default=dict
        )
        metadata = {
            "format": "pt",
            "proximal_reference": _FORMAT,
            "header": header,
            "sha256": tensor_digest(tensors, tensors.__getitem__, about=header),
        }
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ProximalReference:
        """What `save` wrote, on the CPU.

        Raises:
            FileError: not such a file, or one that was changed since.
        """
        place = Place(os.fspath(path), _REMEDY)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise FileError(f"the reference file {path} cannot be read ({error}); {_REMEDY}") from error
        if metadata.get("proximal_reference") != _FORMAT or not {"header", "sha256"} <= set(metadata):
            raise FileError(
                f"{path} is not a reference file of format {_FORMAT}: it was written by something else or a later "
                f"version of peft_linear; {_REMEDY}"
            )
        check_same(metadata["sha256"], tensor_digest(tensors, tensors.__getitem__, metadata["header"]), place)
        header = read_as(_Header, parse_json(metadata["header"], place), place)
        _check_content(header, tensors, place)
        moments = {
            key: SecondMoment(tensors[f"{key}.diagonal"], tensors[f"{key}.factors"])
            for key in dict.fromkeys(header.inputs.values())
        }
        return cls(moments, header.inputs, header.scales, header.shares, header.tokens, header.rank)

    def __str__(self) -> str:
        shares = sorted(self.shares.values())
        return (
            f"reference of {len(self.inputs)} modules with {len(self.moments)} inputs, from {self.tokens:,} predicted "
            f"tokens: {self.num_bytes / 1e6:.1f} MB; rank {self.rank} holds {shares[len(shares) // 2]:.0%} of the "
            f"inputs' second moment (median; least {shares[0]:.0%})"
        )

    __repr__ = __str__


def reference_beside(folder: str | os.PathLike) -> Path:
    """The reference file of an adapter that is saved in `folder`."""
    return Path(folder) / REFERENCE_NAME


def _check_content(header: _Header, tensors: Mapping[str, Tensor], place: Place) -> None:
    """Raises `FileError` unless tensors and numbers are those of a reference."""
    keys = set(header.inputs.values())
    expected = {f"{key}.{part}" for key in keys for part in ("diagonal", "factors")}
    if set(tensors) != expected or set(header.shares) != keys or set(header.scales) != set(header.inputs):
        raise place.error("one C for every input and one g for every module", "others")
    for name, tensor in tensors.items():
        wrong = not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all())
        if wrong or (name.endswith(".diagonal") and bool((tensor < 0).any())):
            raise place.at(name).error("finite numbers, and on a diagonal none below 0", "others")
    for key in keys:
        diagonal, factors = tensors[f"{key}.diagonal"], tensors[f"{key}.factors"]
        if diagonal.ndim != 1 or factors.ndim != 2 or factors.shape[1] != len(diagonal):
            raise place.at(key).error("(d,) and (k, d)", f"{tuple(diagonal.shape)} and {tuple(factors.shape)}")
    for name, scale in header.scales.items():
        if not math.isfinite(scale) or scale < 0:
            raise place.at(name).error("a finite number >= 0", repr(scale))


def _some(names: Iterable[str]) -> str:
    first = list(names)[:3]
    return ", ".join(first) + (", …" if len(list(names)) > 3 else "")


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more modules" if len(names) > 1 else ""
