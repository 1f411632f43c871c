# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""FSDP2 with two processes trains what one process trains, in every mode, also after saving and resuming."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_linear.proximal import proximal_distance
from peft_linear.tuners.proximal_lora.anchors import ANCHOR_NAME
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.fsdp_worker import VARIANTS, facts, in_bfloat16, made, rest, train
from tests.helpers.proximal_loop import groups, proximal
from tests.helpers.reference_proximal import lora_parameters


pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event") or not torch.distributed.is_gloo_available(),
    reason="fully_shard does not run on a CPU with this version of torch",
)
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS.parent)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fsdp_worker", str(folder)],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folder


def alone(name):
    model = made(name)
    train(model, torch.optim.AdamW(groups(model)))
    return model


@pytest.mark.parametrize("name", [*VARIANTS, "resumed"])
def test_two_processes_train_what_one_trains(together, name):
    model = alone("always" if name == "resumed" else name)
    for rank in range(2):
        values, known = torch.load(together / f"{name}{rank}.pt")
        for key, parameter in lora_parameters(model).items():
            torch.testing.assert_close(values[key], parameter.detach(), rtol=1e-12, atol=1e-12)
        assert known == pytest.approx(facts(model), rel=1e-10)
    assert 0 < facts(model)["rate"] <= 1


@pytest.mark.parametrize("space", ["factors", "delta", "function"])
def test_bfloat16_shards_are_pulled_as_the_whole_factors_are(together, space):
    model = in_bfloat16(space)
    before = proximal_distance(model)
    rest(model, torch.optim.SGD(lora_parameters(model).values(), lr=2e-4), 100)
    assert proximal_distance(model) < 0.9 * before
    for rank in range(2):
        values = torch.load(together / f"bfloat16-{space}{rank}.pt")
        for name, parameter in lora_parameters(model).items():
            torch.testing.assert_close(values[name], parameter.detach(), rtol=2**-7, atol=0)


def test_coupled_steps_of_bfloat16_shards_are_refused(together):
    for rank in range(2):
        assert "is sharded (FSDP2) and in torch.bfloat16" in (together / f"coupled{rank}.txt").read_text()


def test_the_anchor_is_saved_whole(together):
    model = proximal()
    anchors = find_adapters(model)[0].anchors()
    stored = load_file(together / "adapter" / ANCHOR_NAME)
    assert {f"{name}.lora_A" for name in anchors} == set(stored)
    assert all(torch.equal(stored[f"{name}.lora_A"], anchor.a) for name, anchor in anchors.items())


def test_other_layouts_are_refused_with_the_adapters_name(together):
    for rank in range(2):
        text = (together / f"refused{rank}.txt").read_text()
        assert "'default'" in text and "train with DDP or FSDP2" in text
