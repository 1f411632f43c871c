# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How much a model's outputs, and its Jacobian, change with the adapter's parameters: sampled around θ0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..functional.bounds import LipschitzEstimate, sample_jacobian_lipschitz, sample_lipschitz
from .batches import read_batches
from .forward_mode import evaluation
from .linearize import LinearizedModel
from .outputs import logits_of


def sample_model_lipschitz(
    linearized: LinearizedModel,
    batches: Iterable[Mapping[str, Any]],
    radii: Sequence[float],  # in units of the parameters; the distance ‖θ−θ0‖ of a training run is a good one
    samples: int = 8,
    seed: int = 0,
) -> tuple[LipschitzEstimate, LipschitzEstimate]:
    """Lower estimates of the Lipschitz constants, in the adapter's parameters, of all logits and of their Jacobian.

    The paper's Algorithm 1 (arXiv 2602.08239) on the balls of the given radii around θ0: models at `θ0 + r·v/‖v‖`,
    v ~ N(0, I); average and maximum against the radius. Sampling can only show a constant to be *at least* this
    large: directions that training takes may be far steeper than random ones.

    Returns:
        (of the map θ → f_θ(X), of the map θ → J_θ(X)) with X all examples of `batches`, 2-norms. The second times
        `‖θ−θ0‖²/2` is comparable with the gap that training leaves.

    Raises:
        PeftLinearError: no batches, no radii, one that is not above 0, or samples < 1.

    Cost: len(radii)·samples evaluations of the model (twice) and of the linear model. The linear model is not changed.
    """
    model = linearized.wrapped
    anchor = linearized.anchor_state_dict()
    device = next(iter(anchor.values())).device
    read = [batch.to(device).inputs for batch in read_batches(batches, model, False, "the estimate")]

    def named(vector: Tensor) -> dict[str, Tensor]:
        pieces = vector.split([value.numel() for value in anchor.values()])
        return {key: piece.view_as(anchor[key]).to(anchor[key]) for key, piece in zip(anchor, pieces, strict=True)}

    def real(vector: Tensor) -> Tensor:
        parameters = named(vector)
        with evaluation(model), torch.no_grad():
            outputs = [logits_of(functional_call(model, parameters, (), inputs)) for inputs in read]
        return torch.cat([logits.double().reshape(-1) for logits in outputs])

    def linear(vector: Tensor) -> Tensor:
        parameters = named(vector)
        outputs = [logits_of(linearized.linear_outputs(parameters, **inputs)) for inputs in read]
        return torch.cat([logits.double().reshape(-1) for logits in outputs])

    center = torch.cat([value.double().reshape(-1) for value in anchor.values()])
    return (
        sample_lipschitz(real, center, radii, samples, seed),
        sample_jacobian_lipschitz(real, linear, center, radii, samples, seed),
    )
