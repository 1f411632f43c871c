# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""compute_ntk in two processes (gloo) against one, and what happens when one of them fails or dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from peft_linear.capture.engine.processes import Team
from peft_linear.errors import ProcessError
from peft_linear.kernels import ModuleKernels
from tests.helpers import small_models as small
from tests.helpers.kernels import Passes, ntk
from tests.helpers.ports import free_port


ROOT = Path(__file__).parents[2]
SIZES = (3, 2, 1, 4, 2)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

TOGETHER = """
import os, sys
from pathlib import Path
from tests.helpers import small_models as small
from tests.helpers.kernels import Passes
import torch
from accelerate import PartialState
from peft_linear import Resources, compute_ntk
from peft_linear.errors import PeftLinearError

rank, out = int(os.environ["RANK"]), Path(sys.argv[1])
model, batches = small.seeded(small.bert), small.text_batches(SIZES)

def expect(message, given=batches, **options):
    try:
        compute_ntk(model, given, resources=Resources(**options))
    except PeftLinearError as error:
        (out / f"{message}{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    else:
        raise AssertionError(message)

compute_ntk(model, batches).save(out / f"plain{rank}.safetensors")
assert torch.distributed.get_world_size() == 2
run = Resources(progress=False, folder=out / "run")
compute_ntk(model, batches, space="weight", resources=run).save(out / f"weight{rank}.safetensors")
lazy = compute_ntk(model, batches, resources=Resources(max_memory="40KB", folder=out / "lazy"))
assert lazy.lazy
lazy.save(out / f"lazy{rank}.safetensors")
alone = compute_ntk(model, batches if rank else batches[:2], resources=Resources(distributed=False))
assert alone.provenance["processes"] == 1 and alone.num_examples == (12 if rank else 5)

expect("other data", batches[rank:])
expect("no folder", max_memory="40KB")
if rank:
    Passes(lambda: (_ for _ in ()).throw(OSError("disk on fire")))
try:
    expect("failed", folder=out / "failed", check="off")
except OSError as error:
    assert rank == 1 and str(error) == "disk on fire"
PartialState().wait_for_everyone()
""".replace("SIZES", repr(SIZES))

DYING = """
import os, signal, sys
from tests.helpers.kernels import Passes
from tests.helpers import small_models as small
from peft_linear import Resources, compute_ntk

model, passes = small.seeded(small.bert), 0

def die():
    global passes
    passes += 1
    if os.environ["RANK"] == "1" and passes == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Passes(die)
compute_ntk(model, small.text_batches(SIZES), resources=Resources(folder=sys.argv[1], check="off"))
""".replace("SIZES", repr(SIZES))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The files of a script that `accelerate launch` has run in two processes, and what it printed."""
    out = tmp_path_factory.mktemp("together")
    (out / "tmp").mkdir()
    script = out / "script.py"
    script.write_text(TOGETHER)
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    launcher += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", str(free_port())]
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(out / "tmp")}
    done = subprocess.run(
        [*launcher, str(script), str(out)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return out, done.stderr


@pytest.mark.parametrize("name, options", [("plain", {}), ("weight", {"space": "weight"}), ("lazy", {})])
def test_two_processes_give_the_kernel_of_one(together, name, options):
    expected = ntk(small.seeded(small.bert), small.text_batches(SIZES), **options)
    both = [ModuleKernels.load(together[0] / f"{name}{rank}.safetensors") for rank in (0, 1)]
    for block in (*expected.names, "base"):
        of = [kernels.base if block == "base" else kernels[block] for kernels in (expected, *both)]
        assert torch.equal(of[1], of[2])
        assert_close(of[1], of[0], rtol=1e-10, atol=1e-12)
    for kernels in both:
        assert kernels.provenance["processes"] == 2
        assert torch.equal(kernels.labels, expected.labels)
        assert_close(kernels.outputs, expected.outputs, rtol=1e-10, atol=1e-12)


def test_one_process_goes_on_with_what_two_have_begun(together):
    model = small.seeded(small.bert)
    kernels = ntk(model, small.text_batches(SIZES), space="weight", folder=together[0] / "run")
    assert kernels.provenance["storage"]["resumed_batches"] == len(SIZES)
    both = ModuleKernels.load(together[0] / "weight0.safetensors")
    assert all(torch.equal(kernels[name], both[name]) for name in both.names)


def test_a_failure_on_one_process_is_an_error_on_all(together):
    out, printed = together
    text = {path.stem: path.read_text() for path in out.glob("*.txt")}
    assert text["failed0"] == (
        "ProcessError: process 1 failed in the stage 'Jacobians', which ends the run of all: OSError: disk on fire"
    )
    assert "failed1" not in text  # it raised its own OSError
    for rank in (0, 1):
        assert "process 1 computes something else than process 0: it differs in batch 0" in text[f"other data{rank}"]
        assert "not its own shard" in text[f"other data{rank}"]
        assert "need a `folder`" in text[f"no folder{rank}"]
    assert sorted(path.name for path in (out / "failed" / "parts").iterdir()) == ["000000.safetensors"]
    assert not list((out / "tmp").glob("peft_linear_ntk*"))
    assert "Jacobians: 100%" in printed  # the main process's; tqdm prints the last state twice if it came late


def test_a_process_that_dies_ends_the_run_and_leaves_nothing_half_written(tmp_path):
    folder = tmp_path / "run"
    environment = ENVIRONMENT | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "CUDA_VISIBLE_DEVICES": "",
    }
    start = time.monotonic()
    both = [
        subprocess.Popen(
            [sys.executable, "-c", DYING, str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert both[1].returncode == -9
    assert both[0].returncode == 1
    assert "ProcessError: a process of this run died or did not answer" in errors[0]
    assert time.monotonic() - start < 120

    model, batches, passes = small.seeded(small.bert), small.text_batches(SIZES), Passes()
    resumed = ntk(model, batches, folder=folder, check="off")
    passes.remove()
    assert passes.number == len(SIZES) - 2  # each of the two had finished one batch
    whole = ntk(model, batches, folder=tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole.names)


def test_one_process_is_a_team_of_one():
    team = Team.assemble()
    assert (team.rank, team.size) == (0, 1)
    assert team.gather("working", lambda: 5) == [5]
    assert team.each("working", lambda: 6) == 6
    with pytest.raises(ZeroDivisionError):
        team.each("working", lambda: 1 // 0)
    assert not torch.distributed.is_initialized()


def test_processes_that_do_not_come_are_an_error(monkeypatch):
    def nobody(**_):
        raise RuntimeError("timed out")

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.new_group", nobody)
    with pytest.raises(ProcessError, match="waited .* for the others; call compute_ntk on all processes, or"):
        Team.assemble()
