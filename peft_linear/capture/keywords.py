# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Keywords of the functions that compute kernels: `progress` as a shorthand, and what replaces former ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..errors import PeftLinearError
from .resources import Resources


T = TypeVar("T")
MOVED = {
    "max_memory": "resources=Resources(max_memory=...)",
    "folder": "resources=Resources(folder=...)",
    "distributed": "resources=Resources(distributed=...)",
    "product_dtype": "resources=Resources(precision=...)",
    "max_bytes": "resources=Resources(max_memory=...), which bounds the products' memory too",
    "num_projections": "outputs=RandomProjection(...), of peft_linear.functional.outputs",
    "kernel": "nothing for the gradient kernel, and call peft_linear.capture.ntk.compute_sign_kernel for the other",
}


def with_progress(function: Callable[..., T]) -> Callable[..., T]:
    """Lets a function with a parameter `resources` take `progress=...` for `resources=Resources(progress=...)`.

    A keyword that it took in earlier versions, or resources that are none, raise a PeftLinearError.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, progress: bool | None = None, **kwargs: Any) -> T:
        for name in kwargs.keys() & MOVED.keys() - signature.parameters.keys():
            raise PeftLinearError(f"{function.__name__} no longer takes {name!r}; pass {MOVED[name]}")
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        resources = arguments.arguments["resources"]
        if not isinstance(resources, Resources):
            raise PeftLinearError(
                f"resources must be a Resources, got {resources!r}; pass resources=peft_linear.Resources(...)"
            )
        if progress is not None:
            arguments.arguments["resources"] = replace(resources, progress=progress)
        with torch.inference_mode(False):  # which gradients need
            return function(*arguments.args, **arguments.kwargs)

    return call
