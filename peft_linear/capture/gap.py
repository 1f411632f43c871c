# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`linearization_gap`: how far a fine-tuned model is from its linear model, in outputs and in predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OutputError, PeftLinearError
from ..functional.outputs import IGNORED
from .batches import Batch, read_batches
from .conditions import unwrapped
from .forward_mode import evaluation
from .linearize import LinearizedModel
from .outputs import label_shift, logits_of
from .targets import base_model


class Verdict(NamedTuple):
    """A word for a gap, and what it means for predictions that were made before training."""

    word: str
    gap: float  # the largest gap relative to the movement, over all examples
    agreement: float  # the least share of equal predictions
    loss_error: float  # of the predicted held-out loss, relative to the real one: more was not measured


# From docs/measurements/predicted_curves: 50 comparisons of a predicted with a real held-out loss (one encoder, one
# task, AdamW and SGD, five λ). The error of the loss follows the gap (rank correlation 0.98); agreement follows it
# more loosely, since predictions near a tie differ early, and is a safeguard only.
VERDICTS = (Verdict("linear", 0.1, 0.9, 0.02), Verdict("nearly linear", 0.3, 0.8, 0.05))
NOT_LINEAR = "not linear"


def verdict_of(gap: float, agreement: float | None) -> Verdict | None:
    """The first of `VERDICTS` that a gap relative to the movement and a share of equal predictions meet, or None."""
    for verdict in VERDICTS:
        if gap <= verdict.gap and (agreement is None or agreement >= verdict.agreement):
            return verdict
    return None


@dataclass(frozen=True, eq=False)
class GapReport:
    """A fine-tuned model f_θ against its linear model f̄; one entry an example, float64 on the CPU.

    Norms are over the logits of one example (all counted tokens of a language model); KL and agreement are means over
    them. What a single output cannot have (KL, agreement, accuracy) and what needs labels is None.
    """

    relative_difference: Tensor  # (N,) ‖f_θ − f̄‖ / ‖f_θ‖
    relative_to_movement: Tensor  # (N,) ‖f_θ − f̄‖ / ‖f_θ − f_θ0‖; 0 where both are 0
    kl: Tensor | None  # (N,) KL(softmax f_θ ‖ softmax f̄), nats
    agreement: Tensor | None  # (N,) share of equal predictions
    pooled_movement_gap: float  # sqrt(Σ‖f_θ − f̄‖² / Σ‖f_θ − f_θ0‖²)
    accuracy: float | None  # of f_θ
    linear_accuracy: float | None  # of f̄
    distance: float  # ‖θ−θ0‖ of the linear model's parameters
    evaluated_at: Literal["model", "own"]  # the parameters f̄ was evaluated at
    curvature: Tensor | None  # (N,) 2‖f_θ − f̄_θ‖/‖θ−θ0‖², a lower estimate of the Jacobian's Lipschitz constant

    @classmethod
    def of_logits(
        cls,
        model: Tensor,  # (N, C)   f_θ(X)
        linear: Tensor,  # (N, C)   f̄(X)
        start: Tensor,  # (N, C)   f_θ0(X)
        labels: Tensor | None = None,  # (N,)
        *,
        distance: float,
        evaluated_at: Literal["model", "own"] = "own",
    ) -> GapReport:
        """The report of a classifier whose logits are known already, such as those that a `TrainingCurve` predicts.

        Raises:
            OutputError: logits that are not finite or not (N, C).
        """
        if model.ndim != 2 or not model.shape == linear.shape == start.shape:
            raise OutputError(
                f"the logits have shapes {tuple(model.shape)}, {tuple(linear.shape)} and {tuple(start.shape)}; all "
                "three must be (examples, classes)"
            )
        everything = model.new_ones(len(model), 1, dtype=torch.bool)
        rows = _compare((model.detach(), linear.detach(), start.detach()), labels, everything, shift=0, number=0)
        return _report(rows, distance, evaluated_at)

    @property
    def num_examples(self) -> int:
        return len(self.relative_difference)

    @property
    def verdict(self) -> str:
        """The gap in words, and how well predictions held at such gaps; the thresholds are `VERDICTS`."""
        if self.distance == 0 and self.evaluated_at == "model":
            return "not moved: the model is at the start of the linearisation, so there is no gap to measure"
        agreement = None if self.agreement is None else float(self.agreement.mean())
        verdict = verdict_of(self.pooled_movement_gap, agreement)
        text = f"{NOT_LINEAR if verdict is None else verdict.word}: the linear model's logits are within "
        text += f"{self.pooled_movement_gap:.1%} of the movement"
        if agreement is not None:
            text += f" and its predictions agree on {agreement:.1%}"
        if verdict is None:
            return f"{text}; do not trust losses that were predicted before training"
        return f"{text}; losses predicted before training were right to {verdict.loss_error:.0%} at such gaps"

    def to_dict(self) -> dict[str, float | str | None]:
        """Averages as plain numbers, for logs and JSON."""
        return {
            "examples": self.num_examples,
            "relative_difference": float(self.relative_difference.mean()),
            "pooled_movement_gap": self.pooled_movement_gap,
            "kl": None if self.kl is None else float(self.kl.mean()),
            "agreement": None if self.agreement is None else float(self.agreement.mean()),
            "accuracy": self.accuracy,
            "linear_accuracy": self.linear_accuracy,
            "distance": self.distance,
            "evaluated_at": self.evaluated_at,
            "verdict": self.verdict,
        }

    def __repr__(self) -> str:
        numbers = {key: value for key, value in self.to_dict().items() if isinstance(value, float)}
        listed = ", ".join(f"{key}={value:.4g}" for key, value in numbers.items())
        return f"GapReport({self.num_examples} examples, {listed}; {self.verdict})"


