# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""AdamW simulated in the linearised model, and what its first step gains, from Jacobian features."""

from __future__ import annotations

import math

import torch

from examples.benchmarks.selection.training import Protocol
from peft_linear.kernels.jacobian_features import JacobianFeatures
from peft_linear.selection.problem import Problem


SIMULATED_RATES = (1e-3, 3e-3, 1e-2)


def gradient_norms(features: JacobianFeatures) -> dict[str, float]:
    """{module: Σ|∂R/∂θ|} over its adapter's parameters: AdamW's first step lowers the loss by η times that."""
    problem = Problem(
        features.outputs, features.labels, "logits" if features.outputs.shape[1] > 1 else "log_likelihood", ridge=1.0
    )
    gradient = problem.error.to(features.rows) @ features.rows
    return {
        name: sum(float(gradient[c.first : c.stop].abs().sum()) for c in features.columns if c.module == name)
        for name in features.names
    }


def simulated_losses(features: JacobianFeatures, seed: int, protocol: Protocol) -> dict[int, float]:
    """{budget of steps: held-out loss} of AdamW in the linearised model, at the best of a few learning rates."""
    half = len(features.outputs) // 2
    train, held_out = features.select_examples(range(half)), features.select_examples(range(half, 2 * half))
    batches = simulated_batches(half, seed, protocol)
    best = dict.fromkeys(protocol.steps, math.inf)
    every = math.gcd(*protocol.steps)
    for rate in SIMULATED_RATES:
        curve = train.train(
            learning_rate=[rate * min(1.0, (step + 1) / protocol.warmup) for step in range(max(protocol.steps))],
            steps=max(protocol.steps),
            held_out=held_out,
            optimizer_arguments={"weight_decay": 0.0},
            batches=batches,
            record_every=every,
        )
        for steps in protocol.steps:
            loss = float(curve.held_out_loss[steps // every])
            best[steps] = min(best[steps], loss if math.isfinite(loss) else math.inf)
    return best


def simulated_batches(examples: int, seed: int, protocol: Protocol) -> list[torch.Tensor]:
    """Numbers of the examples of each step, epoch after epoch, all batches full."""
    size, generator = min(protocol.batch_size, examples), torch.Generator().manual_seed(seed)
    batches: list[torch.Tensor] = []
    while len(batches) < max(protocol.steps):
        order = torch.randperm(examples, generator=generator)
        batches += order[: examples - examples % size].split(size)
    return batches[: max(protocol.steps)]
