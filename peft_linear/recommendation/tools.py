# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A choice of modules and ranks in the configuration files of other training tools, and as `TrainingArguments`.

| | axolotl | TRL | LLaMA-Factory |
|---|---|---|---|
| types, names | yes | yes | yes |
| a regular expression | yes | yes, as a list of one | no |
| some layers | `peft_layers_to_transform` | as a regular expression | as names |
| ranks that differ | `lora_rank_pattern` | no | no |

Where a tool has no field, the choice is written in another form that means the same, and a comment says so; where
there is none, it is an error. Names of fields are those of axolotl 0.19.0, LLaMA-Factory 0.9.5 and TRL 1.16.0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import PeftLinearError
from .ranks import plain_number
from .rules import ALL_LINEAR, Rule, find_rule
from .values import Settings


if TYPE_CHECKING:
    from transformers import TrainingArguments

_WIDTH = 100
_OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}  # of `Training`, of transformers


@dataclass(frozen=True)
class Plan:
    """What a file says.

    Args:
        ranks: {chosen module: rank}.
        candidates: Names of all candidates, in model order.
        options: Of `find_rule`, as `rule_options` gives them.
        rule: The simplest rule of the choice.
        lora_alpha: α, the same for all modules.
        saved: What is trained in full, `modules_to_save`.
        learning_rate, interval: As recommended, if they were.
    """

    ranks: Mapping[str, int]
    candidates: Sequence[str]
    options: Mapping[str, Any]
    rule: Rule
    lora_alpha: float
    saved: Sequence[str]
    learning_rate: float | None = None
    interval: tuple[float, float] | None = None

    def rule_in(self, *forms: str) -> Rule | None:
        """The simplest rule in one of these forms."""
        known = [form for form in self.options["forms"] if form in forms]
        return find_rule(self.ranks, self.candidates, **{**self.options, "forms": known})


def tool_yaml(tool: str, plan: Plan) -> str:
    """The part of a tool's file that says what is adapted, at which rank and learning rate.

    Raises:
        PeftLinearError: there is no such tool, or it would train something else than the plan.
    """
    if tool not in _WRITERS:
        raise PeftLinearError(f"no YAML for {tool!r}; there is one for {', '.join(_WRITERS)}")
    if plan.lora_alpha != int(plan.lora_alpha):
        raise PeftLinearError(
            f"{tool} takes lora_alpha as an integer, got {plan.lora_alpha}; recommend again with an integer"
        )
    fields, comments = _WRITERS[tool](plan)
    rate = {} if plan.learning_rate is None else {"learning_rate": float(plan.learning_rate)}
    if plan.learning_rate is None:
        comments.append("learning_rate: none was recommended. The tool's default is not made for this rank: set yours")
    elif plan.interval is not None:
        comments.append(f"learning_rate: the best one lies between {plan.interval[0]:.2g} and {plan.interval[1]:.2g}")
    lines = [f"{plan.rule.text} (alpha/rank scaling)", *comments]
    head = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    return head + yaml.safe_dump(
        {**fields, **rate}, sort_keys=False, allow_unicode=True, default_flow_style=None, width=_WIDTH
    )


def training_arguments(
    output_dir: str | os.PathLike, settings: Settings, learning_rate: float | None, given: Mapping[str, Any]
) -> TrainingArguments:
    """`transformers.TrainingArguments` of the planned training; what is `given` is taken instead.

    Raises:
        PeftLinearError: there is no learning rate.
    """
    from transformers import TrainingArguments

    planned: dict[str, Any] = {}
    if learning_rate is not None:
        planned["learning_rate"] = float(learning_rate)
    elif "learning_rate" not in given:
        raise PeftLinearError(
            "this recommendation has no learning rate, and the default of TrainingArguments is not made for LoRA; "
            "pass learning_rate="
        )
    if settings.optimizer is not None:
        planned["optim"] = _OPTIMIZERS[settings.optimizer]
    if settings.train_batch_size is not None:
        planned["per_device_train_batch_size"] = settings.train_batch_size
    if settings.steps is not None and "num_train_epochs" not in given:
        planned["max_steps"] = settings.steps
    return TrainingArguments(output_dir=os.fspath(output_dir), **{**planned, **given})


