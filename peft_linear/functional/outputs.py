# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The kinds of output f that a kernel can be taken of: one class a kind, pure functions of logits and labels.

| name | f of one example | C |
|---|---|---|
| logits | all logits of a classifier | number of labels |
| label_logit | the logit of the label | 1 |
| margin | log-odds of the label: f_y − log Σ_{a≠y} exp f_a | 1 |
| log_likelihood | log-probability of the label, or of all labelled tokens of a language model | 1 |
| random_projection | k random ±1 projections of the logits (at the labelled tokens), times 1/√k | k |
| loss | the model's loss on this example: cross-entropy, averaged over its labelled tokens | 1 |

A new kind is a subclass of `Output` with `@register_output`: its name is then a value of `outputs=` everywhere. What
it has besides the function (a target, a loss) decides which criteria of `selection` can use its kernels.

Shapes: a classifier's logits are (B, K), with labels (B,); a language model's are (B, T, V), with labels (B, T).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import OutputError, PeftLinearError
from ._output import IGNORED, LOSS, NOTHING, OUTPUTS, Output, label_columns, register_output, token_kinds
from .labels import labels_of_logits, several_labels
from .simulation import one_hot_targets


__all__ = [
    "IGNORED",
    "LOSS",
    "OUTPUTS",
    "LabelLogit",
    "LogLikelihood",
    "Logits",
    "Loss",
    "Margin",
    "Output",
    "Outputs",
    "RandomProjection",
    "kinds_providing",
    "label_columns",
    "recorded_output",
    "register_output",
    "resolve_output",
    "token_kinds",
]

Outputs = str | Output  # as `outputs=` takes them


def resolve_output(outputs: Outputs) -> Output:
    """The kind that a name stands for; an object as it is.

    Raises:
        PeftLinearError: there is no such kind.
    """
    if isinstance(outputs, Output):
        return outputs
    if not isinstance(outputs, str) or outputs not in OUTPUTS:
        raise PeftLinearError(f"outputs must be one of {', '.join(map(repr, OUTPUTS))}, got {outputs!r}")
    return OUTPUTS[outputs]()


def recorded_output(name: str) -> Output:
    """The kind that kernels were computed with; of one that is not registered nothing is known but its name."""
    if name in OUTPUTS:
        return OUTPUTS[name]()
    unknown = Output()
    unknown.name = name  # type: ignore[misc]
    return unknown


def kinds_providing(need: str) -> list[str]:
    """Names of the kinds that provide `need`, given class labels."""
    return [name for name, kind in OUTPUTS.items() if need in kind.with_labels]


