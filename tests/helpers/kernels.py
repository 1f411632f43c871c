# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels without progress bars; fields of `Resources` may be passed as if they were keywords of the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from peft_linear import Resources, compute_ntk
from peft_linear.capture import passes
from peft_linear.capture.ntk import compute_ntk_at_ranks, compute_sign_kernel
from peft_linear.kernels import ModuleKernels


STORAGE = {field.name for field in fields(Resources)}


def in_silence(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` with those of `Resources` in one."""
    storage = {name: value for name, value in arguments.items() if name in STORAGE}
    others = {name: value for name, value in arguments.items() if name not in STORAGE}
    return {**others, "resources": Resources(**{"progress": False, **storage})}


class Passes:
    """Counts the forward passes that make Jacobians, and those of the self-check; `before` is called before each.

    A hook would count too, but it belongs to the model: with another one it is another run.
    """

    def __init__(self, before: Callable[[], Any] = lambda: None) -> None:
        self.number = 0
        self._before, self._original = before, passes.evaluate
        passes.evaluate = self._evaluate  # type: ignore[assignment]

    def remove(self) -> None:
        passes.evaluate = self._original  # type: ignore[assignment]

    def _evaluate(self, *arguments: Any) -> Any:
        self._before()
        self.number += 1
        return self._original(*arguments)


def ntk(model, batches, **arguments) -> ModuleKernels:
    return compute_ntk(model, batches, **in_silence(arguments))


def ntk_at_ranks(model, batches, ranks, **arguments) -> dict[int, ModuleKernels]:
    return compute_ntk_at_ranks(model, batches, ranks, **in_silence(arguments))


def sign_kernel(model, batches, **arguments) -> ModuleKernels:
    return compute_sign_kernel(model, batches, **in_silence(arguments))
