# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a config must say so that peft adapts exactly the chosen modules and trains the head that was counted."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists

from ..errors import PeftLinearError
from ..tuners.proximal_lora import ProximalLoraConfig


TASK_HEADS = {  # that peft adds to modules_to_save by task_type
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
MATCHING = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters")


def exact_fields(
    modules: Sequence[str],
    candidates: Collection[str],
    provenance: Mapping[str, Any],  # of the kernels
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """`target_modules` that match these modules and no others, and `modules_to_save`: what was always trained.

    `target_modules` is the list of names, or, where peft would match another module by the end of a name, one regular
    expression; where peft rewrites those (mixtures of experts) the other modules are excluded instead. What is `given`
    stays as it is.

    Raises:
        PeftLinearError: peft cannot adapt a chosen module by its name, or `modules_to_save` would train others.
    """
    facts = provenance.get("peft") or {}
    refused = {name: reason for name, reason in facts.get("refused", {}).items() if name in modules}
    if refused:
        name, reason = next(iter(refused.items()))
        raise PeftLinearError(f"no config adapts {name}: {reason}; recommend again without it in `targets`")
    fields: dict[str, Any] = {}
    saved = list(facts.get("modules_to_save", provenance.get("always_trained") or ()))
    if saved and "modules_to_save" not in given:
        fields["modules_to_save"] = saved
        more = sorted(name for name in {*candidates, *facts.get("alike", ())} if name.endswith(tuple(saved)))
        if more:
            raise PeftLinearError(
                f"modules_to_save={saved}, which was always trained, would also train {', '.join(more)}, since peft "
                "compares the ends of names; pass modules_to_save=, or name those in `always_trained` as well"
            )
    chosen = set(modules)
    others = [name for name in {*candidates, *facts.get("alike", ())} if name not in chosen]
    also = sorted(other for other in others if any(other.endswith(f".{name}") for name in modules))
    if also and facts.get("rewrites_patterns") and "exclude_modules" not in given:
        return {**fields, "target_modules": list(modules), "exclude_modules": _any_of(also)}
    return {**fields, "target_modules": _any_of(modules) if also else list(modules)}


def check_exact(
    config: ProximalLoraConfig, modules: Collection[str], candidates: Collection[str], provenance: Mapping[str, Any]
) -> None:
    """Compares, by peft's own matching, what a config adapts with the choice.

    Raises:
        PeftLinearError: they differ.
    """
    known = {*candidates, *modules, *(provenance.get("peft") or {}).get("alike", ())}
    in_peft = copy.copy(config)
    in_peft.modules_to_save = [
        *(config.modules_to_save or ()),
        *TASK_HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ()),
    ] or None
    adapted = {name for name in known if check_target_module_exists(in_peft, name)}
    differ = sorted(adapted ^ set(modules))
    parameters = getattr(config, "target_parameters", None)
    if not differ and not parameters:
        return
    what = ", ".join(f"{name} ({'not chosen' if name in adapted else 'chosen, left out'})" for name in differ)
    fields = [name for name in MATCHING if getattr(config, name, None)]
    fields += ["task_type"] if in_peft.modules_to_save != config.modules_to_save else []
    because = f"with {' and '.join(f'{name}={getattr(config, name)!r}' for name in fields)} " if fields else ""
    raise PeftLinearError(
        f"{because}peft would not adapt exactly the recommended modules: {what or f'parameters {parameters}'}; leave "
        "that out, or build the config by hand"
    )


def _any_of(names: Sequence[str]) -> str:
    return "|".join(re.escape(name) for name in names)
