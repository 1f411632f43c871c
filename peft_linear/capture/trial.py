# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA on a model for a few passes: losses per label token, gradients of B, and short trainings.

The adapters are hooks that are removed at the end; nothing of the model is written to. The loss is the mean
cross-entropy of all label tokens, as a Trainer reports it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from ..errors import OutputError, PeftLinearError
from .adapter_spaces import initial_lora_a
from .batches import Batch, read_batches
from .conditions import as_in_training, check_no_global_hooks, check_present, device_of, gradient_errors, unwrapped
from .layers import Handles, Layer
from .outputs import label_shift, logits_of
from .recorder import recording
from .targets import base_model


IGNORED = -100
CLIP = 1.0  # of the gradient's norm, as the Trainer's default
Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class TokenLosses:
    """Of N examples.

    Args:
        sums: Cross-entropy summed over the label tokens of an example, (N,) float64, nats.
        counts: Label tokens of an example, (N,) float64.
    """

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> float:
        """Nats a label token; inf where a loss is not finite."""
        value = float(self.sums.sum() / self.counts.sum())
        return value if math.isfinite(value) else math.inf

    def resampled(self, draws: Tensor) -> Tensor:  # (R, N) indices → (R,)
        """The mean of every resample of the examples."""
        return self.sums[draws].sum(1) / self.counts[draws].sum(1)


@dataclass(frozen=True, eq=False)
class Trial:
    """Adapters on `layers` of a model, at ranks up to `rank`, and the examples that they are tried on.

    Args:
        layers: {module: its layer} of all candidates.
        batches: Each with labels.
        rank: The largest; an adapter of rank r takes the first r rows of a module's A.
        lora_alpha: α; the scaling of a module is α divided by its own rank.
        seed: Of A.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    batches: Sequence[Batch]
    rank: int
    lora_alpha: float = 16.0
    seed: int = 0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Mapping[str, Layer],
        batches: Iterable[Mapping[str, Any]],
        rank: int,
        lora_alpha: float = 16.0,
        seed: int = 0,
    ) -> Trial:
        """Reads and checks the batches.

        Raises:
            PeftLinearError: no batches, or fewer than four examples in all.
            OutputError: labels are missing.
        """
        model = unwrapped(model)
        check_present(model)
        check_no_global_hooks()
        read = [part for batch in read_batches(batches, model, True, "a trial") for part in _halved(batch)]
        trial = cls(model, layers, read, rank, lora_alpha, seed)
        if (count := sum(batch.size for batch in read)) < 4 or len(read) < 2:
            raise PeftLinearError(
                f"a trial needs at least 4 examples in 2 batches or more, got {count} in {len(read)}: one part gives "
                "the gradient, the other says how much the loss falls; pass more batches"
            )
        return trial

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @contextmanager
    def running(self) -> Iterator[Run]:
        """Hooks the layers; inside, the model runs as in training but without dropout, and its parameters frozen."""
        with as_in_training(self.model), recording(self.model, {}), torch.random.fork_rng(), gradient_errors():
            run = Run(self)
            handles = Handles([layer.attach(run.adapter(name)) for name, layer in self.layers.items()])
            try:
                yield run
            finally:
                handles.remove()

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapters: float32, as peft's, or float64 for a model in float64."""
        first = next((parameter for parameter in self.model.parameters() if parameter.is_floating_point()), None)
        return torch.float64 if first is not None and first.dtype == torch.float64 else torch.float32

    def initial_a(self, name: str) -> Tensor:  # (rank, d_in)
        d_in, _ = self.layers[name].shape
        return initial_lora_a(name, d_in, self.rank, self.seed).to(self.device, self.dtype)

    def initial_b(self, name: str, rank: int) -> Tensor:  # (d_out, rank), takes gradients
        _, d_out = self.layers[name].shape
        return torch.zeros(d_out, rank, device=self.device, dtype=self.dtype, requires_grad=True)


