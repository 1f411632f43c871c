# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Exports a ProximalLoRA adapter as a plain LoRA adapter, which can be loaded without this package."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import FileError
from ...files import atomic_directory
from ...schema import Place, read_as, read_json, shortened
from .config import ProximalLoraConfig
from .peft_type import PROXIMAL_LORA


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_CARD_NAME = "README.md"
_NAMES = (CONFIG_NAME, WEIGHTS_NAME, _CARD_NAME)  # all that is written
_OUR_FIELDS = {f.name for f in fields(ProximalLoraConfig)} - {f.name for f in fields(LoraConfig)}
_OTHER_SHAPES = ("target_parameters", "kasa_config", "use_bdlora", "use_qalora", "monteclora_config")
_FACTORS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


def export_lora(adapter_dir: str | os.PathLike, out_dir: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Writes the ProximalLoRA adapter in `adapter_dir` as a plain LoRA adapter, which does not need this package.

    The weights are the same; the configuration has type `LORA` and no proximal fields. Where `rank_pattern` or
    `alpha_pattern` give modules different ranks or scalings, factors are padded with zeros to the largest rank and
    scalings are folded into B, so that one `lora_alpha / r` holds for every module (consumers other than peft support
    only that): the products BA are unchanged up to rounding in the stored dtype. Adapters of parameters
    (`target_parameters`), of grouped convolutions and of variants with further tensors of size r keep their patterns,
    which peft supports. The anchor is not exported; a model card is copied.

    Args:
        adapter_dir: a folder written by `save_pretrained` or as a checkpoint by the Trainer.
        out_dir: the folder to write. It is complete or, after an error or a kill, as it was before.
        overwrite: replace an adapter that is in `out_dir`: its weights, configuration and, if `adapter_dir` has one,
            model card. A folder that holds anything else, or a ProximalLoRA adapter, is never touched.

    Returns:
        `out_dir`.

    Raises:
        FileError: `adapter_dir` is not a folder, or contains no adapter, or one that is damaged, of another type or in
            pickle format; `out_dir` is `adapter_dir`, contains it or files of it, is a file, cannot be written, is not
            empty (without `overwrite`), or holds something else than a plain adapter.
    """
    source, target = Path(adapter_dir), Path(out_dir)
    config = _read_config(source)
    tensors = _read_tensors(source)
    _check_target(source, target, overwrite)
    exported = {key: value for key, value in config.items() if key not in _OUR_FIELDS}
    exported["peft_type"] = PeftType.LORA.value
    if exported.get("rank_pattern") or exported.get("alpha_pattern"):
        exported, tensors = _one_rank_and_scaling(exported, tensors)
    cards = [folder / _CARD_NAME for folder in (source, target) if (folder / _CARD_NAME).is_file()]
    with atomic_directory(target, overwrite=overwrite) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(exported, indent=2, sort_keys=True), encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        if cards:
            shutil.copyfile(cards[0], temporary / _CARD_NAME)
    return target


class _Scaling(TypedDict):
    """The fields that ranks and scalings are computed from."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None
    use_rslora: bool | None


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raises `FileError` if writing `target` would destroy the adapter in `source`, or anything but an export."""
    try:
        if target.exists() and target.samefile(source):
            raise FileError(f"the output folder {target} is the adapter's own; choose another one")
        own, real = Path(os.path.realpath(source)), Path(os.path.realpath(target))
        if target.exists() and any(target.samefile(parent) for parent in own.parents):
            raise FileError(f"the output folder {target} contains the adapter {source}; choose another one")
        for name in _NAMES:
            if real in Path(os.path.realpath(source / name)).parents:
                raise FileError(
                    f"{name} of the adapter {source} is a link into {target}; choose another output folder"
                )
        if overwrite and target.is_dir():
            _check_replaceable(target)
    except OSError as error:
        raise FileError(f"the output folder {target} cannot be read ({error}); choose another one") from error


def _check_replaceable(target: Path) -> None:
    """Raises `FileError` if a folder holds anything but a plain adapter."""
    held = sorted(path.name for path in target.iterdir())
    if others := [name for name in held if name not in _NAMES or not (target / name).is_file()]:
        more = " and more" if len(others) > 1 else ""
        raise FileError(
            f"the output folder {target} holds {others[0]!r}{more}, which is no part of a plain adapter "
            f"({', '.join(_NAMES)}); choose another folder, or move what is there"
        )
    config = target / CONFIG_NAME
    if config.is_file() and f'"{PROXIMAL_LORA.value}"' in config.read_text(encoding="utf-8", errors="replace"):
        raise FileError(f"the output folder {target} holds a ProximalLoRA adapter, no export; choose another one")


def _read_config(folder: Path) -> dict[str, Any]:
    if not os.path.isdir(folder):
        raise FileError(
            f"{shortened(str(folder))} is not a folder; pass the local folder of an adapter (download it from the Hub "
            "first)"
        )
    path = folder / CONFIG_NAME
    if not path.is_file():
        nested = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"; there are adapters in its subfolders {nested}" if nested else ""
        raise FileError(f"{folder} is not an adapter: it has no {CONFIG_NAME}{hint}")
    place = Place(os.fspath(path), "save the adapter again")
    config = read_json(path, place)
    found = config.get("peft_type") if isinstance(config, dict) else None
    if found != PROXIMAL_LORA.value:
        remedy = "it needs no export" if found == PeftType.LORA.value else "only ProximalLoRA adapters can be exported"
        shown = found if isinstance(found, str) else None
        raise FileError(f"{folder} contains an adapter of type {shown!r}, not {PROXIMAL_LORA.value!r}: {remedy}")
    numbers = read_as(_Scaling, {name: config.get(name) for name in _Scaling.__annotations__}, place)
    for key, rank in {"r": numbers["r"], **(numbers["rank_pattern"] or {})}.items():
        if rank < 1:
            raise place.at(key).error("a rank of 1 or more", str(rank))
    for key, alpha in {"lora_alpha": numbers["lora_alpha"], **(numbers["alpha_pattern"] or {})}.items():
        if not math.isfinite(alpha):
            raise place.at(key).error("a finite number", str(alpha))
    for key in (*(numbers["rank_pattern"] or {}), *(numbers["alpha_pattern"] or {})):
        _check_expression(key, place)
    return config


def _check_expression(key: str, place: Place) -> None:
    try:
        re.compile(key)
    except re.error as error:
        raise place.at(key).error("a name or regular expression", f"one that does not compile ({error})") from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = (
            "; adapter_model.bin is a pickle, which is not read: save with safe_serialization=True" if pickled else ""
        )
        raise FileError(f"{folder} has no {WEIGHTS_NAME}{hint}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} cannot be read ({error}); it is damaged or not a safetensors file") from error
    if not any(key.endswith(tuple(_FACTORS)) for key in tensors):
        raise FileError(f"{path} contains no LoRA factors (first keys: {sorted(tensors)[:3]}); pass a LoRA adapter")
    for key, other in _pairs(tensors):
        if other not in tensors or min(tensors[key].ndim, tensors[other].ndim) < 2:
            raise FileError(f"{path} has no matrices {key!r} and {other!r}, which are a pair; save the adapter again")
    return tensors


def _pairs(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The keys of A and B of every module."""
    return [(key, key[: -len(a)] + b) for key in tensors for a, b in _FACTORS.items() if key.endswith(a)]


def _one_rank_and_scaling(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict]:
    """The same adapter with one rank and one alpha/r; patterns stay where the tensors' shapes are not the ranks."""
    pairs = [(a, b, _module_name(a)) for a, b in _pairs(tensors)]
    ranks = {name: _matched(config["rank_pattern"] or {}, name, config["r"]) for _, _, name in pairs}
    plain = all(tensors[a].shape[0] == ranks[name] == tensors[b].shape[1] for a, b, name in pairs)
    if not plain or any(config.get(field) for field in _OTHER_SHAPES):
        return config, tensors
    alphas = {name: _matched(config["alpha_pattern"] or {}, name, config["lora_alpha"]) for _, _, name in pairs}
    rs = bool(config.get("use_rslora"))
    common, rank = _scaling(config["lora_alpha"], config["r"], rs), max(ranks.values())
    if common == 0:
        common = 1.0
    result = dict(tensors)
    for a_key, b_key, name in pairs:
        a, b = tensors[a_key], tensors[b_key]
        ratio = _scaling(alphas[name], ranks[name], rs) / common
        if ratio != 1:
            b = (b.double() * ratio).to(b.dtype)
        missing = rank - ranks[name]
        if missing:
            a = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
            b = torch.cat([b, b.new_zeros(b.shape[0], missing, *b.shape[2:])], dim=1)
        result[a_key], result[b_key] = a.contiguous(), b.contiguous()
    alpha = common * rank
    exported = {**config, "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
    return {**exported, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}, result


def _module_name(key: str) -> str:
    factor = next(each for each in _FACTORS if key.endswith(each))
    return key.removesuffix(factor).removeprefix("base_model.model.").removesuffix(".")


def _matched(pattern: dict[str, Any], name: str, default: Any) -> Any:
    key = get_pattern_key(list(pattern), name)
    return pattern.get(key, default)


def _scaling(alpha: float, rank: int, rs: bool) -> float:
    return alpha / math.sqrt(rank) if rs else alpha / rank
