# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The proximal term in every optimizer step.

- `hook`: how an optimizer's `step()` is intercepted, torch's own and others (`attach_proximal`);
- `step`: what is done before and after one optimizer step;
- `updates`: which factors of which adapters a step updates, with their anchors, learning rates and λ;
- `precision`: the weights of bfloat16 and float16 factors in float32;
- `elsewhere`: weights that an optimizer keeps beside the parameters;
- `operators`: the penalty's gradient, the proximal operator and the projection, on these factors;
- `delta_space`: the same in delta space and function space, modules of equal shapes together;
- `collect`: the statistics that function space measures distance by;
- `reference_data`, `kl`, `kl_budget`: the KL from the pretrained model on reference data, and λ steered to it;
- `shards`: factors that are sharded over processes (FSDP2);
- `plan`: the sum of the learning rates of a run before it, of which `proximal_lambda="auto"` is computed;
- `monitor`: distance, what was removed, firing rate and λ while an adapter trains.
"""

from .collect import collect_reference
from .hook import ProximalHandle, attach_proximal
from .kl import kl_to_base, kl_to_base_loss
from .kl_budget import KlBudget
from .monitor import (
    proximal_distance,
    proximal_exponent,
    proximal_firing_rate,
    proximal_strength,
    proximal_summary,
)


__all__ = [
    "KlBudget",
    "ProximalHandle",
    "attach_proximal",
    "collect_reference",
    "kl_to_base",
    "kl_to_base_loss",
    "proximal_distance",
    "proximal_exponent",
    "proximal_firing_rate",
    "proximal_strength",
    "proximal_summary",
]
