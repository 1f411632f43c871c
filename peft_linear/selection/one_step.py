# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How much one Adam step of the best size takes off the loss of examples that the step has not seen.

Adam's first step moves every entry of B by the learning rate η against the sign of its gradient, so the loss falls by
`η·Σ_m (α/r_m)·‖∂L/∂B_m‖₁` to first order, whatever the rank. How large η may be depends on the set: what the other
directions of the step cost is measured, by forward passes at two η, and the least loss on the parabola through them
and the start is taken. Sets of different ranks and sizes are compared so, each at its own best rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..capture.batches import Batch
from ..capture.trial import Run, TokenLosses
from ..recommendation.values import OptionScore
from .options import Option


RESAMPLES = 1000
LEVEL = 0.9
_NARROWEST, _WIDEST = 1.5, 8.0  # between the two sizes that are tried, as a factor


@dataclass(frozen=True, eq=False)
class LineSearch:
    """Losses of held-out examples before a step and after it at two sizes."""

    start: TokenLosses
    sizes: tuple[float, float]
    losses: tuple[TokenLosses, TokenLosses]

    def decrease(self, draws: Tensor) -> Tensor:  # (R, N) → (R,)
        """At the best size of every resample of the examples."""
        return self._parabola(draws)[0]

    @property
    def best_size(self) -> float:
        return float(self._parabola(torch.arange(len(self.start.sums))[None])[1])

    def _parabola(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The largest decrease on the parabola through three losses, at sizes up to twice those tried, and its size.

        Where the parabola has no largest decrease there, the better of the two sizes.
        """
        near, far = self.sizes
        start = self.start.resampled(draws)
        first, second = (start - losses.resampled(draws) for losses in self.losses)  # decreases
        curvature = (first / near - second / far) / (far - near)  # decrease = slope·η − curvature·η²
        slope = first / near + curvature * near
        size = slope / (2 * curvature)
        inside = (curvature > 0) & (size > 0) & (size <= 2 * max(near, far))
        tried = torch.maximum(first, second)
        tried_size = torch.where(first >= second, near, far).to(size)
        return torch.where(inside, slope * size / 2, tried), torch.where(inside, size, tried_size)


def first_order(gradients: Mapping[str, Tensor], ranks: Mapping[str, int], lora_alpha: float) -> dict[str, float]:
    """{module: (α/r)·‖∂L/∂B‖₁}, nats a unit of learning rate; `gradients` with scaling 1, at a rank of r or more."""
    return {
        name: float(gradients[name][:, :rank].abs().sum()) * lora_alpha / rank if name in gradients else 0.0
        for name, rank in ranks.items()
    }


def score_options(
    run: Run,
    options: Sequence[Option],
    gradients: Mapping[str, Tensor],
    held_out: Sequence[Batch],
    start: TokenLosses,
    costs: Mapping[str, int],
    seed: int = 0,
) -> tuple[OptionScore, ...]:
    """One score an option, in their order; differences are to the first.

    Cost: two forward passes of the held-out examples an option.

    Args:
        gradients: Of examples that are not held out, as `Run.gradients` gives them.
        start: Losses of the held-out examples without an adapter.
        costs: {module: adapter parameters a rank}.
        seed: Of the resamples.
    """
    searches = [_search(run, option, gradients, held_out, start) for option in options]
    count = len(start.sums)
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    everything = torch.arange(count)[None]
    decreases = [float(search.decrease(everything)) for search in searches]
    resampled = [search.decrease(draws) for search in searches]
    best = torch.stack(resampled).argmax(0)
    return tuple(
        OptionScore(
            label=option.label,
            ranks=dict(option.ranks),
            parameters=sum(rank * costs[name] for name, rank in option.ranks.items()),
            decrease=decrease,
            interval=_interval(samples),
            difference=decrease - decreases[0],
            difference_interval=_interval(samples - resampled[0]),
            best_share=float((best == place).double().mean()),
            step_size=search.best_size,
        )
        for place, (option, search, decrease, samples) in enumerate(
            zip(options, searches, decreases, resampled, strict=True)
        )
    )


def decide(scores: Sequence[OptionScore]) -> OptionScore:
    """The option with the largest decrease, if it is larger than the first's beyond the interval; else the first."""
    best = max(scores, key=lambda score: score.decrease)
    return best if best.difference_interval[0] > 0 else scores[0]


def _search(
    run: Run, option: Option, gradients: Mapping[str, Tensor], held_out: Sequence[Batch], start: TokenLosses
) -> LineSearch:
    trial = run.trial
    ranks = {name: rank for name, rank in option.ranks.items() if name in gradients}
    a = {name: trial.initial_a(name)[:rank] for name, rank in ranks.items()}
    signs = {name: gradients[name][:, :rank].sign() for name, rank in ranks.items()}
    slope = max(sum(first_order(gradients, ranks, trial.lora_alpha).values()), torch.finfo(torch.float32).tiny)

    def at(size: float) -> TokenLosses:
        run.use(a, {name: -size * sign for name, sign in signs.items()})
        return run.losses(held_out)

    first = start.mean / slope  # where the first-order decrease is the whole loss
    at_first = at(first)
    curvature = (at_first.mean - start.mean + slope * first) / first**2
    guess = slope / (2 * curvature) if 0 < curvature < math.inf else first / _WIDEST
    second = min(max(guess, first / _WIDEST), first * _WIDEST)
    if max(first, second) < _NARROWEST * min(first, second):
        second = first / _NARROWEST if guess < first else first * _NARROWEST
    return LineSearch(start, (first, second), (at_first, at(second)))


def vertex(low: float, centre: float, high: float) -> float:
    """Where, in units of their distance from the centre, a parabola through three values is least: −1 to 1."""
    curvature = low - 2 * centre + high
    if not math.isfinite(low - high):
        return 0.0
    return max(-1.0, min(1.0, 0.5 * (low - high) / curvature)) if curvature > 0 else 0.0


def _interval(samples: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(samples, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=samples.dtype))
    return float(low), float(high)
