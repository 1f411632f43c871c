# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How much memory the computation may keep, and what that decides."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ...errors import PeftLinearError


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(value: int | str | None) -> int | None:
    """Bytes of "4GB" (10⁹), "512MiB" (2²⁰), or a number of bytes; None stays None (no limit).

    Raises:
        PeftLinearError: no size, or not a positive one.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]I?B|)\s*", str(value).upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and not isinstance(value, bool) else 0
    if size <= 0:
        raise PeftLinearError(f"max_memory must be a number of bytes or a size like '4GB' or '512MiB', got {value!r}")
    return size


def format_memory(size: float) -> str:
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= _UNITS[unit]:
            return f"{math.ceil(10 * size / _UNITS[unit]) / 10:g}{unit}"
    return f"{math.ceil(size)} bytes"


@dataclass(frozen=True)
class MemoryPlan:
    """What is held where, so that Jacobians, products at work and finished blocks stay within a limit together."""

    product_bytes: int  # of temporary memory for one product
    blocks_in_memory: bool
    jacobian_bytes: int | None  # that Jacobians may take in memory; more goes to files; None: no limit

    @classmethod
    def make(cls, limit: int | None, rows: int, blocks: int, product_bytes: int, squares: int = 3) -> MemoryPlan:
        """For `blocks` kernels of (rows, rows) float64 numbers, of which `squares` are at work at a time.

        By default these are a sum, what is added to it, and the kernel of the task head.

        Raises:
            PeftLinearError: the limit is too low for a single kernel and the product that makes it.
        """
        if limit is None:
            return cls(product_bytes, True, None)
        square = 8 * rows**2
        product_bytes = max(8 * rows, min(product_bytes, limit // 8))
        free = limit - squares * square - product_bytes
        if free < 0:
            needed = max(squares * square * 8 / 7, squares * square + 8 * rows) + 1
            raise PeftLinearError(
                f"max_memory={format_memory(limit)} is too little for kernels of {rows} rows (examples times "
                f"outputs): one takes {format_memory(square)}, and the work on it {format_memory(needed)}; raise "
                "max_memory, or take fewer examples or outputs"
            )
        in_memory = blocks * square <= free // 2
        return cls(product_bytes, in_memory, free - blocks * square if in_memory else free)
