# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration of ProximalLoRA: a `LoraConfig` with the strength λ and the form of the proximal term."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from ...errors import PeftLinearError
from ...functional.schedule import SCHEDULES
from .peft_type import PROXIMAL_LORA


SPACES = ("factors", "delta", "function")
MODES = ("decoupled", "coupled", "projection")

AUTO = "auto"
# λ·Ση that proximal_lambda="auto" aims at, by proximal_space: 1 − exp(−c) is the share of an unopposed displacement
# that is removed over the run. A new space needs a value here.
AUTO_EXPONENTS = {"factors": 1.0, "delta": 0.5, "function": 0.5}

# With these the adapter's change of the weight is not s·B·A.
_NOT_A_PRODUCT = ("use_dora", "kasa_config", "use_qalora", "use_bdlora", "monteclora_config")


@dataclass
class ProximalLoraConfig(LoraConfig):
    """LoRA whose trained factors are pulled toward the pretrained model, with everything a `LoraConfig` takes.

    The objective becomes `R(θ) + (λ/2)·D(θ)` with R the training loss and D the squared distance from the pretrained
    model ("Linearization Explains Fine-Tuning in Large Language Models", arXiv 2602.08239, section 3). The pull is
    applied once per optimizer step, with the learning rate of each parameter group, however the loss is computed. Only
    the factors A and B are pulled: a task head in `modules_to_save`, biases and DoRA's magnitudes are not.

    Args:
        proximal_lambda (`float` or `"auto"`, defaults to `"auto"`):
            λ >= 0. 0 is LoRA, bit for bit. Over a training run with learning rates η_t the pull multiplies a
            displacement that no gradient opposes by about exp(−λ·Σ_t η_t), so λ has an effect from about 1/Σ_t η_t on.
            `"auto"` is λ = c/Σ_t η_t, with c = 1 in factor space and 0.5 in the other two (`AUTO_EXPONENTS`), so that
            the share 1 − exp(−c) is removed, 63 % or 39 %, whatever the rates and the length of the run. The sum is
            that of the planned run. The Trainer and TRL know it; in a loop of your own
            `attach_proximal(model, optimizer, num_steps=..., scheduler=...)` or `attach_proximal(..., total=...)` says
            it, and without it the first step is an error. Where factors have several rates (LoRA+), it is the largest
            group's sum. The sum is of the rates alone: `proximal_schedule` and `proximal_selective` then remove less.
            Once known, the number replaces `"auto"` in the model's copy of the configuration and is saved with the
            adapter; another run of the same model has its own. With `proximal_mode="projection"`, where λ has no unit,
            `"auto"` is 1.0; with `"coupled"` it is an error.
        proximal_space (`"factors"`, `"delta"` or `"function"`, defaults to `"factors"`):
            `"factors"`: D = Σ ‖A−A0‖² + ‖B−B0‖², the paper's. `"delta"`: D = Σ ‖s·BA − s·B0A0‖_F², the distance of
            the weights, computed from r×r matrices; it does not depend on how BA is factorised. `"function"`: the
            distance of what the model computes on reference data, Σ g·tr(E C Eᵀ) with E = s·BA − s·B0A0, half of
            which is about KL(pretrained ‖ tuned) in nats a token. It needs `set_proximal_reference(model,
            collect_reference(base, batches))`; λ is in units in which the mean of g·tr(C)/d_in over its modules is 1.
        proximal_mode (`"decoupled"`, `"coupled"` or `"projection"`, defaults to `"decoupled"`):
            `"decoupled"`: the proximal operator after the optimizer's step (as AdamW decays weights). `"coupled"`: the
            gradient of the penalty is added to the loss gradient before the step (as L2 regularisation); under Adam
            its λ is relative to the loss gradient, and 1.0 is a strong pull. `"projection"`, for comparison:
            Selective Projection Decay (Tian et al., arXiv 2411.01713), tensor by tensor; λ then has no unit and is not
            multiplied by the learning rate, and 1 projects each tensor onto the ball around θ0 on which it was before
            the step. In factor space only.
        proximal_selective (`bool`, defaults to `False`):
            Whether the pull acts only at steps at which ⟨∇R(θ_t), θ_t−θ0⟩ >= 0 (the paper's eq. 8). In our measurement
            this needed a λ 6 to 28 times as large for the same gain, without reducing forgetting by the measures that
            decide it. The mode `"projection"` has its own selection (per tensor, > 0) and ignores this field.
        proximal_lambda_pattern (`dict`, defaults to `{}`):
            λ of modules by name or regular expression, matched as `rank_pattern` and `alpha_pattern` are; all other
            modules have `proximal_lambda`. A module with λ = 0 is plain LoRA. The selective rule weights each module's
            inner product by its λ.
        proximal_schedule (`"constant"`, `"linear"`, `"cosine"` or `"warmup"`, defaults to `"constant"`):
            How λ changes over the first `proximal_schedule_steps` optimizer steps: linearly or along a half cosine
            down to 0, or linearly up from 0. Later steps have the last value. The position is stored in the
            optimizer's state, so that a run resumed with its optimizer continues the schedule.
        proximal_schedule_steps (`int`, defaults to `None`):
            Length of the schedule in optimizer steps of this adapter; needed by all but `"constant"`.

    Raises:
        PeftLinearError: a field has an invalid value, `r` is not positive, `proximal_space` other than "factors" is
            combined with a variant of LoRA whose change of the weight is not s·B·A, or with
            `proximal_mode="projection"`, or `proximal_mode="coupled"` with `proximal_lambda="auto"`.
    """

    proximal_lambda: float | str = field(
        default=AUTO,
        metadata={
            "help": "Strength λ >= 0 of the pull toward the pretrained model; 0 is plain LoRA, 'auto' is computed "
            "from the sum of the learning rates of the run."
        },
    )
    proximal_space: str = field(
        default="factors",
        metadata={
            "help": "Where distance is measured: 'factors' (of A and B), 'delta' (of the weights) or 'function' (of "
            "outputs on reference data)."
        },
    )
    proximal_mode: str = field(
        default="decoupled",
        metadata={
            "help": "'decoupled' (proximal operator after the step), 'coupled' (gradient before the step) or "
            "'projection' (Selective Projection Decay, for comparison)."
        },
    )
    proximal_selective: bool = field(
        default=False,
        metadata={"help": "Pull only at steps at which the loss gradient has a component away from the anchor."},
    )
    proximal_lambda_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "λ by module name or regular expression, as in alpha_pattern; others: proximal_lambda."},
    )
    proximal_schedule: str = field(
        default="constant",
        metadata={"help": "How λ changes: 'constant', 'linear' or 'cosine' (down to 0), 'warmup' (up from 0)."},
    )
    proximal_schedule_steps: int | None = field(
        default=None,
        metadata={"help": "Length of the schedule of λ in optimizer steps; needed unless it is 'constant'."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PROXIMAL_LORA
        _check_choice("proximal_space", self.proximal_space, SPACES)
        _check_choice("proximal_mode", self.proximal_mode, MODES)
        self.proximal_lambda = _checked_lambda(self.proximal_lambda, self.proximal_mode)
        if not isinstance(self.proximal_selective, bool):
            raise PeftLinearError(f"proximal_selective must be True or False, got {self.proximal_selective!r}")
        self.proximal_lambda_pattern = _checked_pattern(self.proximal_lambda_pattern)
        _check_schedule(self)
        if isinstance(self.r, bool) or not isinstance(self.r, numbers.Integral) or self.r <= 0:
            raise PeftLinearError(f"the rank r must be a positive integer, got {self.r!r}")
        bad_ranks = {key: rank for key, rank in (self.rank_pattern or {}).items() if rank <= 0}
        if bad_ranks:
            raise PeftLinearError(f"the ranks in rank_pattern must be positive integers, got {bad_ranks}")
        if self.proximal_mode == "projection":
            _check_projection(self)
        if self.proximal_space != "factors":
            variants = variants_without_product(self)
            if variants:
                raise PeftLinearError(
                    f"proximal_space={self.proximal_space!r} needs an adapter that adds s·B·A to the weight; this one "
                    f"has {', '.join(variants)}, which changes it otherwise: use proximal_space='factors'"
                )


def variants_without_product(config: LoraConfig) -> list[str]:
    """The fields of `config` that make the adapter's change of the weight something else than s·B·A."""
    return [name for name in _NOT_A_PRODUCT if getattr(config, name, None)]


def check_strength(value: Any, name: str = "proximal_lambda") -> None:
    """Raises `PeftLinearError` unless `value` is a finite number >= 0; `name` is its name in the message."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not _is_finite(value) or value < 0:
        auto = f" or {AUTO!r}" if name == "proximal_lambda" else ""
        raise PeftLinearError(
            f"{name} must be a finite number >= 0 (0 is plain LoRA){auto}, got {_shown(value)} of type "
            f"{type(value).__name__}"
        )


def is_auto(value: Any) -> bool:
    """Whether λ is to be computed from the planned run."""
    return isinstance(value, str) and value == AUTO


def _checked_lambda(value: Any, mode: str) -> float | str:
    if not is_auto(value):
        check_strength(value)
        return float(value)
    if mode == "coupled":
        raise PeftLinearError(
            "proximal_lambda='auto' is in units of what a decoupled pull removes; with proximal_mode='coupled' under "
            "Adam λ is relative to the loss gradient: set proximal_lambda to a number (0.002 to 0.3 in our tasks), or "
            "use proximal_mode='decoupled'"
        )
    return 1.0 if mode == "projection" else AUTO


def _is_finite(value: Any) -> bool:
    """Whether a float can hold it: integers and fractions may be larger."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _checked_pattern(pattern: Any) -> dict[str, float]:
    if not isinstance(pattern or {}, dict):
        raise PeftLinearError(
            f"proximal_lambda_pattern must be a dict of λ by module name or regular expression, got {pattern!r}"
        )
    for key, value in (pattern or {}).items():
        check_strength(value, f"proximal_lambda_pattern[{key!r}]")
        try:
            re.compile(key)
        except (TypeError, re.error) as error:
            raise PeftLinearError(
                f"the key {key!r} of proximal_lambda_pattern is not a regular expression ({error}); use re.escape for "
                "literal names"
            ) from error
    return {key: float(value) for key, value in (pattern or {}).items()}


def _check_schedule(config: ProximalLoraConfig) -> None:
    _check_choice("proximal_schedule", config.proximal_schedule, SCHEDULES)
    steps = config.proximal_schedule_steps
    if config.proximal_schedule == "constant":
        if steps is not None:
            raise PeftLinearError(
                f"proximal_schedule_steps={steps!r} is the length of a schedule, but proximal_schedule is 'constant'; "
                f"set it to one of {', '.join(map(repr, SCHEDULES[1:]))}, or omit proximal_schedule_steps"
            )
        return
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps <= 0:
        raise PeftLinearError(
            f"proximal_schedule={config.proximal_schedule!r} needs proximal_schedule_steps, a positive number of "
            f"optimizer steps (usually the steps of the whole run), got {steps!r}"
        )
    config.proximal_schedule_steps = int(steps)


def _check_projection(config: ProximalLoraConfig) -> None:
    if config.proximal_space != "factors":
        raise PeftLinearError(
            "proximal_mode='projection' (Selective Projection Decay) is defined tensor by tensor: use "
            f"proximal_space='factors', got {config.proximal_space!r}"
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PeftLinearError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
