# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a search found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SearchResult:
    """The set that a search chose, and the scores on the way.

    Args:
        order: The modules, best first: in the order in which greedy selection among them takes them.
        start: Score of the always-trained parameters alone (nothing chosen).
        path: Score of the set after each module of `order`.
        last_round: Score that the final set would have had with a rejected module in place of the last chosen one;
            only of modules that fitted.
        evaluations: Kernels that were scored.
    """

    order: tuple[str, ...]
    start: float
    path: tuple[float, ...]
    last_round: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 0
