# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A choice of modules and ranks in one sentence, by type and layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from .names import parse_name, type_labels


_MOST_GROUPS = 4  # of a sentence; beyond it modules are counted
_MOST_NAMES = 3
_MOST_TYPES = 4  # that are named where it is all of them


def rule_text(choice: Mapping[str, int], candidates: Sequence[str], *, all_linear: bool = False) -> str:
    """`gate_proj and up_proj of all 30 layers at rank 2; down_proj of layers 0–3 and 7 at rank 4`.

    Args:
        choice: {module: rank ≥ 1}.
        candidates: Names of all candidates.
        all_linear: Whether the candidates are all linear modules that peft adapts.
    """
    ranks = set(choice.values())
    if len(choice) == len(candidates) and len(ranks) == 1:
        what = "linear modules" if all_linear else "candidates"
        return f"all {len(choice)} {what} {_ranks_words(ranks)}"
    groups = _groups(choice, candidates)
    if len(groups) > _MOST_GROUPS and len(choice) > _MOST_NAMES:
        return f"{len(choice)} of {len(candidates)} modules, by name, {_ranks_words(ranks)}"
    if len(ranks) == 1:
        return f"{'; '.join(where for where, _ in groups)}{', all' if len(groups) > 1 else ''} {_ranks_words(ranks)}"
    return "; ".join(f"{where} {_ranks_words({rank})}" for where, rank in groups)


def layers_words(layers: Iterable[int]) -> str:
    """`layer 3`, `layers 0–3 and 7`."""
    layers = sorted(layers)
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    parts = [str(a) if a == b else f"{a} and {b}" if b == a + 1 and len(spans) == 1 else f"{a}–{b}" for a, b in spans]
    return f"layer{'s' * (len(layers) > 1)} {in_words(parts)}"


def in_words(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _groups(choice: Mapping[str, int], candidates: Sequence[str]) -> list[tuple[str, int]]:
    """(where, rank) of the types that are chosen in the same layers at the same rank."""
    labels = type_labels(candidates)
    layers_of: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    chosen: dict[tuple[str, str, int], list[int | None]] = defaultdict(list)
    for name in candidates:
        parsed = parse_name(name)
        layers_of[parsed.stack, parsed.kind].append(parsed.layer)
        if name in choice:
            chosen[parsed.stack, parsed.kind, choice[name]].append(parsed.layer)
    groups: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    stacks = len({stack for (stack, _), layers in layers_of.items() if None not in layers})
    for (stack, kind, rank), layers in chosen.items():
        known = [layer for layer in layers if layer is not None]
        every = len(layers) == len(layers_of[stack, kind])
        where = f" of {_all_or_some(known, every)}" if known else ""
        where += f" of {stack}" if known and stacks > 1 else ""
        groups[where, stack if known else "", rank].append(labels[stack, kind])
    everywhere = {labels[key] for key, layers in layers_of.items() if None not in layers}
    return [
        (f"{'all types' if set(types) == everywhere and len(types) > _MOST_TYPES else in_words(types)}{where}", rank)
        for (where, _, rank), types in groups.items()
    ]


def _all_or_some(layers: Sequence[int], every: bool) -> str:
    return f"all {len(layers)} layers" if every and len(layers) > 1 else layers_words(layers)


def _ranks_words(ranks: Iterable[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"at rank {low}" if low == high else f"at ranks {low} to {high}"