@register_output
@dataclass(frozen=True)
class Logits(Output):
    """All logits of a classifier: `f = z`. Its loss depends on the labels, see `functional.labels`."""

    name = "logits"
    needs_labels = False
    with_labels = LOSS | {"logits"}

    def of_classes(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        return logits

    def provides(self, labels: Tensor | None) -> frozenset[str]:
        if labels is None:
            return NOTHING
        return LOSS if labels.is_floating_point() or several_labels(labels) else self.with_labels

    def what(self, labels: Tensor | None) -> str:
        if labels is None:
            return "logits without labels"
        if several_labels(labels):
            return "logits with several labels an example"
        return "logits with float labels" if labels.is_floating_point() else "logits with class labels"

    def understand(self, labels: Tensor, num_outputs: int, problem_type: str | None = None) -> Tensor:
        kept = labels_of_logits(labels, num_outputs, problem_type)
        if kept.ndim == 1 and not kept.is_floating_point():
            self.check_labels(kept, num_outputs)
        return kept

    def check_labels(self, labels: Tensor, num_outputs: int) -> None:
        if num_outputs > 1 and (int(labels.min()) < 0 or int(labels.max()) >= num_outputs):
            low, high = int(labels.min()), int(labels.max())
            more = f"load the model with num_labels={high + 1}, or fix the labels"
            raise OutputError(
                f"labels must lie in [0, {num_outputs}) for {num_outputs} logits, got values from {low} to {high}; "
                + (more if low >= 0 else "leave out the examples that have none")
            )

    def targets(self, outputs: Tensor, labels: Tensor | None) -> Tensor:
        """One-hot labels; targets and several labels (0 and 1) as they are."""
        if labels is None:
            return super().targets(outputs, labels)
        return self._one_hot(outputs, labels)

    def error(self, outputs: Tensor, labels: Tensor | None) -> Tensor:
        """`softmax(f) − onehot(y)`; with float labels `f − y`; with several labels `(σ(f) − y)/C`."""
        if labels is None:
            return super().error(outputs, labels)
        if several_labels(labels):
            return (outputs.sigmoid() - self._one_hot(outputs, labels)) / outputs.shape[1]
        predicted = outputs if labels.is_floating_point() else outputs.softmax(dim=1)
        return predicted - self._one_hot(outputs, labels)

    def _one_hot(self, outputs: Tensor, labels: Tensor) -> Tensor:
        labels = labels.double() if several_labels(labels) else labels
        try:
            return one_hot_targets(labels, outputs.shape)
        except ValueError as error:
            raise OutputError(f"the kernels' labels do not belong to their logits: {error}") from error


@register_output
@dataclass(frozen=True)
class LabelLogit(Output):
    """The logit of the label: `f = z_y`."""

    name = "label_logit"

    def of_classes(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        return logits.gather(1, label_columns(self.name, logits, labels))


@register_output
@dataclass(frozen=True)
class Margin(Output):
    """Log-odds of the label: `f = z_y − log Σ_{a≠y} exp z_a`. Its loss is logistic, `log(1 + exp(−f))`."""

    name = "margin"
    with_labels = LOSS
    target = 1.0

    def of_classes(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        column = label_columns(self.name, logits, labels)
        return logits.gather(1, column) - logits.scatter(1, column, -torch.inf).logsumexp(1, keepdim=True)

    def error(self, outputs: Tensor, labels: Tensor | None) -> Tensor:
        """`−σ(−f)`."""
        return -torch.sigmoid(-outputs)


@register_output
@dataclass(frozen=True)
class LogLikelihood(Output):
    """`f = log p(y)`, summed over the labelled tokens of a language model; the loss is −f."""

    name = "log_likelihood"
    takes_tokens = True
    with_labels = LOSS
    target = 0.0  # certainty

    def of_classes(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        chosen = logits.gather(1, label_columns(self.name, logits, labels))
        return chosen - logits.logsumexp(1, keepdim=True)

    def of_tokens(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return _token_log_likelihood(logits, labels, counted)

    def error(self, outputs: Tensor, labels: Tensor | None) -> Tensor:
        return torch.full_like(outputs, -1.0)

    def mean_loss(self, outputs: Tensor, labels: Tensor | None) -> float | None:
        return -float(outputs.mean())


@register_output
@dataclass(frozen=True)
class RandomProjection(Output):
    """`num_projections` random ±1 sums of all logits, times 1/√num_projections, of which `E[Σ_k K_kk] = Σ_a K_aa`.

    Every example has the same signs; of a language model the p-th labelled token has its own.
    """

    name = "random_projection"
    needs_labels = False  # a classifier's logits do without
    takes_tokens = True

    num_projections: int = 16
    seed: int = field(default=0, init=False)
    _signs: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)  # (V, k) a position

    def __post_init__(self) -> None:
        if not isinstance(self.num_projections, int) or self.num_projections <= 0:
            raise PeftLinearError(f"num_projections must be a positive integer, got {self.num_projections!r}")

    def seeded(self, seed: int) -> Output:
        other = RandomProjection(self.num_projections)
        object.__setattr__(other, "seed", seed)
        return other

    def of_classes(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        return logits @ self._projection(0, logits)

    def of_tokens(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        # The p-th labelled token of every example is multiplied by the same signs, wherever padding has put it.
        order = torch.argsort(counted.to(torch.uint8), dim=1, descending=True, stable=True)
        total = logits.new_zeros(len(logits), self.num_projections)
        for p in range(int(counted.sum(1).max())):
            has = counted.gather(1, order[:, p : p + 1])  # (B, 1)
            token = logits.gather(1, order[:, p, None, None].expand(-1, 1, logits.shape[2]))[:, 0]
            total = total + (token @ self._projection(p, logits)).masked_fill(~has, 0.0)
        return total

    def _projection(self, position: int, like: Tensor) -> Tensor:
        """(V, k) of ±1/√k, the same for every batch; 1/√k makes Σ_k K_kk unbiased for the trace kernel Σ_a K_aa."""
        while len(self._signs) <= position:
            generator = torch.Generator().manual_seed((self.seed << 20) + len(self._signs))
            signs = torch.randint(0, 2, (like.shape[-1], self.num_projections), generator=generator, dtype=torch.int8)
            self._signs.append(signs * 2 - 1)
        return self._signs[position].to(like) / self.num_projections**0.5


@register_output
@dataclass(frozen=True)
class Loss(Output):
    """Cross-entropy of the example, averaged over its labelled tokens: kernels of loss gradients."""

    name = "loss"
    takes_tokens = True
    with_labels = LOSS
    target = 0.0

    def of_classes(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        chosen = logits.gather(1, label_columns(self.name, logits, labels))
        return -(chosen - logits.logsumexp(1, keepdim=True))

    def of_tokens(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return -_token_log_likelihood(logits, labels, counted) / counted.sum(1, keepdim=True)

    def error(self, outputs: Tensor, labels: Tensor | None) -> Tensor:
        return torch.full_like(outputs, 1.0)

    def mean_loss(self, outputs: Tensor, labels: Tensor | None) -> float | None:
        return float(outputs.mean())


def _token_log_likelihood(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:  # (B, 1)
    chosen = logits.gather(2, labels.masked_fill(~counted, 0)[..., None])[..., 0]
    return (chosen - logits.logsumexp(2)).masked_fill(~counted, 0.0).sum(1, keepdim=True)
