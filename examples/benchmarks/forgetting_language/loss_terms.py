# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Arms that add a term to the loss: KL to the base model, replay, and training on likely tokens alone."""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from examples.benchmarks.language.batches import Encoded, pack, token_losses, training_batches

from .arms import Arm, Request, register
from .measures import divergence, predictions


class ReferenceTerm(Arm):
    """The loss plus `strength` times the mean of a term over `texts` reference texts a step, in a seeded order."""

    texts = 2

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.base_states = request.once("base_states", self._base_states)  # a tensor (n, width) for each text
        numbers = list(range(len(request.reference)))
        self.order = iter(training_batches(numbers, self.texts, request.steps, request.seed + 1))

    def loss(self, model: nn.Module, batch: list[Encoded]) -> Tensor:
        numbers = next(self.order)
        hidden, labels = predictions(model, [self.request.reference[number] for number in numbers])
        base = torch.cat([self.base_states[number] for number in numbers])
        log_tuned = model.lm_head(hidden).float().log_softmax(-1)
        return super().loss(model, batch) + self.request.strength * self.term(model, log_tuned, base, labels)

    def term(self, model: nn.Module, log_tuned: Tensor, base: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def _base_states(self) -> list[Tensor]:
        return [predictions(self.request.model, [text])[0] for text in self.request.reference]


@register("kl")
class Kl(ReferenceTerm):
    """KL(base ‖ tuned) on 2 reference texts a step. Strength: its weight.

    The base model's hidden states of the texts are kept, so that a step needs no forward pass of the base.
    """

    def term(self, model: nn.Module, log_tuned: Tensor, base: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            log_base = model.lm_head(base).float().log_softmax(-1)
        return divergence(log_tuned, log_base).mean()


@register("replay")
class Replay(ReferenceTerm):
    """The language modelling loss on 4 reference texts a step, as many as of the task. Strength: its weight."""

    texts = 4

    def term(self, model: nn.Module, log_tuned: Tensor, base: Tensor, labels: Tensor) -> Tensor:
        return functional.nll_loss(log_tuned, labels)


@register("replay_kl")
class ReplayKl(Kl):
    """Replay and KL on the same 2 reference texts a step. Strength: the weight of each."""

    def term(self, model: nn.Module, log_tuned: Tensor, base: Tensor, labels: Tensor) -> Tensor:
        return super().term(model, log_tuned, base, labels) + functional.nll_loss(log_tuned, labels)


@register("masked_kl")
class MaskedKl(Arm):
    """Mask the Target (arXiv 2605.29498): KL(base ‖ tuned) on the task's own labels, without the right token.

    Both distributions are renormalised over the other tokens. Strength: the weight of the term. Implemented from the
    abstract; it needs no reference, and a forward pass of the base model a step.
    """

    def attach(self, wrapped: PeftModel) -> None:
        self.wrapped = wrapped

    def loss(self, model: nn.Module, batch: list[Encoded]) -> Tensor:
        with torch.no_grad(), self.wrapped.disable_adapter():
            base, _ = predictions(model, batch)
            base_logits = model.lm_head(base).float()
        hidden, labels = predictions(model, batch)
        logits = model.lm_head(hidden).float()
        task = functional.cross_entropy(logits, labels)
        return task + self.request.strength * masked_divergence(logits, base_logits, labels).mean()


def masked_divergence(logits: Tensor, base_logits: Tensor, labels: Tensor) -> Tensor:
    """KL(base ‖ tuned) (n,) over the vocabulary without each row's label, both renormalised."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    shape = (len(labels), logits.shape[1] - 1)
    return divergence(logits[others].view(shape).log_softmax(-1), base_logits[others].view(shape).log_softmax(-1))


@register("stm")
class LikelyTokens(Arm):
    """Selective token masking: labels that the base model finds less likely than a threshold are not trained on.

    Strength: the highest perplexity of a label that is kept (the loss of a label is kept up to its logarithm).
    Implemented from the method's description, "high-perplexity tokens of the target are masked".
    """

    def attach(self, wrapped: PeftModel) -> None:
        self.wrapped = wrapped

    def loss(self, model: nn.Module, batch: list[Encoded]) -> Tensor:
        packed = pack(batch)
        with torch.no_grad(), self.wrapped.disable_adapter():
            likely = token_losses(model, packed) <= math.log(self.request.strength)
        losses = token_losses(model, packed)[likely]
        return losses.sum() / max(1, len(losses))  # a batch may have no likely label
