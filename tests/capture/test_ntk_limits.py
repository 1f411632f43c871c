# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The limit on the memory of compute_ntk: sizes, the plan that keeps it, and what a process really takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear import Resources
from peft_linear.capture.engine.memory import MemoryPlan, parse_memory
from peft_linear.errors import PeftLinearError


@pytest.mark.parametrize("size", ["much", "4 G", -1, 0, True, "1..5GB", ""])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(PeftLinearError, match="max_memory must be a number of bytes or a size"):
        Resources(max_memory=size)


def test_sizes_are_read_in_powers_of_ten_and_two():
    sizes = [None, 5, "5", "2KB", "1.5 mb", "4GB", "4GiB", "0.5TiB"]
    assert [parse_memory(size) for size in sizes] == [None, 5, 5, 2000, 1500000, 4 * 10**9, 2**32, 2**39]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 10**5), blocks=st.integers(1, 500), limit=st.integers(1, 10**12), product=st.just(256 * 2**20)
)
def test_a_plan_stays_within_its_limit(rows, blocks, limit, product):
    square = 8 * rows**2
    try:
        plan = MemoryPlan.make(limit, rows, blocks, product)
    except PeftLinearError:
        assert limit < 3 * square * 8 / 7 + 8 * rows + 1
        return
    kept = 3 * square + plan.product_bytes + plan.jacobian_bytes + blocks * square * plan.blocks_in_memory
    assert kept <= limit and plan.jacobian_bytes >= 0 and plan.product_bytes >= 8 * rows


PEAK = """
import resource, sys
from pathlib import Path
import torch
from peft_linear import Resources, compute_ntk

class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.maps = torch.nn.ModuleList(torch.nn.Linear(128, 128) for _ in range(8))
        self.head = torch.nn.Linear(128, 1)

    def forward(self, x):
        for layer in self.maps:
            x = x + torch.tanh(layer(x))
        return self.head(x.mean(1))

torch.manual_seed(0)
torch.set_num_threads(1)
model = Tower()
batches = [{"x": torch.randn(8, 96, 128)} for _ in range(int(sys.argv[1]))]
options = {"space": "weight", "progress": False, "always_trained": []}
compute_ntk(model, batches[:2], resources=Resources(max_memory="24MB"), **options)

def peak():  # KiB; ru_maxrss begins at that of the process that started this one
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)

before = peak()
compute_ntk(model, batches, resources=Resources(max_memory=sys.argv[2] if len(sys.argv) > 2 else None), **options)
print((peak() - before) / 1000)
"""


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_batches():
    """50 batches leave 315 MB of factors; with 24 MB to keep, the process grows by no more than that."""

    def grown(*arguments):
        command = [sys.executable, "-c", PEAK, *arguments]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)

    assert grown("50") > 250
    assert grown("50", "24MB") < 45
    assert grown("25", "24MB") < 45