def linearization_gap(
    model: nn.Module,
    linearized: LinearizedModel,
    batches: Iterable[Mapping[str, Any]],
    at: Literal["auto", "model", "own"] = "auto",
) -> GapReport:
    """Compares the outputs of a fine-tuned `model` with those of its linear model, example by example.

    Two questions; `at` chooses: with "model", f̄ is evaluated at the model's own parameters, so the gap is the
    Taylor remainder `f_θ − f̄_θ`; with "own", at the linear model's parameters, so that two models that were each
    trained are compared (the paper's comparison). "auto" takes "own" if the linear model has moved from θ0.

    Args:
        model: the fine-tuned model; the very one that was linearised before training is fine.
        linearized: `linearize(...)` of the model before it was trained. Neither is changed.
        batches: dict batches. With labels, both accuracies are reported; language models then count labelled tokens
            only, without labels all that `attention_mask` does not mask.

    Raises:
        TargetError: the linear model is of another adapter.
        OutputError: no logits, logits that are not finite, or an example without counted tokens.
        PeftLinearError: `at` is none of the above, or there are no batches.

    Cost: two forward passes of the model and one of the linear model (2 to 3 forward passes), no gradient.
    """
    if at not in ("auto", "model", "own"):
        raise PeftLinearError(f"at must be 'auto', 'model' or 'own', got {at!r}")
    evaluated_at: Literal["model", "own"] = (
        "own" if at == "own" or (at == "auto" and linearized.distance()) else "model"
    )
    model = unwrapped(model)
    parameters = linearized.adapter_state_dict()
    if evaluated_at == "model":
        parameters = linearized.matching(dict(model.named_parameters()))
    start = linearized.anchor_state_dict()
    distance = float(sum((parameters[name] - start[name]).double().square().sum() for name in start) ** 0.5)
    shift = label_shift(base_model(model))
    two_sided = getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False)
    mask_keys = ("decoder_attention_mask",) if two_sided else ("attention_mask",)
    device = next(model.parameters()).device
    parts: list[dict[str, Tensor]] = []
    for number, batch in enumerate(read_batches(batches, model, False, "the gap")):
        moved = batch.to(device)
        with evaluation(model), torch.no_grad():
            real = logits_of(model(**moved.inputs))
        linear = logits_of(linearized.linear_outputs(parameters, **moved.inputs))
        origin = logits_of(linearized.start_outputs(**moved.inputs))
        mask = _token_mask(moved, real, mask_keys)
        parts.append(_compare((real, linear, origin), moved.labels, mask, shift, number))
    rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if all(key in p for p in parts)}
    return _report(rows, distance, evaluated_at)


