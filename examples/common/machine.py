# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one call, and of a call in a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.common.reports import ROOT


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """Seconds: of the processor on a CPU, so that other processes count less; of the clock on a GPU."""
    synchronise(device)
    return time.perf_counter() if device == "cuda" else time.process_time()


def peak_bytes() -> int:
    """The largest resident set this process has had; the system counts it in KiB, macOS in bytes.

    Linux lets `ru_maxrss` begin at that of the process that started this one, so its own count is read first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def added_mebibytes(action: Callable[[], Any], device: str) -> float:
    """What `action` adds at its peak to the memory that is in use before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = peak_bytes()
    action()
    return (peak_bytes() - before) / 2**20


def number_of_new_process(module: str, *arguments: str) -> float:
    """The number that `python -m module arguments` prints last.

    Raises:
        RuntimeError: the process failed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or not done.stdout.split():
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])