def _axolotl(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    rule = plan.rule_in("all-linear", "types", "layers", "types and names", "pattern", "names", "name pattern")
    rule = _known(rule, "axolotl")
    found, comments = rule.config_fields(), []
    if rule.rank_pattern:
        comments.append("lora_rank_pattern: known to axolotl 0.19.0; a version without it ignores it without a word")
    fields = {
        "adapter": "lora",
        "lora_r": rule.rank,
        "lora_alpha": plain_number(plan.lora_alpha),
        "lora_dropout": 0.0,
        "lora_target_modules": found["target_modules"],
        "lora_rank_pattern": found.get("rank_pattern"),
        "peft_layers_to_transform": found.get("layers_to_transform"),
        "peft_layers_pattern": found.get("layers_pattern"),
        "lora_modules_to_save": list(plan.saved),
    }
    return _without_empty(fields), comments + _other_form(plan, rule, "axolotl")


def _trl(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    rule = _known(plan.rule_in("all-linear", "types", "types and names", "pattern", "names", "name pattern"), "trl")
    _check_one_rank(plan, "TRL")
    fields = {
        "use_peft": True,
        "lora_r": rule.rank,
        "lora_alpha": plain_number(plan.lora_alpha),
        "lora_dropout": 0.0,
        "lora_target_modules": _for_trl(rule),
        "lora_modules_to_save": list(plan.saved),
    }
    return _without_empty(fields), _other_form(plan, rule, "TRL")


def _for_trl(rule: Rule) -> list[str]:
    """TRL takes the only entry of a list out of it, and peft takes a text for a regular expression."""
    targets = rule.target_modules
    if isinstance(targets, str):
        return [targets]
    return [rf"(?:.*\.)?{re.escape(targets[0])}"] if len(targets) == 1 else list(targets)


def _llamafactory(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    rule = _known(plan.rule_in("types", "types and names", "names"), "llamafactory")
    _check_one_rank(plan, "LLaMA-Factory")
    fields = {
        "finetuning_type": "lora",
        "lora_rank": rule.rank,
        "lora_alpha": plain_number(plan.lora_alpha),
        "lora_dropout": 0.0,
        "lora_target": ",".join(rule.target_modules),
        "additional_target": ",".join(plan.saved),
    }
    return _without_empty(fields), _other_form(plan, rule, "LLaMA-Factory")


_WRITERS: dict[str, Callable[[Plan], tuple[dict[str, Any], list[str]]]] = {
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "trl": _trl,
}
TOOLS = tuple(_WRITERS)


def _known(rule: Rule | None, tool: str) -> Rule:
    if rule is None:
        raise PeftLinearError(
            f"no field of {tool} adapts exactly the chosen modules, since their names end as others do; train in "
            "Python with rec.to_config()"
        )
    return rule


def _check_one_rank(plan: Plan, tool: str) -> None:
    ranks = set(plan.ranks.values())
    if len(ranks) > 1:
        raise PeftLinearError(
            f"{tool}'s file has one rank for all modules, and this choice has ranks {min(ranks)} to {max(ranks)}; "
            "train in Python with rec.to_config(), or write axolotl's file"
        )


def _other_form(plan: Plan, rule: Rule, tool: str) -> list[str]:
    if rule.kind == plan.rule.kind or plan.rule.kind == ALL_LINEAR:
        return []
    said = {"pattern": "a regular expression", "name pattern": "a regular expression"}.get(rule.kind, "full names")
    what = {"layers": "layers", "types with exclusions": "modules that are left out"}.get(plan.rule.kind, "this rule")
    return [f"{tool} has no field for {what}: the same modules as {said}"]


def _without_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None and value not in ("", [], {})}
