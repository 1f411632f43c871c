# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""One run: an arm's training, and all measures of the model that it leaves, also with the adapter scaled down."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from examples.benchmarks.language.batches import Encoded, training_batches
from examples.benchmarks.language.training import BATCH, curve, mean_loss, optimise, with_adapter
from examples.common.machine import peak_bytes
from peft_linear import proximal_distance, set_proximal_reference

from .arms import Arm, function_reference
from .measures import Measures, rounded


def train_and_measure(
    arm: Arm, train: Sequence[Encoded], validation: Sequence[Encoded], measures: Measures, rate: float
) -> dict:
    """The record of a run but for its name; the base model comes back bitwise as it was."""
    request = arm.request
    model = request.model
    start = time.perf_counter()
    reference = function_reference(request)
    config = arm.config()
    processor = time.process_time()
    forget_peak()
    with arm.base(config), with_adapter(model, config, request.seed) as wrapped:
        set_proximal_reference(wrapped, reference)
        arm.attach(wrapped)
        preparation = time.process_time() - processor
        batches = training_batches(train, BATCH, request.steps, request.seed)
        batches = batches[: max(1, round(arm.steps_factor * request.steps))]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        processor = time.process_time()
        losses, seconds = optimise(
            model,
            parameters,
            batches,
            rate * arm.rate_factor,
            loss_of=arm.loss,
            weight_decay=arm.weight_decay,
            planned=request.steps,
            begin=arm.begin,
        )
        processor = time.process_time() - processor
        peak = peak_bytes()
        found = {
            "validation_loss": rounded(mean_loss(model, validation)),
            "scales": read_scaled(arm, measures),
            "delta_distance": distance(wrapped, "delta"),
            "function_distance": distance(wrapped, "function"),
            **arm.notes(),
        }
    return {
        **found,
        "train_curve": curve(losses),
        "trained_steps": len(losses),
        "seconds_per_step": round(seconds / len(losses), 3),
        "cpu_seconds_per_step": round(processor / len(losses), 3),  # what other work does not lengthen
        "preparation_cpu_seconds": round(preparation, 1),  # beyond plain LoRA's: reference statistics of the arm
        "peak_mib": round(peak / 2**20),
        "seconds": round(time.perf_counter() - start, 1),
    }


def read_scaled(arm: Arm, measures: Measures) -> dict[str, dict[str, float | None]]:
    """{scale: measures}; HumanEval's loss at scale 1 alone."""
    found = {}
    for scale in arm.scales:
        with arm.scaled(arm.request.model, scale):
            found[f"{scale:g}"] = measures.read(arm.request.model, human_eval=scale == 1.0)
    return found


def distance(wrapped: nn.Module, space: str) -> float | None:
    """How far the adapter is from the base model; its square in function space is twice the estimated KL."""
    return rounded(proximal_distance(wrapped, space=space))


def forget_peak() -> None:
    """Lets the peak of the resident memory start again, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
