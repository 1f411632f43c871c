# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a search over sets of modules hands back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Change:
    """A module that left the set during the search.

    Args:
        out: The module.
        into: What came in its place; None where it was only removed.
        round: Of the removals, or of the swaps; from 1.
        before, after: Scores of the set.
    """

    out: str
    into: str | None
    round: int
    before: float
    after: float


@dataclass(frozen=True)
class SearchResult:
    """The set that a search chose, and what it saw on the way.

    Args:
        order: The modules, best first: in the order in which greedy selection among them takes them.
        start: Score of the always-trained parameters alone (nothing chosen).
        path: Score of the set after each module of `order`.
        last_round: Score that the final set would have had with a rejected module in place of the last chosen one;
            only of modules that fitted.
        last_limits: The same of those that were skipped: a score they could not have been better than.
        changes: What backward search removed, or swaps took out, in their order.
        evaluations: Kernels that were scored.
        skipped: Those that were not, because a bound ruled them out.
    """

    order: tuple[str, ...]
    start: float
    path: tuple[float, ...]
    last_round: dict[str, float] = field(default_factory=dict)
    last_limits: dict[str, float] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    evaluations: int = 0
    skipped: int = 0
