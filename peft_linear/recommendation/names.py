# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Module names taken apart: the layer's number and the kind of module within the layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


_LAYER = re.compile(r"^(?P<stack>.*?)(?:^|\.)(?P<layer>\d+)(?:\.(?P<kind>.+))?$")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_QUERY_VALUE = {"query", "value", "q", "v", "q_proj", "v_proj", "q_lin", "v_lin"}
_FUSED_QUERY_VALUE = {"c_attn", "query_key_value", "qkv", "qkv_proj", "wqkv", "in_proj"}


@dataclass(frozen=True)
class ModuleName:
    """`bert.encoder.layer.3.attention.self.query` is layer 3 of `bert.encoder.layer`, kind `attention.self.query`."""

    full: str
    stack: str  # what comes before the number; "" where there is none
    layer: int | None  # the first number in the name
    kind: str

    @property
    def short(self) -> str:
        """For a label: `3 · attention.self.query`."""
        return self.kind if self.layer is None else f"{self.layer} · {self.kind}"

    @property
    def is_attention(self) -> bool:
        """Whether the module is part of an attention block (projections in and out)."""
        return bool(_ATTENTION.search(self.kind))

    @property
    def is_mlp(self) -> bool:
        """Whether the module is in a numbered layer and not part of its attention."""
        return self.layer is not None and not self.is_attention

    @property
    def is_query_or_value(self) -> bool:
        """Whether the module computes queries or values, alone or fused with others."""
        leaf = self.full.rpartition(".")[2].lower()
        return leaf in _QUERY_VALUE or leaf in _FUSED_QUERY_VALUE


def parse_name(name: str) -> ModuleName:
    """Takes a full module name apart; one without a number has layer None and is its own kind."""
    match = _LAYER.match(name)
    if match is None or match["kind"] is None:
        return ModuleName(name, "", None, name)
    return ModuleName(name, match["stack"], int(match["layer"]), match["kind"])


@dataclass(frozen=True)
class Grid:
    """Modules laid out by layer (rows, from the first) and kind (columns, in model order)."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[str, tuple[int, int]]  # {full name: (row, column)}, no two names in one cell


def layer_grid(names: Sequence[str]) -> Grid:
    """Lays modules out by layer and kind.

    Where two stacks have the same layers and kinds (encoder and decoder), the kind names its stack too. Modules
    without a layer come in a last row, "–".
    """
    parsed = [parse_name(name) for name in names]
    taken = Counter((name.layer, name.kind) for name in parsed)
    stacks = {name.stack for name in parsed if name.layer is not None}
    ambiguous = max(taken.values(), default=0) > 1 and len(stacks) > 1
    kinds = [f"{n.stack}.{n.kind}" if ambiguous and n.layer is not None else n.kind for n in parsed]
    columns = tuple(dict.fromkeys(kinds))
    layers = sorted({name.layer for name in parsed if name.layer is not None})
    rows = (*map(str, layers), *(["–"] if any(name.layer is None for name in parsed) else []))
    row_of = {layer: index for index, layer in enumerate(layers)}
    cells = {
        name.full: (len(layers) if name.layer is None else row_of[name.layer], columns.index(kind))
        for name, kind in zip(parsed, kinds, strict=True)
    }
    return Grid(rows, columns, cells)


def type_labels(names: Iterable[str]) -> dict[tuple[str, str], str]:
    """{(stack, kind): label}: the last parts of the kind that no other kind ends with, as `gate_proj`, `query`.

    A kind that another one ends with keeps all its parts; kinds of different stacks may have the same label.
    """
    kinds = dict.fromkeys((name.stack, name.kind) for name in map(parse_name, names))
    different = {kind for _, kind in kinds}
    labels = {}
    for kind in different:
        parts = kind.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        others = [f".{other}" for other in different if other != kind]
        labels[kind] = next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), kind)
    return {(stack, kind): labels[kind] for stack, kind in kinds}


def short_labels(names: Iterable[str]) -> dict[str, str]:
    """Labels without what all names share; the full name where two would read the same."""
    labels = {name: parse_name(name).short for name in names}
    counts = Counter(labels.values())
    return {name: label if counts[label] == 1 else name for name, label in labels.items()}
