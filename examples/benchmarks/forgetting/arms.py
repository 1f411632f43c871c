# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The arms of the forgetting benchmark: what is compared, and at which values of its one parameter.

Every arm has the same number of values. The grids were chosen with a pilot seed that is not among the compared ones,
so that each path covers the range in which arms are compared, from nearly plain LoRA to about half of its gain. Decays
and λ are in multiples of 1/Σ_t η_t. Since scaling an adapter down is free after any training, it is also tried on top
of weight decay and of ProximalLoRA, both at 1/Σ_t η_t.
"""

from __future__ import annotations

from examples.benchmarks.forgetting.training import EARLY_STOPPING, SCALED, Arm


def grids(encoder: tuple[float, ...], language_model: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    return {"encoder": encoder, "language_model": language_model}


def proximal(space: str, selective: bool) -> dict[str, object]:
    return {"proximal_space": space, "proximal_mode": "decoupled", "proximal_selective": selective}


def both(*values: float) -> dict[str, tuple[float, ...]]:
    return grids(values, values)


SCALES = both(0.8, 0.6, 0.4, 0.25)
L2 = {"proximal_space": "factors", "proximal_mode": "coupled", "proximal_selective": False}

ARMS = (
    Arm("lower_rate", "lower learning rate", both(0.5, 0.25, 0.12, 0.06), "learning_rate"),
    Arm(EARLY_STOPPING, "early stopping", both(0.6, 0.3, 0.15, 0.07)),
    Arm("smaller_alpha", "smaller lora_alpha", both(0.25, 0.06, 0.015, 0.004), "lora_alpha"),
    Arm(SCALED, "LoRA scaled down after training", SCALES),
    Arm("weight_decay", "AdamW weight decay", both(1.0, 3.0, 6.0, 12.0), "weight_decay", inverse_rates=True),
    Arm(
        "l2_factors",
        "L2 toward θ0 in the loss (factors)",
        grids((0.03, 0.1, 0.3, 1.0), (0.002, 0.005, 0.01, 0.02)),
        proximal=L2,
    ),
    Arm(
        "projection_decay",
        "selective projection decay",
        grids((2.0, 5.0, 10.0, 20.0), (1.0, 3.0, 5.0, 8.0)),
        proximal={"proximal_mode": "projection"},
        ends_at_base=False,
    ),
    Arm(
        "weight_decay_scaled",
        "weight decay 1/Ση, then scaled down",
        SCALES,
        start=("weight_decay", 1.0),
    ),
    Arm(
        "proximal_factors",
        "ProximalLoRA, factors",
        both(1.0, 3.0, 8.0, 16.0),
        proximal=proximal("factors", selective=False),
        inverse_rates=True,
    ),
    Arm(
        "proximal_factors_selective",
        "ProximalLoRA, factors, selective",
        both(10.0, 30.0, 100.0, 1000.0),
        proximal=proximal("factors", selective=True),
        inverse_rates=True,
        ends_at_base=False,
    ),
    Arm(
        "proximal_delta",
        "ProximalLoRA, delta",
        grids((1.0, 3.0, 8.0, 16.0), (0.3, 1.0, 2.0, 5.0)),
        proximal=proximal("delta", selective=False),
        inverse_rates=True,
    ),
    Arm(
        "proximal_delta_selective",
        "ProximalLoRA, delta, selective",
        grids((10.0, 30.0, 100.0, 300.0), (3.0, 10.0, 30.0, 100.0)),
        proximal=proximal("delta", selective=True),
        inverse_rates=True,
        ends_at_base=False,
    ),
    Arm(
        "proximal_factors_scaled",
        "ProximalLoRA, factors, λ = 1/Ση, then scaled down",
        SCALES,
        start=("proximal_factors", 1.0),
    ),
    Arm(
        "proximal_delta_scaled",
        "ProximalLoRA, delta, λ = 1/Ση, then scaled down",
        SCALES,
        start=("proximal_delta", 1.0),
    ),
)
