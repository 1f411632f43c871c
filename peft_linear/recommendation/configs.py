# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a config must say so that peft adapts exactly the chosen modules and trains the head that was counted."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists

from ..errors import PeftLinearError
from ..tuners.proximal_lora import ProximalLoraConfig
from .rules import ALL_LINEAR, FORMS, Rule, find_rule


TASK_HEADS = {  # that peft adds to modules_to_save by task_type
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
MATCHING = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters")


def rule_of(choice: Mapping[str, int], candidates: Sequence[str], provenance: Mapping[str, Any]) -> Rule:
    """The simplest rule that adapts these modules and no others of the model.

    Kernels of earlier versions do not say which other modules a rule by type would match; then, and where peft
    rewrites what is matched (mixtures of experts), it is by names.
    """
    rule = find_rule(choice, candidates, **rule_options(candidates, provenance))
    if rule is None:
        raise PeftLinearError(f"no rule of peft says exactly {sorted(choice)}; build the config by hand")
    return rule


def rule_options(candidates: Collection[str], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What `find_rule` and `simplify` need to know of the model: other names, and the forms that are certain.

    The candidates may be fewer than the kernels were asked for: modules that are never called are none.
    """
    facts = provenance.get("peft") or {}
    others = [*facts.get("same_type", ()), *facts.get("alike", ())]
    forms: tuple[str, ...] = FORMS
    if facts.get("rewrites_patterns"):
        forms = ("names", "names with exclusions")
    elif provenance and "same_type" not in facts:
        forms = ("names", "name pattern")
    return {"others": others, "all_linear": facts.get("all_linear") == len(candidates), "forms": forms}


def saved_fields(
    modules: Sequence[str],
    candidates: Collection[str],
    provenance: Mapping[str, Any],  # of the kernels
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """`modules_to_save`: what was always trained. What is `given` stays as it is.

    Raises:
        PeftLinearError: peft cannot adapt a chosen module by its name, or `modules_to_save` would train others.
    """
    facts = provenance.get("peft") or {}
    refused = {name: reason for name, reason in facts.get("refused", {}).items() if name in modules}
    if refused:
        name, reason = next(iter(refused.items()))
        raise PeftLinearError(f"no config adapts {name}: {reason}; recommend again without it in `targets`")
    saved = list(facts.get("modules_to_save", provenance.get("always_trained") or ()))
    if not saved or "modules_to_save" in given:
        return {}
    more = sorted(name for name in {*candidates, *facts.get("alike", ())} if name.endswith(tuple(saved)))
    if more:
        raise PeftLinearError(
            f"modules_to_save={saved}, which was always trained, would also train {', '.join(more)}, since peft "
            "compares the ends of names; pass modules_to_save=, or name those in `always_trained` as well"
        )
    return {"modules_to_save": saved}


def check_exact(
    config: ProximalLoraConfig, modules: Collection[str], candidates: Collection[str], provenance: Mapping[str, Any]
) -> None:
    """Compares, by peft's own matching, what a config adapts with the choice.

    Raises:
        PeftLinearError: they differ.
    """
    options = rule_options(candidates, provenance)
    known = {*candidates, *modules, *options["others"]}
    in_peft = copy.copy(config)
    if config.target_modules == ALL_LINEAR and options["all_linear"]:
        in_peft.target_modules = list(candidates)  # which peft puts in its place
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
