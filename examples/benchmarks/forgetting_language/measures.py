# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What is measured on a model: KL(base ‖ tuned) over the whole vocabulary, and the losses.

The base model's last hidden states are computed once; its output head, which no adapter changes, gives its
probabilities again from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.benchmarks.language.batches import IGNORED, Encoded, evaluation_batches, pack


ROWS = 96  # positions whose probabilities are in memory at once
TEXTS = 8  # in a batch


def predictions(model: nn.Module, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """The last hidden states (n, width) at the n positions before a label, and the labels (n,)."""
    packed = pack(batch)
    hidden = model.model(
        input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False
    ).last_hidden_state
    labels = packed["labels"][:, 1:]
    wanted = labels != IGNORED
    return hidden[:, :-1][wanted], labels[wanted]


def divergence(log_tuned: Tensor, log_base: Tensor) -> Tensor:
    """KL(base ‖ tuned) of every row (n,), from logarithms of probabilities (n, vocabulary)."""
    return (log_base.exp() * (log_base - log_tuned)).sum(-1)


@dataclass(frozen=True)
class Reading:
    """A text set under a tuned model, position by position."""

    kl: Tensor  # (n,) nats
    loss: Tensor  # (n,) nats


class TextSet:
    """Texts, and what the base model says about them. To be made while `model` has no adapter."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, texts: Sequence[Encoded]) -> None:
        self.batches = list(evaluation_batches(texts, TEXTS))
        self.base = [predictions(model, batch)[0] for batch in self.batches]
        self.start_loss = float(self.read(model).loss.mean()) if texts else None

    @torch.no_grad()
    def read(self, model: nn.Module) -> Reading:
        kls, losses = [], []
        for batch, base in zip(self.batches, self.base, strict=True):
            hidden, labels = predictions(model, batch)
            for start in range(0, len(labels), ROWS):
                rows = slice(start, start + ROWS)
                log_tuned = model.lm_head(hidden[rows]).float().log_softmax(-1)
                log_base = model.lm_head(base[rows]).float().log_softmax(-1)
                kls.append(divergence(log_tuned, log_base))
                losses.append(functional.nll_loss(log_tuned, labels[rows], reduction="none"))
        return Reading(torch.cat(kls).double(), torch.cat(losses).double())


class Measures:
    """All text sets of one model and task. To be made while `model` has no adapter."""

    def __init__(
        self,
        model: nn.Module,
        retained: dict[str, list[Encoded]],
        test: Sequence[Encoded],
        human_eval: Sequence[Encoded] = (),
    ) -> None:
        count = min(len(texts) for texts in retained.values())
        self.retained = {kind: TextSet(model, texts) for kind, texts in retained.items()}
        prompts = [Encoded(one.tokens, one.tokens) for one in test[:count]]  # all positions, the prompt's too
        self.prompts = TextSet(model, prompts)
        self.answer = torch.tensor([label != IGNORED for one in test[:count] for label in one.labels[1:]])
        self.test = TextSet(model, test)
        self.human_eval = TextSet(model, human_eval) if human_eval else None

    def start(self) -> dict[str, float | None]:
        """The losses of the base model."""
        start = {f"start_loss_{kind}": rounded(texts.start_loss) for kind, texts in self.retained.items()}
        start["start_test_loss"] = rounded(self.test.start_loss)
        if self.human_eval is not None:
            start["start_loss_human_eval"] = rounded(self.human_eval.start_loss)
        return start

    def read(self, model: nn.Module, human_eval: bool = False) -> dict[str, float | None]:
        found: dict[str, float | None] = {"test_loss": rounded(self.test.read(model).loss.mean())}
        for kind, texts in self.retained.items():
            reading = texts.read(model)
            found[f"kl_{kind}"] = rounded(reading.kl.mean())
            found[f"loss_{kind}"] = rounded(reading.loss.mean())
        task = self.prompts.read(model).kl
        found["kl_task_prompts"] = rounded(task[~self.answer].mean())
        found["kl_task_answers"] = rounded(task[self.answer].mean())
        if human_eval and self.human_eval is not None:
            found["loss_human_eval"] = rounded(self.human_eval.read(model).loss.mean())
        return found


def rounded(value: Tensor | float | None) -> float | None:
    """Six significant digits; None where there is no finite number."""
    if value is None or not torch.isfinite(torch.as_tensor(value)):
        return None
    return float(f"{float(value):.6g}")
