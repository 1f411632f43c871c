# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which modules can carry an adapter, and which modules are always trained.

Names are those of the base model, also when a `PeftModel` is passed, so that they can go into a config's
`target_modules` as they stand.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..errors import TargetError
from ..kernels.module_kernels import PEFT_PREFIX
from .adaptable import refused_by_peft
from .conditions import unwrapped
from .layers import layer_kind, not_a_layer


Targets = str | Sequence[str]


def base_model(model: nn.Module) -> nn.Module:
    """The model that names refer to: what a `PeftModel` (or a bare tuner) wraps, any other model itself.

    What only wraps a model to compile, parallelise or average it counts for nothing.
    """
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        return unwrapped(model.get_base_model())
    tuner = getattr(model, "base_model", None)  # of a PeftMixedModel
    tuner = tuner if isinstance(tuner, BaseTuner) else model
    return unwrapped(tuner.model) if isinstance(tuner, BaseTuner) else model


def resolve_targets(
    model: nn.Module, targets: Targets = "all-linear", reserved: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The modules that `targets` names, by peft's own matching rules, in model order.

    Args:
        model: the model; names are matched against its base model's `named_modules()`.
        targets: "all-linear" (every linear layer but the output embeddings, the task head, and what peft cannot adapt,
            see `refused_by_peft`), another string (a regular expression that the full name must match), or a list of
            names and suffixes.
        reserved: names of modules that are always trained; they and what lies in them cannot be targets.

    Raises:
        TargetError: a target that matches nothing (all of those, with near matches), a module that is not a linear
            layer, or one that is reserved.
    """
    root = base_model(model)
    modules = _adaptable(root)
    reserved = tuple(reserved)
    kinds = {name: kind for name, module in modules.items() if (kind := layer_kind(module)) is not None}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        excluded = _output_embeddings(root)
        reserved = (*reserved, *_task_head(root))
        chosen = {
            name: modules[name]
            for name, kind in kinds.items()
            if kind.in_all_linear
            and not _inside(name, reserved)
            and not any(modules[name] is other for other in excluded)
        }
        refused = refused_by_peft(root, chosen)
        if chosen and len(refused) == len(chosen):
            name, reason = next(iter(refused.items()))
            raise TargetError(f"peft can adapt no linear layer of {type(root).__name__} by its name: {name}: {reason}")
        chosen = {name: module for name, module in chosen.items() if name not in refused}
        _check_uncompiled(chosen)
        if not chosen:
            raise TargetError(
                f"{type(root).__name__} has no linear layer outside its head; pass `targets` by name if it has others"
            )
        return chosen

    if isinstance(targets, str):
        chosen = _match(targets, modules)
        unknown = [] if chosen else [targets]
    else:
        targets = [target.removeprefix(PEFT_PREFIX) for target in targets]
        if not targets:
            raise TargetError('`targets` is empty; name at least one module, or pass "all-linear"')
        chosen = _match(targets, modules)
        unknown = [target for target in targets if not _match([target], modules)]
    if unknown:
        raise TargetError(_unknown(unknown, list(kinds), type(root).__name__, regex=isinstance(targets, str)))
    wrong = [(name, module) for name, module in chosen.items() if name not in kinds]
    if wrong:
        raise not_a_layer(wrong)
    _check_uncompiled(chosen)
    taken = [name for name in chosen if _inside(name, reserved)]
    if taken:
        raise TargetError(
            f"always trained in full, so not a candidate for an adapter: {', '.join(taken)}; "
            "leave it out of `targets`, or out of `always_trained`"
        )
    return chosen


def resolve_always_trained(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The modules whose own parameters are always trained, whichever adapters are chosen; by name in the base model.

    By default: `modules_to_save` of a PeftModel's active adapters; in a plain transformers model with a task head (one
    without output embeddings) every child beside the base model that has parameters; nothing elsewhere.

    Raises:
        TargetError: a name that is not a module with parameters, or, without names, adapters that train biases.
    """
    model = unwrapped(model)
    root = base_model(model)
    if names is None:
        _check_biases(model)
        return _saved_modules(root) or ({} if model is not root else _task_head(root))
    if isinstance(names, str):
        names = [names]
    modules = dict(root.named_modules())
    found: dict[str, nn.Module] = {}
    for name in names:
        matches = {key: module for key, module in modules.items() if key == name or key.endswith(f".{name}")}
        matches = {key: module for key, module in matches.items() if any(True for _ in module.parameters())}
        if not matches:
            raise TargetError(_unknown([name], list(modules), type(root).__name__, what="always_trained"))
        for key, module in matches.items():
            if not _inside(key, found):
                found[key] = _active(module)
    return found


def _check_uncompiled(modules: Iterable[str]) -> None:
    """Raises TargetError for parts that `torch.compile` has wrapped: no config fits their names, in no other model."""
    compiled = next((name for name in modules if "_orig_mod" in name.split(".")), None)
    if compiled is not None:
        raise TargetError(
            f"{compiled.split('._orig_mod')[0]} is compiled by itself (torch.compile(part)), so the names of the "
            "layers in it hold '_orig_mod' and fit no config; compile it afterwards, or in place, with part.compile()"
        )


def _check_biases(model: nn.Module) -> None:
    model = unwrapped(model)
    if not isinstance(model, PeftModel):
        return
    for adapter in model.active_adapters:
        bias = getattr(model.peft_config.get(adapter), "bias", "none")
        if bias != "none":
            raise TargetError(
                f"adapter {adapter!r} trains biases (bias={bias!r}), of which no kernel is computed; use bias='none', "
                "or pass `always_trained` to leave them out ([] for nothing but the candidates)"
            )


def _adaptable(root: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, without what lies inside adapters or trained copies."""
    modules: dict[str, nn.Module] = {}
    closed: list[str] = []
    for name, module in root.named_modules():
        if not name or _inside(name, closed):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            closed.append(name)
        modules[name] = module
    return modules


def _match(targets: Targets, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    return {name: module for name, module in modules.items() if check_target_module_exists(config, name)}


def _inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _output_embeddings(root: nn.Module) -> list[nn.Module]:
    found = []
    for module in root.modules():
        if isinstance(module, PreTrainedModel):
            embeddings = module.get_output_embeddings()
            if embeddings is not None:
                found.append(embeddings)
    return found


def _saved_modules(root: nn.Module) -> dict[str, nn.Module]:
    """The trained copies of `modules_to_save`, and the new rows of embeddings (`trainable_token_indices`)."""
    found = {}
    for name, module in root.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
            found[name] = _active(module)
        elif isinstance(module, TrainableTokensLayer) and module.active_adapters and not module.disable_adapters:
            deltas = [
                module.trainable_tokens_delta[a] for a in module.active_adapters if a in module.trainable_tokens_delta
            ]
            found[f"{name}.trainable_tokens_delta"] = nn.ParameterList(deltas)
    return found


def _active(module: nn.Module) -> nn.Module:
    """The copy that a ModulesToSaveWrapper trains; any other module itself."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]]
    return module


def _task_head(root: nn.Module) -> dict[str, nn.Module]:
    """Every child with parameters beside the base model.

    Models for one half of a larger one, such as the image encoder of CLIP, have it under another name than
    `base_model_prefix`; there the children that are models are taken for the base model.
    """
    if not isinstance(root, PreTrainedModel) or _output_embeddings(root):
        return {}
    children = dict(root.named_children())
    body = children.get(root.base_model_prefix or "")
    bodies = [body] if body is not None else [c for c in children.values() if isinstance(c, PreTrainedModel)]
    if not bodies or (body is None and "For" not in type(root).__name__):
        return {}
    return {
        name: module
        for name, module in children.items()
        if all(module is not one for one in bodies) and any(True for _ in module.parameters())
    }


def _unknown(
    names: Sequence[str], known: Sequence[str], model: str, regex: bool = False, what: str = "targets"
) -> str:
    suffixes = sorted({name.rpartition(".")[2] for name in known})
    parts = []
    for name in names:
        near = difflib.get_close_matches(name, [*suffixes, *known], n=3, cutoff=0.5)
        parts.append(repr(name) + (f" (did you mean {', '.join(map(repr, near))}?)" if near else ""))
    rule = "a single string is a regular expression for the full name" if regex else "names or their suffixes"
    return (
        f"`{what}` matches no module of {model}: {'; '.join(parts)}. Pass {rule}; "
        f"the model's modules end in: {', '.join(suffixes)}"
    )


def require_plain_lora(name: str, layer: LoraLayer) -> str | None:
    """The one active adapter of a LoRA layer that is plain LoRA; None where no adapter is active on it.

    Raises:
        TargetError: several adapters are active, or the adapter is a variant (DoRA and others) or merged.
    """
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) > 1:
        raise TargetError(f"{name}: several adapters are active ({', '.join(active)}); activate one with set_adapter")
    if not active or layer.disable_adapters:
        return None
    adapter = active[0]
    if getattr(layer, "use_dora", {}).get(adapter) or adapter in getattr(layer, "lora_variant", {}):
        raise TargetError(
            f"{name}: adapter {adapter!r} is a LoRA variant (DoRA or another), whose kernel is not LoRA's; "
            'use space="weight", or a plain LoRA adapter'
        )
    if layer.merged:
        raise TargetError(f"{name}: adapter {adapter!r} is merged; call unmerge_adapter() first")
    return adapter
