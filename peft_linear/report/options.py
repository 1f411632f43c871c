# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The options of a language model's decision as a table; the text, Markdown and HTML reports show the same rows."""

from __future__ import annotations

from ..recommendation.data import RecommendationData
from ..recommendation.values import OptionScore


EXPLAINED = (
    "Decrease: nats a label token that one Adam step of the best size takes off the loss of held-out examples, with "
    "its 90 % interval over resamples. The first option is chosen unless another one is better beyond the "
    "interval of the difference."
)


def option_header(recommendation: RecommendationData) -> tuple[str, ...]:
    """The titles of the columns."""
    first = recommendation.options[0].label
    return ("option", "rank", "parameters", "decrease", f"minus {first}", "best in", "")


def option_rows(recommendation: RecommendationData) -> list[tuple[str, ...]]:
    """A row an option, in the order in which they were weighed."""
    return [_row(option) for option in recommendation.options]


def _row(option: OptionScore) -> tuple[str, ...]:
    low, high = min(option.ranks.values()), max(option.ranks.values())
    return (
        option.label,
        str(low) if low == high else f"{low} to {high}",
        f"{option.parameters:,}",
        f"{option.decrease:.3f} {_interval(option.interval)}",
        f"{option.difference:+.3f} {_interval(option.difference_interval)}" if option.difference else "",
        f"{option.best_share:.0%}",
        "chosen" if option.chosen else "",
    )


def _interval(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"
