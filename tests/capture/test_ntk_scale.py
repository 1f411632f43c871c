# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""compute_ntk within a memory limit and in a folder: the same kernels, whatever lies in files or was killed."""

from __future__ import annotations

import copy
import gc
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from peft_linear.capture import passes
from peft_linear.errors import FileError, OutputError, PeftLinearError
from peft_linear.kernels import ModuleKernels
from tests import reference
from tests.helpers import kernels as quiet
from tests.helpers import small_models as small


EXACT = {"rtol": 1e-10, "atol": 1e-12}
SIZES = (3, 2, 1, 4)
TIGHT = "40KB"  # of kernels of 30 rows, 7.2 KB each: one at a time
ROOT = Path(__file__).parents[2]


class Sparse(torch.nn.Module):
    """The second map is called in batches of short sequences only, the third is called in none."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(small.VOCABULARY, 16)
        self.always = torch.nn.Linear(16, 16)
        self.sometimes = torch.nn.Linear(16, 12)
        self.never = torch.nn.Linear(16, 12)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, input_ids):
        state = torch.tanh(self.always(self.embed(input_ids)))
        if input_ids.shape[1] in (8, 9):
            state = state + torch.tanh(self.sometimes(state)).sum(-1, keepdim=True)
        return self.head(state.mean(1))


def bert_with_norm_in_its_head():
    model = small.bert()
    model.classifier = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 3))
    return model


def with_adapter():
    return reference.with_lora(small.bert(), ["bert.encoder.layer.0.attention.self.query"], 2, 4.0, b_scale=0.3)


CASES = {
    "lora": (small.bert, {}),
    "draws": (small.bert, {"draws": 3, "rank": 2}),
    "weight": (small.bert, {"space": "weight"}),
    "norm in the head": (bert_with_norm_in_its_head, {"targets": ["query", "pooler.dense"]}),
    "adapter with B": (with_adapter, {"targets": ["query"]}),
    "called in some batches": (
        Sparse,
        {"targets": ["always", "sometimes", "never"], "space": "weight", "always_trained": ["head"]},
    ),
}


def ntk(model, batches=None, **arguments):
    batches = small.text_batches(SIZES) if batches is None else batches
    return quiet.ntk(model, batches, **{"check": "off", **arguments})  # passes are counted


def assert_same_kernels(got, expected, **tolerance):
    assert got.names == expected.names
    tolerance = tolerance or EXACT
    for name in expected.names:
        assert_close(got[name], expected[name], **tolerance)
        assert torch.equal(got[name], got[name].T)
    assert_close(got.base, expected.base, **tolerance)
    assert_close(got.outputs, expected.outputs, **tolerance)
    assert torch.equal(got.labels, expected.labels)
    assert got.spread == pytest.approx(expected.spread, rel=1e-10)
    assert got.provenance["no_gradient"] == expected.provenance["no_gradient"]


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The system's temporary folder, empty."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_files_and_limits_change_nothing(case, tmp_path, temporary):
    factory, options = CASES[case]
    model = small.seeded(factory)
    expected = ntk(model, **options)
    assert expected.provenance["storage"]["parts"] == expected.provenance["storage"]["blocks"] == "memory"
    for number, storage in enumerate([{"max_memory": TIGHT}, {}, {"max_memory": TIGHT}, {"max_memory": "1GB"}]):
        folder = None if number == 0 else tmp_path / f"run{number}"
        got = ntk(model, folder=folder, **storage, **options)
        assert_same_kernels(got, expected)
        assert got.provenance["storage"]["parts"] == "files"
        tight = storage.get("max_memory") == TIGHT
        assert got.lazy == tight
        assert got.provenance["storage"]["blocks"] == ("files" if got.lazy else "memory")
        del got
        gc.collect()
        assert not list(temporary.iterdir())
    assert "processes" in expected.provenance and not torch.distributed.is_initialized()


def test_a_limit_that_is_not_reached_changes_not_one_bit():
    model = small.seeded(small.bert, dtype=torch.float32)
    unlimited, limited = ntk(model), ntk(model, max_memory="1GB")
    assert limited.provenance["storage"]["parts"] == "memory"
    assert_same_kernels(limited, unlimited, rtol=0, atol=0)


def test_jacobians_move_to_files_when_they_outgrow_the_limit_and_blocks_stay(temporary):
    model = small.seeded(small.bert)
    options = {"targets": ["query"], "always_trained": ()}
    expected = ntk(model, **options)
    limit = 8 * (3 * 7200 + 2 * 2 * 7200) // 7 + 2000  # two blocks take half of what the work leaves
    kernels = ntk(model, max_memory=limit, **options)
    assert kernels.provenance["storage"] | {"product_bytes": 0} == {
        "parts": "files",
        "blocks": "memory",
        "max_memory": limit,
        "product_bytes": 0,
        "resumed_batches": 0,
        "resumed_blocks": 0,
    }
    assert_same_kernels(kernels, expected)
    assert not list(temporary.iterdir())


def test_lazy_kernels_do_what_others_do(tmp_path, temporary):
    model = small.seeded(small.bert)
    expected = ntk(model)
    lazy = ntk(model, max_memory=TIGHT)
    assert lazy.lazy and not expected.lazy
    assert lazy.provenance["storage"]["blocks"] == "files"
    chosen = expected.names[2:5]
    assert_close(lazy.subset(chosen), expected.subset(chosen), **EXACT)
    assert_close(lazy.spectrum().eigenvalues, expected.spectrum().eigenvalues, rtol=1e-8, atol=1e-9)
    indices = [7, 0, 0, 3]
    assert_same_kernels(lazy.select_examples(indices), expected.select_examples(indices))
    twice = lazy.select_examples(indices).select_examples([1, 3])
    assert twice.lazy
    assert_same_kernels(twice, expected.select_examples([0, 3]))
    assert f"{len(expected)} modules" in repr(lazy) and expected.names[0] in lazy and "x" not in lazy
    with pytest.raises(TypeError):
        lazy.blocks["new"] = lazy.base

    lazy.save(tmp_path / "all.safetensors")
    twice.save(tmp_path / "some.safetensors")
    del lazy, twice
    gc.collect()
    assert not list(temporary.iterdir())  # the last one who needs them has gone
    for is_lazy in (False, True):
        loaded = ModuleKernels.load(tmp_path / "all.safetensors", lazy=is_lazy)
        assert loaded.lazy == is_lazy
        assert_same_kernels(loaded, expected)
        assert_same_kernels(
            ModuleKernels.load(tmp_path / "some.safetensors", lazy=is_lazy), expected.select_examples([0, 3])
        )


def test_the_folder_of_a_finished_run_holds_its_kernels(tmp_path):
    model = small.seeded(small.bert)
    kernels = ntk(model, folder=tmp_path / "run")
    loaded = ModuleKernels.load(tmp_path / "run")
    assert loaded.lazy
    assert_same_kernels(loaded, kernels, rtol=0, atol=0)
    blocks = [f"blocks/{i:05d}.safetensors" for i in range(len(kernels) + 1)]
    assert files_below(tmp_path / "run") == [*blocks, "finished.jsonl", "kernels.safetensors", "manifest.json"]
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    assert_same_kernels(ModuleKernels.load(tmp_path / "copy"), kernels, rtol=0, atol=0)
    with pytest.raises(FileError, match="there is no file .*moved or removed"):
        loaded[kernels.names[0]]
    with pytest.raises(FileError, match="holds no kernels.safetensors.*not finished"):
        ModuleKernels.load(tmp_path)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What `Counting` puts in the place of a function is taken away after each test."""
    monkeypatch.setattr(passes, "evaluate", passes.evaluate)


