# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The configuration of ProximalLoRA: a `LoraConfig` with the strength and the kind of the pull."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from ...errors import PeftLinearError
from .peft_type import PROXIMAL_LORA


SPACES = ("factors", "delta")
MODES = ("decoupled", "coupled", "projection")

# With these the adapter's change of the weight is not s·B·A.
_NOT_A_PRODUCT = ("use_dora", "kasa_config", "use_qalora", "use_bdlora", "monteclora_config")


@dataclass
class ProximalLoraConfig(LoraConfig):
    """LoRA whose trained factors are pulled toward the pretrained model, with everything a `LoraConfig` takes.

    The objective becomes `R(θ) + (λ/2)·D(θ)` with R the training loss and D the squared distance from the pretrained
    model ("Linearization Explains Fine-Tuning in Large Language Models", arXiv 2602.08239, section 3). The pull acts
    in the optimizer's step, once a step and with the learning rate of each group, whatever computes the loss. Only the
    factors A and B are pulled: a task head in `modules_to_save`, biases and DoRA's magnitudes are not.

    Args:
        proximal_lambda (`float`):
            λ >= 0. 0 is LoRA, bit for bit. Over a training run the pull multiplies a displacement that no gradient
            keeps up by about exp(−λ·Σ_t η_t), η_t the learning rates: λ that matters is of the order of 1/Σ_t η_t. The
            default 0.01 is provisional: with the learning rates usual for AdamW it is next to no pull.
        proximal_space (`"factors"` or `"delta"`):
            `"factors"`: D = Σ ‖A−A0‖² + ‖B−B0‖², the paper's. `"delta"`: D = Σ ‖s·BA − s·B0A0‖_F², the distance of
            the weights, computed from r×r matrices; it does not depend on how the product BA is written.
        proximal_mode (`"decoupled"`, `"coupled"` or `"projection"`):
            `"decoupled"`: the proximal operator after the optimizer's step (as AdamW decays weights). `"coupled"`: the
            gradient of the penalty is added to the loss gradient before the step (as L2 regularisation).
            `"projection"`, for comparison: Selective Projection Decay (Tian et al., arXiv 2411.01713), tensor by
            tensor; λ then has no unit and is not multiplied by the learning rate, 1 being the projection onto the
            ball around θ0 that the tensor came from. In factor space only.
        proximal_selective (`bool`):
            Whether the pull acts only at steps at which ⟨∇R(θ_t), θ_t−θ0⟩ >= 0 (the paper's eq. 8). The mode
            `"projection"` brings a selection of its own (per tensor, > 0) and admits no other value than `True`.

    Raises:
        PeftLinearError: one of the four is not one of its values, `r` is not positive, `proximal_space="delta"` is
            combined with a variant of LoRA whose change of the weight is not s·B·A, or `proximal_mode="projection"`
            with `proximal_space="delta"` or `proximal_selective=False`.
    """

    proximal_lambda: float = field(
        default=0.01,
        metadata={"help": "Strength λ >= 0 of the pull toward the pretrained model; 0 is plain LoRA."},
    )
    proximal_space: str = field(
        default="factors",
        metadata={"help": "Where distance is measured: 'factors' (of A and B) or 'delta' (of the weights)."},
    )
    proximal_mode: str = field(
        default="decoupled",
        metadata={
            "help": "'decoupled' (proximal operator after the step), 'coupled' (gradient before the step) or "
            "'projection' (Selective Projection Decay, for comparison)."
        },
    )
    proximal_selective: bool = field(
        default=True,
        metadata={"help": "Pull only at steps at which the loss gradient has a component away from the anchor."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PROXIMAL_LORA
        check_strength(self.proximal_lambda)
        self.proximal_lambda = float(self.proximal_lambda)
        _check_choice("proximal_space", self.proximal_space, SPACES)
        _check_choice("proximal_mode", self.proximal_mode, MODES)
        if not isinstance(self.proximal_selective, bool):
            raise PeftLinearError(f"proximal_selective must be True or False, got {self.proximal_selective!r}")
        if isinstance(self.r, bool) or not isinstance(self.r, numbers.Integral) or self.r <= 0:
            raise PeftLinearError(f"the rank r must be a positive integer, got {self.r!r}")
        bad_ranks = {key: rank for key, rank in (self.rank_pattern or {}).items() if rank <= 0}
        if bad_ranks:
            raise PeftLinearError(f"the ranks in rank_pattern must be positive integers, got {bad_ranks}")
        if self.proximal_mode == "projection":
            _check_projection(self)
        if self.proximal_space == "delta":
            variants = variants_without_product(self)
            if variants:
                raise PeftLinearError(
                    f"proximal_space='delta' needs an adapter that adds s·B·A to the weight, which is not so with "
                    f"{', '.join(variants)}; use proximal_space='factors'"
                )


def variants_without_product(config: LoraConfig) -> list[str]:
    """The fields of `config` that make the adapter's change of the weight something else than s·B·A."""
    return [name for name in _NOT_A_PRODUCT if getattr(config, name, None)]


def check_strength(value: Any) -> None:
    """Raises `PeftLinearError` unless `value` is a finite number >= 0."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise PeftLinearError(
            f"proximal_lambda must be a finite number >= 0 (0 is plain LoRA), got {value!r} "
            f"of type {type(value).__name__}"
        )


def _check_projection(config: ProximalLoraConfig) -> None:
    if config.proximal_space != "factors":
        raise PeftLinearError(
            "proximal_mode='projection' (Selective Projection Decay) is defined tensor by tensor: use "
            f"proximal_space='factors', got {config.proximal_space!r}"
        )
    if not config.proximal_selective:
        raise PeftLinearError(
            "proximal_mode='projection' (Selective Projection Decay) selects by itself, tensor by tensor: leave "
            "proximal_selective=True, or use proximal_mode='decoupled' to pull at every step"
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PeftLinearError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
