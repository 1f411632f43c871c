# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels without progress bars; fields of `Resources` may be passed as if they were keywords of the function."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from peft_linear import Resources, compute_ntk
from peft_linear.capture.ntk import compute_ntk_at_ranks, compute_sign_kernel
from peft_linear.kernels import ModuleKernels


STORAGE = {field.name for field in fields(Resources)}


def in_silence(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` with those of `Resources` in one."""
    storage = {name: value for name, value in arguments.items() if name in STORAGE}
    others = {name: value for name, value in arguments.items() if name not in STORAGE}
    return {**others, "resources": Resources(**{"progress": False, **storage})}


def ntk(model, batches, **arguments) -> ModuleKernels:
    return compute_ntk(model, batches, **in_silence(arguments))


def ntk_at_ranks(model, batches, ranks, **arguments) -> dict[int, ModuleKernels]:
    return compute_ntk_at_ranks(model, batches, ranks, **in_silence(arguments))


def sign_kernel(model, batches, **arguments) -> ModuleKernels:
    return compute_sign_kernel(model, batches, **in_silence(arguments))