def _report(rows: dict[str, Tensor], distance: float, evaluated_at: Literal["model", "own"]) -> GapReport:
    rows = {key: value.cpu() for key, value in rows.items()}
    classes = "agree" in rows
    labelled = "correct" in rows
    return GapReport(
        relative_difference=_ratio(rows["gap"], rows["size"]),
        relative_to_movement=_ratio(rows["gap"], rows["movement"]),
        kl=rows["kl"] if classes else None,
        agreement=rows["agree"] / rows["count"] if classes else None,
        pooled_movement_gap=float(_ratio(rows["gap"].norm(), rows["movement"].norm())),
        accuracy=float(rows["correct"].sum() / rows["count"].sum()) if labelled else None,
        linear_accuracy=float(rows["linear_correct"].sum() / rows["count"].sum()) if labelled else None,
        distance=distance,
        evaluated_at=evaluated_at,
        curvature=2 * rows["gap"] / distance**2 if evaluated_at == "model" and distance else None,
    )


def _compare(
    outputs: tuple[Tensor, Tensor, Tensor],  # each (B, C) or (B, T, V): of the model, the linear model, at θ0
    labels: Tensor | None,
    mask: Tensor,  # (B, T) bool, T = 1 for a classifier
    shift: int,
    number: int,
) -> dict[str, Tensor]:  # each (B,) float64
    real, linear, origin = (logits[:, None] if logits.ndim == 2 else logits for logits in outputs)
    if labels is not None and (labels.is_floating_point() or labels.numel() != mask.numel()):
        labels = None  # targets of a regression or of several labels: no accuracy
    labels = None if labels is None else labels.reshape(mask.shape)
    if shift and outputs[0].ndim == 3:
        real, linear, origin = (logits[:, :-shift] for logits in (real, linear, origin))
        mask = mask[:, shift:]
        labels = None if labels is None else labels[:, shift:]
    if labels is not None:
        mask = mask & (labels != IGNORED)
    if not bool(mask.any(1).all()):
        raise OutputError(
            f"an example in batch {number} has no token that counts; drop it, or label some of its tokens"
        )
    rounding = 100 * torch.finfo(real.dtype).eps  # two kinds of attention differ by as much
    real, linear, origin = (logits.double().masked_fill(~mask[..., None], 0.0) for logits in (real, linear, origin))
    for name, logits in (("model", real), ("linear model", linear)):
        if not bool(logits.isfinite().all()):
            raise OutputError(
                f"the {name}'s logits in batch {number} are NaN or inf; check the weights and the inputs"
            )
    count = mask.double().sum(1)
    gap, size, movement = (x.flatten(1).norm(dim=1) for x in (real - linear, real, real - origin))
    gap = torch.where((movement == 0) & (gap <= rounding * size), 0.0, gap)
    rows = {"gap": gap, "size": size, "movement": movement, "count": count}
    if real.shape[2] > 1:
        log_p, log_q = real.log_softmax(2), linear.log_softmax(2)
        rows["kl"] = ((log_p.exp() * (log_p - log_q)).sum(2) * mask).sum(1) / count
        predicted, linear_predicted = real.argmax(2), linear.argmax(2)
        rows["agree"] = ((predicted == linear_predicted) & mask).double().sum(1)
        if labels is not None:
            rows["correct"] = ((predicted == labels) & mask).double().sum(1)
            rows["linear_correct"] = ((linear_predicted == labels) & mask).double().sum(1)
    return rows


def _token_mask(batch: Batch, logits: Tensor, keys: tuple[str, ...]) -> Tensor:  # (B, T) bool
    if logits.ndim == 2:
        return logits.new_ones(len(logits), 1, dtype=torch.bool)
    if logits.ndim != 3:
        raise OutputError(f"logits of shape {tuple(logits.shape)} are neither a classifier's nor one for every token")
    masks = [batch.inputs[key] for key in keys if isinstance(batch.inputs.get(key), Tensor)]
    fitting = [mask.bool() for mask in masks if mask.shape == logits.shape[:2]]
    return fitting[0] if fitting else logits.new_ones(logits.shape[:2], dtype=torch.bool)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(part == 0, 0.0, part / whole)
