# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""λ of each module of an adapter at each step: from the configuration or its pattern, times the schedule's factor."""

from __future__ import annotations

import re
from collections.abc import Callable

from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from ...errors import PeftLinearError
from ...functional.schedule import schedule_factor
from .config import ProximalLoraConfig, check_strength


Schedule = Callable[[int], float]  # optimizer steps taken -> factor of λ


class Strengths:
    """λ of every module of one adapter. The configuration is read at each step, so that it may be changed."""

    def __init__(self, config: ProximalLoraConfig, layers: dict[str, LoraLayer]) -> None:
        self.config = config
        self.schedule: Schedule | None = None  # set by the user in place of the configuration's
        self._keys = {name: pattern_name(name, layer) for name, layer in layers.items()}
        self._matched: dict[str, str] = {}  # module -> key of the pattern
        self._patterns: tuple[str, ...] = ()

    def base(self, name: str) -> float:
        """λ of a module before the schedule: the value of the first matching pattern, else `proximal_lambda`."""
        pattern = self.config.proximal_lambda_pattern
        if not pattern:
            return self.config.proximal_lambda
        if self._patterns != tuple(pattern):
            self._patterns = tuple(pattern)
            self._matched = {module: get_pattern_key(list(pattern), key) for module, key in self._keys.items()}
        return pattern.get(self._matched[name], self.config.proximal_lambda)

    def active(self) -> bool:
        """Whether any module has λ > 0, whatever the schedule's factor.

        Raises:
            PeftLinearError: a λ is not a finite number >= 0.
        """
        check_strength(self.config.proximal_lambda)
        pattern = self.config.proximal_lambda_pattern
        if not pattern:
            return self.config.proximal_lambda > 0
        for key, value in pattern.items():
            check_strength(value, f"proximal_lambda_pattern[{key!r}]")
        return any(self.base(name) > 0 for name in self._keys)

    def factor(self, steps: int) -> float:
        """The factor of every λ in the step after `steps` optimizer steps.

        Raises:
            PeftLinearError: the user's schedule did not return a finite number >= 0.
        """
        if self.schedule is None:
            return schedule_factor(self.config.proximal_schedule, steps, self.config.proximal_schedule_steps)
        value = self.schedule(steps)
        check_strength(value, f"the value of the schedule at step {steps}")
        return float(value)

    @property
    def scheduled(self) -> bool:
        """Whether λ depends on the step."""
        return self.schedule is not None or self.config.proximal_schedule != "constant"


def pattern_name(name: str, layer: LoraLayer) -> str:
    """The name that peft matches with `rank_pattern` and `alpha_pattern`: that of the module, or of the parameter."""
    if not isinstance(layer, ParamWrapper):
        return name
    return f"{_without_base_layer(name)}.{layer.parameter_name}"


def check_patterns(config: ProximalLoraConfig, adapter_name: str, model: nn.Module) -> None:
    """Raises `PeftLinearError` for a key of `proximal_lambda_pattern` that matches no module or parameter of `model`.

    A key that matches only modules without an adapter is accepted: the adapter may have been restricted since.
    """
    if not config.proximal_lambda_pattern:
        return
    found = [*(name for name, _ in model.named_modules()), *(name for name, _ in model.named_parameters())]
    names = {_without_base_layer(name) for name in found}
    for key in config.proximal_lambda_pattern:
        if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            raise PeftLinearError(
                f"proximal_lambda_pattern of adapter {adapter_name!r} has the key {key!r}, which matches no module of "
                "the model; keys are matched against the end of full module names, as those of alpha_pattern are"
            )


def _without_base_layer(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base_layer")