class Counting:
    """Counts forward passes, and stops the one numbered `stop`."""

    def __init__(self, model, stop=None):
        self.passes = 0
        self.stop = stop
        self.handle = quiet.Passes(self.step)

    def step(self):
        if self.passes == self.stop:
            self.handle.remove()
            raise KeyboardInterrupt
        self.passes += 1


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    model = small.seeded(bert_with_norm_in_its_head)
    whole = ntk(model, folder=tmp_path / "whole")
    for stop in (0, 2, 5, 7):  # 4 batches, twice: once for linear layers, once for the norm in the head
        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(KeyboardInterrupt):
            Counting(model, stop)
            ntk(model, folder=folder)
        counting = Counting(model)
        resumed = ntk(model, folder=folder)
        counting.handle.remove()
        assert counting.passes == 8 - stop
        assert resumed.provenance["storage"]["resumed_batches"] == min(stop, 4)
        assert_same_kernels(resumed, whole, rtol=0, atol=0)
    counting = Counting(model)
    again = ntk(model, folder=tmp_path / "whole")
    counting.handle.remove()
    assert counting.passes == 0
    assert again.provenance["storage"]["resumed_blocks"] == len(whole) + 1
    assert_same_kernels(again, whole, rtol=0, atol=0)
    assert ntk(model, folder=tmp_path / "whole", max_memory=TIGHT).lazy


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damaged_files_are_computed_again(damage, tmp_path):
    model = small.seeded(small.bert)
    whole = ntk(model, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        Counting(model, 3)
        ntk(model, folder=tmp_path / "stopped")
    damage(tmp_path / "stopped" / "parts" / "000001.safetensors")
    with open(tmp_path / "stopped" / "finished.jsonl", "a") as record:
        record.write('\n{"file": "parts/000003.safe')  # the line that a killed process was writing
    (tmp_path / "stopped" / "parts" / ".000003.safetensors.x.tmp").write_bytes(b"half")
    counting = Counting(model)
    resumed = ntk(model, folder=tmp_path / "stopped")
    assert counting.passes == 2
    assert_same_kernels(resumed, whole, rtol=0, atol=0)
    assert files_below(tmp_path / "stopped") == files_below(tmp_path / "whole")

    damage(tmp_path / "stopped" / "blocks" / "00002.safetensors")
    again = ntk(model, folder=tmp_path / "stopped")
    assert counting.passes == 6
    assert again.provenance["storage"]["resumed_blocks"] == len(whole)
    assert_same_kernels(again, whole, rtol=0, atol=0)
    damage(tmp_path / "stopped" / "kernels.safetensors")
    assert_same_kernels(ntk(model, folder=tmp_path / "stopped"), whole, rtol=0, atol=0)


KILLED = """
import os, signal, sys
import peft_linear.capture.engine.run as run
from tests.helpers.kernels import Passes
from tests.helpers import small_models as small
from peft_linear import Resources, compute_ntk

folder, steps = sys.argv[1], [int(step) for step in sys.argv[2:]]

def die_at(step, function):
    def count(*args, **kwargs):
        nonlocal step
        step -= 1
        if step < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return count

for step in steps:  # nothing has started a thread before the fork
    if os.fork() == 0:
        model = small.seeded(small.bert)
        if step < 10:
            Passes(die_at(step, lambda: None))
        else:
            run.matrix_kernel = die_at(step - 10, run.matrix_kernel)
        compute_ntk(model, small.text_batches(SIZES), resources=Resources(folder=f"{folder}/{step}", check="off"))
        os._exit(0)
    _, status = os.wait()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_a_killed_run_goes_on_and_gives_the_same_kernels_to_the_bit(tmp_path):
    steps = [0, 2, 10, 15]  # in a forward pass; from 10 on, in a Gram matrix
    command = [sys.executable, "-c", KILLED.replace("SIZES", repr(SIZES)), str(tmp_path), *map(str, steps)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    model = small.seeded(small.bert)
    whole = ntk(model, folder=tmp_path / "whole")
    for step in steps:
        counting = Counting(model)
        resumed = ntk(model, folder=tmp_path / str(step))
        counting.handle.remove()
        assert counting.passes == max(0, 4 - step)
        assert resumed.provenance["storage"]["resumed_blocks"] == max(0, step - 10)
        assert_same_kernels(resumed, whole, rtol=0, atol=0)


def changed(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.bias[0] += 1e-3
    return other


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A model, its batches, and the folder of their run."""
    model, batches = small.seeded(small.bert), small.text_batches(SIZES)
    folder = tmp_path_factory.mktemp("finished") / "run"
    ntk(model, batches, folder=folder)
    return model, batches, folder


def swapped(batches):
    return [batches[0], batches[1] | {"input_ids": batches[1]["input_ids"].flip(1)}, *batches[2:]]


def eager(_):
    return small.seeded(lambda: small.bert(attn_implementation="eager"))


OTHER_RUNS = [
    (None, None, {"rank": 4}, r"differs in argument rank \(8 there, 4 here\)\. Pass the same model"),
    (None, None, {"targets": ["query"]}, r"argument targets \(\[.*there, \[.*here\)"),
    (changed, None, {}, "differs in the model's parameters and buffers. Pass"),
    (eager, None, {}, "differs in the model's configuration. Pass"),
    (None, swapped, {}, "differs in batch 1. Pass"),
    (None, lambda batches: batches[:2], {}, "differs in batch 2; batch 3. Pass"),
    (lambda _: small.seeded(small.roberta), None, {}, "the model's class .BertFor.* there, RobertaFor.* here.; "),
    (None, lambda batches: batches[::-1], {"rank": 4, "seed": 1}, "batch 2; 1 more. Pass"),
    (None, None, {"precision": torch.float32}, "differs in argument precision .None there, torch.float32 here.. Pass"),
]


@pytest.mark.parametrize("of_model, of_batches, arguments, message", OTHER_RUNS)
def test_another_run_in_the_same_folder_is_refused_by_name(finished, of_model, of_batches, arguments, message):
    model, batches, folder = finished
    before = {name: (folder / name).read_bytes() for name in files_below(folder)}
    with pytest.raises(FileError, match=message):
        ntk(
            of_model(model) if of_model else model,
            of_batches(batches) if of_batches else batches,
            folder=folder,
            **arguments,
        )
    assert before == {name: (folder / name).read_bytes() for name in files_below(folder)}


def test_another_scaling_of_an_adapter_is_another_run(tmp_path):
    adapted = reference.with_lora(small.seeded(small.bert), ["bert.pooler.dense"], 2, 4.0)
    ntk(adapted, folder=tmp_path / "adapted")
    adapted.base_model.model.bert.pooler.dense.scaling["default"] = 7.0
    with pytest.raises(FileError, match="the model's adapters. Pass"):
        ntk(adapted, folder=tmp_path / "adapted")


NO_RUNS = [
    ("", "notes.txt", "mine", "is not empty and holds no run"),
    ("notes.txt", "notes.txt", "mine", "is a file; pass a folder"),
    ("run", "run/manifest.json", "{", "is not valid JSON"),
    ("run", "run/manifest.json", '{"format": "else"}', "holds 'else', expected 'peft_linear.compute_ntk/1'"),
]


@pytest.mark.parametrize("folder, file, text, message", NO_RUNS)
def test_a_folder_of_something_else_is_refused_and_left_alone(folder, file, text, message, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(FileError, match=message):
        ntk(small.seeded(small.bert), folder=tmp_path / folder)
    assert files_below(tmp_path) == [file] and (tmp_path / file).read_text() == text


def test_labels_and_limits_are_checked_after_the_first_batch(temporary):
    model, batches = small.seeded(small.bert), small.text_batches(SIZES)
    counting = Counting(model)
    with pytest.raises(PeftLinearError, match=r"max_memory=20KB is too little for kernels of 30 rows.*7.2KB.*24.7KB"):
        ntk(model, max_memory="20KB")
    assert counting.passes == 1
    ntk(model, max_memory="24.7KB")
    batches[3]["labels"] += 3
    counting.passes = 0
    with pytest.raises(OutputError, match="num_labels=6"):
        ntk(model, batches, max_memory=TIGHT)
    assert counting.passes == 1
    gc.collect()
    assert not list(temporary.iterdir())
