# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Modules that kernels are of and that an adapter could not train: they are no candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import TargetError
from ..kernels.module_kernels import ModuleKernels


NO_GRADIENT = "no gradient reaches it: it is never called, or has no part in these outputs"


def untrainable(kernels: ModuleKernels) -> dict[str, str]:
    """{name: why} of the modules whose adapter gets no gradient, or that peft cannot adapt, by the provenance."""
    provenance = kernels.provenance
    facts = provenance.get("peft")
    refused = dict(facts.get("refused", {})) if isinstance(facts, Mapping) else {}
    return dict.fromkeys(provenance.get("no_gradient") or (), NO_GRADIENT) | refused


def candidates_of(
    kernels: ModuleKernels, heads: Sequence[ModuleKernels]
) -> tuple[ModuleKernels, tuple[ModuleKernels, ...]]:
    """The kernels, and those through other heads, of the modules that an adapter can train.

    Raises:
        TargetError: there are none.
    """
    out = untrainable(kernels)
    if not out.keys() & set(kernels.names):
        return kernels, tuple(heads)
    left = [name for name in kernels.names if name not in out]
    if not left:
        name, reason = next(iter(out.items()))
        raise TargetError(
            f"an adapter can train none of the {len(kernels)} modules, so there is nothing to choose; {name}: {reason}"
            ". Pass other `targets`"
        )
    kept = (each.select_modules([name for name in each.names if name not in out]) for each in heads)
    return kernels.select_modules(left), tuple(kept)