class Run:
    """The passes of a trial; adapters are those of `use`, none at first."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.shift = label_shift(base_model(trial.model))
        self._active: dict[str, tuple[Tensor, Tensor, float]] = {}  # A (r, d_in), B (d_out, r), scaling

    def use(self, a: Factors, b: Factors) -> None:
        """From here on, the model has these factors: (r, d_in) and (d_out, r)."""
        self._active = {name: (a[name], b[name], self.trial.lora_alpha / len(a[name])) for name in b}

    def adapter(self, name: str) -> Any:
        """What a layer's output becomes."""

        def act(inputs: Tensor, output: Tensor) -> Tensor:
            if name not in self._active:
                return output
            a, b, scaling = self._active[name]
            return output + (scaling * linear(linear(inputs.to(a.dtype), a), b)).to(output.dtype)

        return act

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch]) -> TokenLosses:
        """A forward pass of the batches."""
        parts = [self._losses(batch) for batch in batches]
        counts = torch.cat([counts.cpu() for _, counts in parts])
        _check_labelled(int(counts.sum()))
        return TokenLosses(torch.cat([sums.double().cpu() for sums, _ in parts]), counts)

    def gradients(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """{module: gradient of the mean loss in B, (d_out, rank)} at B = 0, with scaling 1; modules it depends on.

        One forward and backward pass a batch. The gradient of an adapter of rank r is `α/r` times the first r columns.
        """
        trial = self.trial
        a = {name: trial.initial_a(name) for name in trial.layers}
        b = {name: trial.initial_b(name, trial.rank) for name in trial.layers}
        self._active = {name: (a[name], b[name], 1.0) for name in b}
        total = sum(self._tokens(batch) for batch in batches)
        _check_labelled(total)
        found: dict[str, Tensor] = {}
        for batch in batches:
            sums, _ = self._losses(batch)
            gradients = torch.autograd.grad(sums.sum() / total, list(b.values()), allow_unused=True)
            for name, gradient in zip(b, gradients, strict=True):
                if gradient is not None:
                    found[name] = found[name] + gradient if name in found else gradient
        self._active = {}
        if bad := [name for name, gradient in found.items() if not bool(torch.isfinite(gradient).all())]:
            raise OutputError(
                f"the gradients of {bad[0]} are NaN or inf although the loss is finite; load the model in bfloat16 or "
                "float32"
            )
        return found

    def train(self, ranks: Mapping[str, int], batches: Sequence[Batch], rate: float) -> None:
        """One AdamW step a batch, with a linear decay of the rate to zero; leaves the trained adapters in use."""
        trial = self.trial
        a = {name: trial.initial_a(name)[:rank].clone().requires_grad_() for name, rank in ranks.items()}
        b = {name: trial.initial_b(name, rank) for name, rank in ranks.items()}
        self.use(a, b)
        parameters = [*a.values(), *b.values()]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / len(batches))
            sums, counts = self._losses(batch)
            for parameter, gradient in zip(
                parameters,
                torch.autograd.grad(sums.sum() / counts.sum(), parameters, allow_unused=True),
                strict=True,
            ):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums (B,) with their graph, and counts (B,)."""
        batch = batch.to(self.trial.device)
        logits = logits_of(self.trial.model(**batch.inputs))
        labels = self._labels(batch)
        if self.shift:
            logits = logits[:, :-1]
        if logits.shape[:-1] != labels.shape:
            raise OutputError(
                f"logits of shape {tuple(logits.shape)} do not belong to labels of shape {tuple(batch.labels.shape)}; "  # type: ignore[union-attr]
                "pass one label a token, -100 where there is none"
            )
        logits = logits if logits.dtype == torch.float64 else logits.float()
        flat = cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.view(labels.shape).sum(1), (labels != IGNORED).sum(1).double()

    def _tokens(self, batch: Batch) -> int:
        return int((self._labels(batch) != IGNORED).sum())

    def _labels(self, batch: Batch) -> Tensor:
        labels = batch.labels
        if labels is None or labels.ndim != 2:
            raise OutputError("a trial needs labels of shape (examples, tokens); -100 marks tokens without a label")
        return labels[:, self.shift :]


def _check_labelled(tokens: int) -> None:
    if not tokens:
        raise OutputError(
            "no label token is left in half of the examples (all are -100); check the mask of the prompts, and "
            "whether texts are cut off before their answers"
        )


def _halved(batch: Batch) -> list[Batch]:
    """A batch that can be cut, in two."""
    size = batch.size
    if size < 2 or not batch.uniform:
        return [batch]
    return [batch.head(size // 2), batch.tail(size - size // 2)]
