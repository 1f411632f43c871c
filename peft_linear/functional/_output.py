# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The base of all kinds of output, their registry, and the checks of labels that kinds share (see `outputs`)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import OutputError


IGNORED = -100  # transformers' label of tokens that do not count
NOTHING: frozenset[str] = frozenset()
LOSS = frozenset({"residual", "error"})


class Output:
    """A function f of logits and labels, differentiable, and the learning problem that it poses.

    `with_labels` is what it provides where there are class labels: a target to regress to ("residual"), a loss whose
    gradient in f is known ("error"), enough to simulate training with cross-entropy ("logits").
    """

    name: ClassVar[str] = ""  # stands for the kind in arguments and files
    needs_labels: ClassVar[bool] = True  # whether every batch must carry labels
    takes_tokens: ClassVar[bool] = False  # whether there is an f for a language model
    with_labels: ClassVar[frozenset[str]] = NOTHING
    target: ClassVar[float | None] = None  # of the regression, where it is one number

    @property
    def arguments(self) -> dict[str, Any]:
        """The kind's own settings, as JSON."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def seeded(self, seed: int) -> Output:
        """The same kind with its random numbers, if it has any, drawn from `seed`."""
        return self

    def __call__(self, logits: Tensor, labels: Tensor | None, shift: int = 0) -> Tensor:  # (B, C)
        """f of a batch. `shift` is 1 where logits predict the next token (causal language models), else 0.

        Raises:
            OutputError: logits of another shape, or labels that do not fit them.
        """
        if logits.ndim == 2:
            return self.of_classes(logits, labels)
        if logits.ndim == 3:
            if not self.takes_tokens:
                raise OutputError(
                    f"the model gives logits for every token, shape {tuple(logits.shape)}: too many for "
                    f"outputs={self.name!r}; use {_either(token_kinds())}"
                )
            return self.of_tokens(*_labelled_tokens(self.name, logits, labels, shift))
        raise OutputError(
            f"outputs={self.name!r} needs logits of shape (batch, labels) or (batch, tokens, vocabulary), "
            f"got {tuple(logits.shape)}"
        )

    def of_classes(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """f (B, C) of a classifier's logits (B, K)."""
        raise NotImplementedError

    def of_tokens(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """f (B, C) of a language model's logits (B, T, V), whose labels (B, T) count where `counted` (B, T) is true.

        Logits and labels of one position belong together here (they are shifted already).
        """
        raise NotImplementedError

    def provides(self, labels: Tensor | None) -> frozenset[str]:
        """What criteria can ask of this f with such labels: "residual", "error", "logits"."""
        return self.with_labels

    def what(self, labels: Tensor | None) -> str:
        """Outputs of this kind, in words."""
        return f"outputs of kind {self.name!r}"

    def check_labels(self, labels: Tensor, num_outputs: int) -> None:
        """Raises OutputError where class labels (N,) cannot belong to `num_outputs` outputs an example."""

    def understand(self, labels: Tensor, num_outputs: int, problem_type: str | None = None) -> Tensor | None:
        """The labels of all examples as kernels keep them; None where there is not one an example.

        Args:
            labels: (N, …), as batches have them.
            problem_type: Of the model's config.

        Raises:
            OutputError: they cannot belong to these outputs.
        """
        if labels.ndim != 1:
            return None
        if labels.is_floating_point():
            return labels.double()
        self.check_labels(labels, num_outputs)
        return labels.long()

    def targets(self, outputs: Tensor, labels: Tensor | None) -> Tensor:  # both (N, C) float64
        """What ridge regression aims at.

        Raises:
            OutputError: there is no natural target.
        """
        if self.target is not None:
            return torch.full_like(outputs, self.target)
        raise OutputError(
            f"{self.what(labels)} have no target to regress to; compute kernels of labelled logits instead"
        )

    def error(self, outputs: Tensor, labels: Tensor | None) -> Tensor:  # both (N, C) float64
        """∂ℓ_i/∂f(x_i), the gradient of each example's own loss.

        Raises:
            OutputError: f does not determine a loss.
        """
        raise OutputError(f"{self.what(labels)} do not determine a loss; compute kernels of labelled logits instead")

    def mean_loss(self, outputs: Tensor, labels: Tensor | None) -> float | None:  # both (N, C) float64
        """The mean loss of the examples, where f determines it."""
        return None


Kind = TypeVar("Kind", bound=type[Output])
OUTPUTS: dict[str, type[Output]] = {}


def register_output(kind: Kind) -> Kind:
    """Class decorator: makes a kind known by its name. It must be possible to construct it without arguments."""
    OUTPUTS[kind.name] = kind
    return kind


def token_kinds() -> list[str]:
    """Names of the kinds that a language model has."""
    return [name for name, kind in OUTPUTS.items() if kind.takes_tokens]


def label_columns(name: str, logits: Tensor, labels: Tensor | None) -> Tensor:  # (B, 1) int64
    """The column of each example's label in logits (B, K).

    Raises:
        OutputError: there is not one class label an example, or it lies outside the logits.
    """
    assert labels is not None  # reading the batches has refused those without
    labels = labels.to(logits.device)
    if labels.is_floating_point() or labels.ndim != 1:
        raise OutputError(
            f"outputs={name!r} needs one integer label an example, got labels of shape "
            f'{tuple(labels.shape)} and dtype {labels.dtype}; use outputs="logits"'
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise OutputError(
            f"labels must lie in [0, {logits.shape[1]}) for {logits.shape[1]} logits, "
            f"got values from {int(labels.min())} to {int(labels.max())}"
        )
    return labels.long()[:, None]


def _labelled_tokens(
    name: str, logits: Tensor, labels: Tensor | None, shift: int
) -> tuple[Tensor, Tensor, Tensor]:  # logits (B, T, V), labels (B, T), whether they count (B, T)
    """Logits and the labels that they predict, position by position."""
    if labels is None or labels.shape != logits.shape[:2]:
        got = "none" if labels is None else f"shape {tuple(labels.shape)}"
        raise OutputError(
            f"outputs={name!r} needs a label for every token, shape {tuple(logits.shape[:2])} "
            f"({IGNORED} where none counts), got {got}"
        )
    labels = labels.to(logits.device)
    if shift:
        logits, labels = logits[:, :-shift], labels[:, shift:]
    counted = labels != IGNORED
    if not bool(counted.any(1).all()):
        example = int((~counted.any(1)).nonzero()[0])
        raise OutputError(f"example {example} of a batch has no labelled token; drop it, or label some tokens")
    return logits, labels, counted


def _either(names: list[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
