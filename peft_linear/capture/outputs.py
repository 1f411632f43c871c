# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which outputs f of a model the kernel is taken of: functions (model output, labels) → (B, C), differentiable.

| kind | f of one example | C |
|---|---|---|
| logits | all logits of a classifier | number of labels |
| label_logit | the logit of the label | 1 |
| margin | log-odds of the label: f_y − log Σ_{a≠y} exp f_a | 1 |
| log_likelihood | log-probability of the label, or of all labelled tokens of a language model | 1 |
| random_projection | k random ±1 projections of the logits (at the labelled tokens), times 1/√k | k |
| loss | the model's loss on this example: cross-entropy, averaged over its labelled tokens | 1 |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import OutputError, PeftLinearError


OutputKind = Literal["logits", "label_logit", "margin", "log_likelihood", "random_projection", "loss"]
OUTPUT_KINDS: tuple[str, ...] = get_args(OutputKind)
IGNORED = -100  # transformers' label of tokens that do not count


class OutputFunction:
    """Turns what a model returns into f (B, C). `shift` is 1 where logits predict the next token (causal models)."""

    def __init__(self, kind: str, *, shift: int = 0, num_projections: int = 16, seed: int = 0) -> None:
        if kind not in OUTPUT_KINDS:
            raise PeftLinearError(f"outputs must be one of {', '.join(map(repr, OUTPUT_KINDS))}, got {kind!r}")
        if not isinstance(num_projections, int) or num_projections <= 0:
            raise PeftLinearError(f"num_projections must be a positive integer, got {num_projections!r}")
        self.kind = kind
        self.shift = shift
        self.num_projections = num_projections
        self.seed = seed
        self._signs: list[Tensor] = []  # one (V, k) table for each labelled position, shared by all examples

    @property
    def needs_labels(self) -> bool:
        """Whether every batch must carry labels (a random projection of a classifier's logits does without)."""
        return self.kind not in ("logits", "random_projection")

    def __call__(self, model_output: Any, labels: Tensor | None) -> Tensor:
        logits = logits_of(model_output)
        if logits.ndim == 2:
            return self._of_classifier(logits, labels)
        if logits.ndim == 3:
            return self._of_tokens(logits, labels)
        raise OutputError(
            f"outputs={self.kind!r} needs logits of shape (batch, labels) or (batch, tokens, vocabulary), "
            f"got {tuple(logits.shape)}"
        )

    def _of_classifier(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        if self.kind == "logits":
            return logits
        if self.kind == "random_projection":
            return logits @ self._projection(0, logits)
        assert labels is not None
        labels = labels.to(logits.device)
        if labels.is_floating_point() or labels.ndim != 1:
            raise OutputError(
                f"outputs={self.kind!r} needs one integer label an example, got labels of shape "
                f'{tuple(labels.shape)} and dtype {labels.dtype}; use outputs="logits"'
            )
        if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
            raise OutputError(
                f"labels must lie in [0, {logits.shape[1]}) for {logits.shape[1]} logits, "
                f"got values from {int(labels.min())} to {int(labels.max())}"
            )
        column = labels.long()[:, None]
        chosen = logits.gather(1, column)
        if self.kind == "label_logit":
            return chosen
        if self.kind == "margin":
            return chosen - logits.scatter(1, column, -torch.inf).logsumexp(1, keepdim=True)
        log_likelihood = chosen - logits.logsumexp(1, keepdim=True)
        return log_likelihood if self.kind == "log_likelihood" else -log_likelihood

    def _of_tokens(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        if self.kind not in ("log_likelihood", "random_projection", "loss"):
            raise OutputError(
                f"the model gives logits for every token, shape {tuple(logits.shape)}: too many for "
                f'outputs={self.kind!r}; use "log_likelihood", "random_projection" or "loss"'
            )
        if labels is None or labels.shape != logits.shape[:2]:
            got = "none" if labels is None else f"shape {tuple(labels.shape)}"
            raise OutputError(
                f"outputs={self.kind!r} needs a label for every token, shape {tuple(logits.shape[:2])} "
                f"({IGNORED} where none counts), got {got}"
            )
        labels = labels.to(logits.device)
        if self.shift:
            logits, labels = logits[:, : -self.shift], labels[:, self.shift :]
        counted = labels != IGNORED
        if not bool(counted.any(1).all()):
            example = int((~counted.any(1)).nonzero()[0])
            raise OutputError(f"example {example} of a batch has no labelled token; drop it, or label some tokens")
        if self.kind == "random_projection":
            return self._project_tokens(logits, counted)
        chosen = logits.gather(2, labels.masked_fill(~counted, 0)[..., None])[..., 0]
        log_likelihood = (chosen - logits.logsumexp(2)).masked_fill(~counted, 0.0).sum(1, keepdim=True)
        return log_likelihood if self.kind == "log_likelihood" else -log_likelihood / counted.sum(1, keepdim=True)

    def _project_tokens(self, logits: Tensor, counted: Tensor) -> Tensor:
        # The p-th labelled token of every example meets the same signs, wherever padding has put it.
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
