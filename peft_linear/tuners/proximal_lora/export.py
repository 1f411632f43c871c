# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Exports a ProximalLoRA adapter as a plain LoRA adapter, which can be loaded without this package."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import FileError
from ...files import atomic_directory
from .config import ProximalLoraConfig
from .peft_type import PROXIMAL_LORA


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_CARD_NAME = "README.md"
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
        out_dir: the folder to write; it is complete or, after an error, not there.
        overwrite: replace `out_dir` if it exists and is not empty.

    Returns:
        `out_dir`.

    Raises:
        FileError: `adapter_dir` is not a folder, or contains no adapter, or one of another type or in pickle format;
            `out_dir` is `adapter_dir`, a file, or a folder that is not empty (without `overwrite`).
    """
    source, target = Path(adapter_dir), Path(out_dir)
    config = _read_config(source)
    tensors = _read_tensors(source)
    if target.resolve() == source.resolve():
        raise FileError(f"the output folder {target} is the adapter's own; choose another one")
    exported = {key: value for key, value in config.items() if key not in _OUR_FIELDS}
    exported["peft_type"] = PeftType.LORA.value
    if exported.get("rank_pattern") or exported.get("alpha_pattern"):
        exported, tensors = _one_rank_and_scaling(exported, tensors)
    with atomic_directory(target, overwrite=overwrite) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(exported, indent=2, sort_keys=True), encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        if (source / _CARD_NAME).is_file():
            shutil.copyfile(source / _CARD_NAME, temporary / _CARD_NAME)
    return target


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileError(
            f"{folder} is not a folder; pass the local folder of an adapter (download it from the Hub first)"
        )
    path = folder / CONFIG_NAME
    if not path.is_file():
        nested = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"; there are adapters in its subfolders {nested}" if nested else ""
        raise FileError(f"{folder} is not an adapter: it has no {CONFIG_NAME}{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path} is not valid JSON: {error}") from error
    found = config.get("peft_type") if isinstance(config, dict) else None
    if found != PROXIMAL_LORA.value:
        remedy = "it needs no export" if found == PeftType.LORA.value else "only ProximalLoRA adapters can be exported"
        raise FileError(f"{folder} contains an adapter of type {found!r}, not {PROXIMAL_LORA.value!r}: {remedy}")
    return config


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
        raise FileError(f"{path} contains no LoRA factors (first keys: {sorted(tensors)[:3]})")
    return tensors


def _one_rank_and_scaling(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict]:
    """The same adapter with one rank and one alpha/r; patterns stay where the tensors' shapes are not the ranks."""
    pairs = [
        (key, key[: -len(a)] + b, _module_name(key[: -len(a)]))
        for key in tensors
        for a, b in _FACTORS.items()
        if key.endswith(a)
    ]
    ranks = {name: _matched(config["rank_pattern"], name, config["r"]) for _, _, name in pairs}
    plain = all(tensors[a].shape[0] == ranks[name] == tensors[b].shape[1] for a, b, name in pairs)
    if not plain or any(config.get(field) for field in _OTHER_SHAPES):
        return config, tensors
    alphas = {name: _matched(config["alpha_pattern"], name, config["lora_alpha"]) for _, _, name in pairs}
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


def _module_name(prefix: str) -> str:
    return prefix.removeprefix("base_model.model.").removesuffix(".")


def _matched(pattern: dict[str, Any], name: str, default: Any) -> Any:
    key = get_pattern_key(list(pattern), name)
    return pattern.get(key, default)


def _scaling(alpha: float, rank: int, rs: bool) -> float:
    return alpha / math.sqrt(rank) if rs else alpha / rank
