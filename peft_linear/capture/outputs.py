# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Outputs f of a model: its logits, put before a kind of output (`functional.outputs`), shifted where they need it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import OutputError
from ..functional.labels import AUTO
from ..functional.outputs import Outputs, resolve_output
from .targets import base_model


class OutputFunction:
    """Turns what a model returns, and labels, into f (B, C).

    `shift` is 1 where logits predict the next token; `problem_type`, of the model's config, says what labels mean.
    """

    def __init__(self, outputs: Outputs, *, shift: int = 0, seed: int = 0, problem_type: str | None = None) -> None:
        self.output = resolve_output(outputs).seeded(seed)
        self.shift = shift
        self.problem_type = problem_type

    @classmethod
    def of(cls, model: nn.Module, outputs: Outputs, seed: int = 0) -> OutputFunction:
        root = base_model(model)
        problem_type = getattr(getattr(root, "config", None), "problem_type", None)
        if problem_type is None and isinstance(root, PreTrainedModel):
            problem_type = AUTO
        return cls(outputs, shift=label_shift(root), seed=seed, problem_type=problem_type)

    def __call__(self, model_output: Any, labels: Tensor | None) -> Tensor:
        return self.output(logits_of(model_output), labels, self.shift)


def logits_of(model_output: Any) -> Tensor:
    """The logits in what a model returned: a mapping or object with `logits`, a tuple's first tensor, or a tensor."""
    if isinstance(model_output, Tensor):
        return model_output
    if isinstance(model_output, Mapping) and isinstance(model_output.get("logits"), Tensor):
        return model_output["logits"]
    if isinstance(getattr(model_output, "logits", None), Tensor):
        return model_output.logits
    if isinstance(model_output, tuple) and model_output and isinstance(model_output[0], Tensor):
        return model_output[0]
    keys = ", ".join(model_output) if isinstance(model_output, Mapping) else type(model_output).__name__
    raise OutputError(f"the model returned no logits (it returned: {keys}); pass a model with a task head")


def label_shift(model: nn.Module) -> int:
    """1 where logits predict the next token (causal language models), 0 elsewhere."""
    config = getattr(model, "config", None)
    generates = getattr(model, "get_output_embeddings", lambda: None)() is not None
    masked = "MaskedLM" in type(model).__name__ or "PreTraining" in type(model).__name__
    return int(generates and not masked and not getattr(config, "is_encoder_decoder", False))
