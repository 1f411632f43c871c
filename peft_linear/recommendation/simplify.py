# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Simpler rules near a choice, of which a decision may prefer one whose score lies within the interval of its best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from .names import parse_name
from .rules import FORMS, Rule, check_choice, find_rule, members_of_types


Allowed = Callable[[Mapping[str, int]], bool]


def simplify(
    choice: Mapping[str, int],
    candidates: Sequence[str],
    allowed: Allowed | None = None,
    *,
    others: Iterable[str] = (),
    all_linear: bool = False,
    forms: Collection[str] = FORMS,
) -> list[Rule]:
    """Rules near a choice, from the simplest; the one that says the choice itself is among them.

    Proposed are: all candidates; the types that are chosen in most of their layers, in any layer, and those of one
    half of the model (attention, MLP); the same types in the span of layers that are chosen. Each comes with the most
    frequent rank of the choice for all, with the most frequent one of each type, and with the largest rank that is
    allowed, where those differ.

    Args:
        choice: {module: rank}.
        candidates: Names of all candidates, in model order.
        allowed: Says of {module: rank} whether it is within the budget and has no excluded module; None: any is.
        others, all_linear, forms: As in `find_rule`.

    Raises:
        PeftLinearError: as `check_choice`.
    """
    chosen = check_choice(choice, candidates)
    others = tuple(others)
    proposals: dict[frozenset[tuple[str, int]], dict[str, int]] = {}
    for names in _sets(chosen, candidates):
        for ranks in _ranks(names, chosen, allowed):
            if ranks and (allowed is None or allowed(ranks)):
                proposals[frozenset(ranks.items())] = ranks
    proposals[frozenset(chosen.items())] = chosen
    found = [find_rule(ranks, candidates, others, all_linear=all_linear, forms=forms) for ranks in proposals.values()]
    return sorted((rule for rule in found if rule is not None), key=lambda rule: rule.complexity)


def _sets(chosen: Mapping[str, int], candidates: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Sets of modules that are simple to say, in model order."""
    types = members_of_types(candidates)
    share = {key: sum(name in chosen for name in names) / len(names) for key, names in types.items()}
    kept = [
        set(types),
        {key for key in types if share[key] > 0.5},
        {key for key in types if share[key] > 0},
        {key for key in types if parse_name(types[key][0]).is_attention},
        {key for key in types if parse_name(types[key][0]).is_mlp},
    ]
    layers = [layer for name in chosen if (layer := parse_name(name).layer) is not None]
    span = range(min(layers), max(layers) + 1) if layers else range(0)
    for keys in kept:
        names = {name for key in keys for name in types[key]}
        yield tuple(name for name in candidates if name in names)
        yield tuple(name for name in candidates if name in names and parse_name(name).layer in span)
    yield tuple(chosen)


def _ranks(names: Sequence[str], chosen: Mapping[str, int], allowed: Allowed | None) -> Iterator[dict[str, int]]:
    """Ranks for a set: the most frequent one, that of each type, and the largest that is allowed."""
    common = Counter(chosen.values()).most_common(1)[0][0]
    yield dict.fromkeys(names, common)
    by_type: dict[str, int] = {}
    for members in members_of_types(names).values():
        ranks = Counter(chosen[name] for name in members if name in chosen)
        by_type |= dict.fromkeys(members, ranks.most_common(1)[0][0] if ranks else common)
    yield {name: by_type[name] for name in names}
    if allowed is not None:
        powers = {1 << power for power in range(max(chosen.values()).bit_length())}
        tried = sorted({*chosen.values(), *powers}, reverse=True)
        largest = next((rank for rank in tried if allowed(dict.fromkeys(names, rank))), None)
        yield {} if largest is None else dict.fromkeys(names, largest)
