# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""λ of each module of an adapter at each step: from the configuration or its pattern, times the schedule's factor."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from ...errors import PeftLinearError
from ...functional.schedule import schedule_factor
from .config import AUTO_EXPONENTS, ProximalLoraConfig, check_strength, is_auto


Schedule = Callable[[int], float]  # optimizer steps taken -> factor of λ


class Strengths:
    """λ of every module of one adapter. The configuration is read at each step, so that it may be changed."""

    def __init__(self, config: ProximalLoraConfig, layers: dict[str, LoraLayer]) -> None:
        self.config = config
        self.schedule: Schedule | None = None  # set by the user in place of the configuration's
        self.gain = 1.0  # of the last step, by which a budget of KL multiplies every λ
        self._keys = {name: pattern_name(name, layer) for name, layer in layers.items()}
        self._matched: dict[str, str] = {}  # module -> key of the pattern
        self._patterns: tuple[str, ...] = ()
        self._planned: float | None = None  # the number that has replaced "auto" in the configuration

    def plan(self, total: float) -> None:
        """Sets `proximal_lambda="auto"` for a run whose learning rates add up to `total` > 0; a number stays.

        A number that was set here before, for another run, is set again.
        """
        if self.automatic:
            self._planned = self.config.proximal_lambda = AUTO_EXPONENTS[self.config.proximal_space] / total

    @property
    def automatic(self) -> bool:
        """Whether λ is that of `"auto"`, planned or not."""
        value = self.config.proximal_lambda
        return is_auto(value) or (self._planned is not None and value == self._planned)

    @property
    def common(self) -> float:
        """`proximal_lambda` as a number: NaN while it is "auto" and no run has been planned."""
        value = self.config.proximal_lambda
        return math.nan if is_auto(value) else float(value)

    def base(self, name: str) -> float:
        """λ of a module before the schedule: the value of the first matching pattern, else `proximal_lambda`.

        Raises:
            PeftLinearError: it is "auto", and no run has been planned.
        """
        value = self._value(name)
        if isinstance(value, str):
            raise PeftLinearError(
                "proximal_lambda='auto' is c/Σ of the learning rates of the run, and nothing has said what they add "
                "up to (or they add up to 0). The Trainer and TRL say it themselves. In a loop of your own call "
                "peft_linear.attach_proximal(model, optimizer, num_steps=..., scheduler=...) or "
                "attach_proximal(model, optimizer, total=...) before the first step, or set proximal_lambda to a "
                "number"
            )
        return value

    def _value(self, name: str) -> float | str:
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
        strength = self.config.proximal_lambda
        if not is_auto(strength):
            check_strength(strength)
        pattern = self.config.proximal_lambda_pattern
        if not pattern:
            return isinstance(strength, str) or strength > 0
        for key, value in pattern.items():
            check_strength(value, f"proximal_lambda_pattern[{key!r}]")
        values = map(self._value, self._keys)
        return any(isinstance(value, str) or value > 0 for value in values)

    def check_planned(self) -> None:
        """Raises `PeftLinearError` if λ of some module is "auto" and no run has been planned."""
        if is_auto(self.config.proximal_lambda):
            for name in self._keys:
                self.base(name)

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
