# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What peft makes of a model's modules: which linear layers it adapts as named, and what else names could match."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn
from transformers.pytorch_utils import Conv1D


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # peft refuses to save them whole


def refused_by_peft(root: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """{name: why} of the modules that a LoRA adapter cannot be put on by name, or would be without effect.

    These are the `out_proj` of an `nn.MultiheadAttention`, which is never called; layers that peft refuses (those of
    Mamba-like models, classes that it does not know); and layers of a mixture of experts whose names peft takes for
    those of the experts, which it then adapts in their place.

    Args:
        root: The model that names refer to.
        modules: Linear layers by full name. Those that carry an adapter already are not refused.
    """
    refused: dict[str, str] = {}
    for name, module in modules.items():
        if isinstance(module, BaseTunerLayer):
            continue
        parent, _, leaf = name.rpartition(".")
        if isinstance(root.get_submodule(parent), nn.MultiheadAttention):
            refused[name] = "nn.MultiheadAttention reads its weight and never calls it"
        elif reason := _refusal(root, module, leaf):
            refused[name] = reason
    rest = [name for name, module in modules.items() if name not in refused and not isinstance(module, BaseTunerLayer)]
    refused |= dict.fromkeys(
        _taken_for_experts(root, rest), "peft takes this name for that of the experts, and adapts those"
    )
    return refused


def facts_for_peft(root: nn.Module, candidates: Iterable[str], always_trained: Iterable[str]) -> dict[str, Any]:
    """What a config must be written by, as JSON.

    Returns:
        "refused": as `refused_by_peft`; "modules_to_save": the always-trained modules as peft takes them; "alike":
        other modules whose name ends as one of these or of the candidates does, which peft's rules may match too;
        "same_type": every module whose last part of the name a candidate has too, which a rule by type may match;
        "all_linear": how many modules peft adapts with "all-linear" if those are the candidates, else 0;
        "rewrites_patterns": whether peft replaces regular expressions in `target_modules` of this model.
    """
    candidates = list(candidates)
    modules = dict(root.named_modules(remove_duplicate=False))
    saved = [part for name in always_trained for part in _without_containers(name, modules)]
    chosen = set(candidates)
    known = {*candidates, *saved}
    ends = (*(f".{name}" for name in candidates), *saved)  # peft matches modules_to_save without a dot
    alike = [name for name in modules if name not in known and name.endswith(ends)]
    types = {name.rpartition(".")[2] for name in candidates}
    return {
        "refused": refused_by_peft(root, {name: modules[name] for name in candidates if name in modules}),
        "modules_to_save": saved,
        "alike": alike,
        "same_type": [name for name in modules if name.rpartition(".")[2] in types],
        "all_linear": len(chosen) if chosen == _all_linear(root, saved) else 0,
        "rewrites_patterns": _convert(root, ".*") != ".*",
    }


def _all_linear(root: nn.Module, saved: Sequence[str]) -> set[str]:
    """The modules that peft adapts with "all-linear", where `saved` are trained in full."""
    config = LoraConfig(target_modules="all-linear")
    _maybe_include_all_linear_layers(config, root)  # changes it
    within = tuple(f"{name}." for name in saved)
    return {name for name in config.target_modules or () if name not in saved and not name.startswith(within)}


def _without_containers(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    module = modules.get(name)
    if not isinstance(module, _CONTAINERS):
        return [name]
    children = [f"{name}.{key}" for key, child in module.named_children() if any(True for _ in child.parameters())]
    return [part for child in children for part in _without_containers(child, modules)]


def _refusal(root: nn.Module, module: nn.Module, leaf: str) -> str | None:
    """peft's reason; None where it has none."""
    config = LoraConfig(r=1, target_modules=[leaf])
    check = getattr(BaseTuner, "_check_target_module_compatiblity", None)
    if check is not None:
        try:
            check(None, config, root, leaf)
        except ValueError:
            return f"peft refuses {leaf!r} of a {getattr(root.config, 'model_type', 'Mamba')} model"
    if isinstance(module, (nn.Linear, Conv1D)):
        return None
    try:
        LoraModel._create_new_module(config, "default", module, r=1, lora_alpha=1)
    except ValueError as error:
        if "is not supported" in str(error):
            return f"peft has no LoRA layer for a {type(module).__name__}"
    except Exception:
        pass
    return None


def _taken_for_experts(root: nn.Module, names: Sequence[str]) -> list[str]:
    if not names or _convert(root, names) == set(names):
        return []
    return [name for name in names if _convert(root, [name]) != {name}]


def _convert(root: nn.Module, targets: Sequence[str] | str) -> set[str] | str | None:
    """`target_modules` after peft has rewritten them for this model; None where it refuses them."""
    convert = _moe_conversion()
    if convert is None or not hasattr(getattr(root, "config", None), "model_type"):
        return targets if isinstance(targets, str) else set(targets)
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    try:
        convert(config, root, None)
    except ValueError:
        return None
    found = config.target_modules
    return found if isinstance(found, str) or found is None else set(found)


def _moe_conversion() -> Callable[[LoraConfig, nn.Module, Any], None] | None:
    """peft's function that rewrites the targets of mixtures of experts; None in a version without it."""
    try:
        module = importlib.import_module("peft.utils.transformers_weight_conversion")
    except ImportError:  # also where transformers is older than it needs
        return None
    return getattr(module, "convert_peft_config_for_transformers", None)
