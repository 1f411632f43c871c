# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""compute_ntk_at_ranks: one pass, and for every rank what a call with it alone returns."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_linear import Resources
from peft_linear.capture import passes
from peft_linear.capture.adapter_spaces import ParameterMatrix, initial_lora_a
from peft_linear.capture.engine import computation, products, run
from peft_linear.capture.engine.computation import compute_kernels
from peft_linear.capture.engine.memory import MemoryPlan
from peft_linear.capture.engine.products import kernels_at_work, matrix_kernel, nested_kernels
from peft_linear.capture.recorder import Recorder
from peft_linear.capture.request import KernelRequest
from peft_linear.errors import FileError, PeftLinearError
from peft_linear.functional.outputs import RandomProjection
from peft_linear.kernels import ModuleKernels
from tests import reference
from tests.helpers import kernels as quiet
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk_at_ranks, sign_kernel
from tests.helpers.ports import free_port


EXACT = {"rtol": 1e-10, "atol": 1e-12}
RANKS = (3, 1, 4)
SIZES = (3, 2, 1)
QUERY = "bert.encoder.layer.0.attention.self.query"
ROOT = Path(__file__).parents[2]


def ntk(model, rank, signed=False, **arguments):
    function = sign_kernel if signed else quiet.ntk
    return function(model, small.text_batches(SIZES), rank=rank, **arguments)


def at_ranks(model, ranks, signed=False, **arguments):
    batches = small.text_batches(SIZES)
    if not signed:
        return ntk_at_ranks(model, batches, ranks, **arguments)
    prepared = KernelRequest(**arguments).prepare(model, ranks, signed=True)
    several = compute_kernels(prepared, batches, Resources(progress=False))
    return {rank: several[rank] for rank in ranks}


def assert_same(got, expected, **tolerance):
    tolerance = tolerance or EXACT
    assert got.names == expected.names
    assert (got.rank, got.space, got.lora_alpha) == (expected.rank, expected.space, expected.lora_alpha)
    assert got.num_parameters == expected.num_parameters
    assert got.shapes == expected.shapes
    assert got.spread == pytest.approx(expected.spread, rel=1e-9)
    assert got.provenance["no_gradient"] == expected.provenance["no_gradient"]
    for name in expected.names:
        assert_close(got[name], expected[name], **tolerance)
        assert torch.equal(got[name], got[name].T)
    assert_close(got.base, expected.base, **tolerance)
    assert_close(got.outputs, expected.outputs, **tolerance)
    assert torch.equal(got.labels, expected.labels)


def assert_each_is_its_own(model, several, **options):
    for rank, of_rank in several.items():
        assert_same(of_rank, ntk(model, rank, **options))


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 40), more=st.integers(0, 40), d_in=st.integers(1, 40), draw=st.integers(0, 3))
def test_a_of_a_lower_rank_is_the_first_rows_of_a_higher_one(rank, more, d_in, draw):
    higher = initial_lora_a("x", d_in, rank + more, seed=5, draw=draw)
    assert torch.equal(higher[:rank], initial_lora_a("x", d_in, rank, seed=5, draw=draw))


OPTIONS = {
    "lora": {},
    "draws": {"draws": 3},
    "sign": {"signed": True, "draws": 2},
    "projected": {"outputs": RandomProjection(2), "seed": 4, "lora_alpha": 5.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("factory", [small.bert, small.gpt2])
def test_every_rank_gives_what_it_gives_alone(factory, options):
    model = small.seeded(factory)
    several = at_ranks(model, RANKS, **options)
    assert list(several) == list(RANKS)
    assert_each_is_its_own(model, several, **options)
    for of_rank in several.values():
        assert of_rank.provenance["ranks"] == sorted(RANKS)
        assert bool(of_rank.spread) == (options.get("draws", 1) > 1)


@pytest.mark.parametrize("way", ["explicit", "ghost"])
def test_every_method_gives_the_same(way, monkeypatch):
    model = small.seeded(small.bert)
    expected = at_ranks(model, RANKS, draws=3)
    monkeypatch.setattr(products, "cheapest", lambda pairs: way)
    monkeypatch.setattr(computation, "PRODUCT_BYTES", 2**12)
    got = at_ranks(model, RANKS, draws=3)
    for rank in RANKS:
        assert_same(got[rank], expected[rank])
        assert way in {got[rank].provenance["ways"][name] for name in got[rank].names}


def test_every_rank_is_exact():
    """Against the kernel of a peft adapter of that rank, taken example by example."""
    several = at_ranks(small.seeded(small.bert), range(1, 4), lora_alpha=5, targets=["query"])
    for rank, of_rank in several.items():
        peft_model = reference.with_lora(small.seeded(small.bert), [QUERY], rank=rank, lora_alpha=5)
        parameters = reference.lora_parameters(peft_model, QUERY)
        expected = reference.kernel(peft_model, parameters, small.text_batches(SIZES), reference.logits)
        assert_close(of_rank[QUERY], expected, **EXACT)
        assert of_rank.num_parameters[QUERY] == sum(parameter.numel() for parameter in parameters)


def test_one_rank_in_a_sequence_and_one_alone():
    model = small.seeded(small.bert)
    alone = ntk(model, 2)
    assert isinstance(alone, ModuleKernels) and "ranks" not in alone.provenance
    for one in ([2], (2,), range(2, 3)):
        several = at_ranks(model, one)
        assert list(several) == [2]
        assert_same(several[2], alone, rtol=0, atol=0)


def test_all_ranks_take_the_passes_and_the_products_of_the_largest(monkeypatch):
    counted = {"forward": 0, "backward": 0, "features": 0}
    model = small.seeded(small.bert)
    monkeypatch.setattr(passes, "evaluate", passes.evaluate)  # what Passes sets is restored
    quiet.Passes(lambda: counted.update(forward=counted["forward"] + 1))
    backward, weight_gram = Recorder.backward, products.weight_gram

    def count_backward(*args, **kwargs):
        counted["backward"] += 1
        return backward(*args, **kwargs)

    def count_features(jacobians, *args):
        first = jacobians[0]
        counted["features"] += (first if isinstance(first, torch.Tensor) else first[0].mT).shape[1]
        return weight_gram(jacobians, *args)

    monkeypatch.setattr(Recorder, "backward", count_backward)
    monkeypatch.setattr(products, "weight_gram", count_features)
    at_ranks(model, (2, 5, 3), draws=4, targets=["query"], always_trained=(), check="off")
    assert counted == {"forward": 3, "backward": 3 * 3, "features": 2 * 4 * 5}


def with_adapter():
    return reference.with_lora(small.seeded(small.bert), [QUERY], rank=2, lora_alpha=4.0, b_scale=0.3)


@pytest.mark.parametrize("storage", [{}, {"max_memory": "30KB"}])
def test_an_adapter_that_is_there_keeps_its_own_rank(storage, tmp_path):
    model = with_adapter()
    options = {"targets": ["query", "value"], "draws": 2}
    several = at_ranks(model, (4, 1), folder=tmp_path / "run" if storage else None, **storage, **options)
    assert_each_is_its_own(model, several, **options)
    value = QUERY.replace("query", "value")
    assert torch.equal(several[4][QUERY], several[1][QUERY])
    assert several[4].num_parameters[QUERY] == several[1].num_parameters[QUERY] == 2 * (16 + 16)
    assert several[4].num_parameters[value] == 4 * several[1].num_parameters[value] == 4 * (16 + 16)
    assert QUERY not in several[4].spread and value in several[4].spread
    parameters = reference.lora_parameters(model, QUERY)
    assert_close(
        several[1][QUERY], reference.kernel(model, parameters, small.text_batches(SIZES), reference.logits), **EXACT
    )


def test_modules_without_a_gradient_are_zero_at_every_rank():
    options = {"targets": ["step", "unused"], "always_trained": ["head"]}
    model = small.seeded(small.Recurrent)
    several = at_ranks(model, RANKS, **options)
    assert_each_is_its_own(model, several, **options)
    assert all(not one["unused"].any() and one["step"].any() for one in several.values())


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("draws, limit", [(1, "30KB"), (2, "40KB")])  # a block takes 2.6 KB
def test_files_and_limits_change_nothing(draws, limit, tmp_path):
    model = small.seeded(small.bert)
    options = {"ranks": RANKS, "draws": draws}
    expected = at_ranks(model, **options)
    for storage in (
        {"max_memory": limit},
        {"folder": tmp_path / "run"},
        {"folder": tmp_path / "b", "max_memory": limit},
    ):
        got = at_ranks(model, **storage, **options)
        for rank in RANKS:
            assert_same(got[rank], expected[rank])
            assert got[rank].provenance["storage"]["parts"] == "files"
            assert got[rank].lazy == ("max_memory" in storage)
        last = got.pop(RANKS[-1])
        del got
        gc.collect()
        assert_same(last, expected[RANKS[-1]])  # a temporary folder lives as long as any rank needs it


def test_the_folder_holds_the_kernels_of_every_rank_and_each_can_be_moved(tmp_path):
    model = small.seeded(small.bert)
    several = at_ranks(model, RANKS, folder=tmp_path / "run")
    count = len(several[1])
    assert files_below(tmp_path / "run") == sorted(
        [
            *(f"rank-{rank}/blocks/{i:05d}.safetensors" for rank in RANKS for i in range(count)),
            *(f"rank-{rank}/kernels.safetensors" for rank in RANKS),
            f"blocks/{count:05d}.safetensors",
            "finished.jsonl",
            "manifest.json",
        ]
    )
    shutil.move(tmp_path / "run" / "rank-3", tmp_path / "moved")
    shutil.rmtree(tmp_path / "run")
    assert_same(ModuleKernels.load(tmp_path / "moved"), several[3], rtol=0, atol=0)


def stop_at_task(monkeypatch, number):
    """Lets `number` modules finish; the kernel of the lowest rank of the next one is finished as well."""
    kernels, started = run.nested_kernels, 0

    def stopped(*args):
        nonlocal started
        started += 1
        generated = kernels(*args)
        yield next(generated)
        if started > number:
            raise KeyboardInterrupt
        yield from generated

    monkeypatch.setattr(run, "nested_kernels", stopped)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model, options = small.seeded(small.bert), {"ranks": RANKS, "draws": 2, "check": "off"}
    whole = at_ranks(model, folder=tmp_path / "whole", **options)
    monkeypatch.setattr(passes, "evaluate", passes.evaluate)  # what Passes sets is restored
    made = []
    handle = quiet.Passes(lambda: made.append(1) if len(made) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        at_ranks(model, folder=tmp_path / "run", **options)
    handle.remove()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_task(patch, 5)
        at_ranks(model, folder=tmp_path / "run", **options)
    assert not list((tmp_path / "run").glob("rank-*/kernels.safetensors"))
    with pytest.raises(FileError, match="holds no kernels.safetensors.*not finished"):
        ModuleKernels.load(tmp_path / "run" / "rank-3")
    counted = quiet.Passes()
    resumed = at_ranks(model, folder=tmp_path / "run", **options)
    assert counted.number == 0  # no pass is made again
    for rank in RANKS:
        assert resumed[rank].provenance["storage"]["resumed_batches"] == 3
        assert resumed[rank].provenance["storage"]["resumed_blocks"] == 5
        assert_same(resumed[rank], whole[rank], rtol=0, atol=0)

    damaged = tmp_path / "run" / "rank-3" / "blocks" / "00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    (damaged.parent / ".00002.safetensors.x.tmp").write_bytes(b"half")
    again = at_ranks(model, folder=tmp_path / "run", **options)
    assert counted.number == 3  # the Jacobians were gone, so they are captured again
    assert again[3].provenance["storage"]["resumed_blocks"] == len(whole[3])
    assert files_below(tmp_path / "run") == files_below(tmp_path / "whole")
    finished = at_ranks(model, folder=tmp_path / "run", **options | {"ranks": sorted(RANKS)})
    assert counted.number == 3
    assert list(finished) == sorted(RANKS)
    for rank in RANKS:
        assert_same(again[rank], whole[rank], rtol=0, atol=0)
        assert_same(finished[rank], whole[rank], rtol=0, atol=0)
    with pytest.raises(FileError, match=r"argument rank \(\[1, 3, 4\] there, \[1, 3\] here\)"):
        at_ranks(model, (1, 3), draws=2, folder=tmp_path / "run")
    with pytest.raises(FileError, match=r"argument rank \(\[1, 3, 4\] there, 3 here\)"):
        ntk(model, 3, draws=2, folder=tmp_path / "run")


BAD_RANKS = [
    ({"ranks": ()}, r"ranks must be positive integers such as .*, got \(\)"),
    ({"ranks": (4, 8, 4)}, r"ranks=\(4, 8, 4\) names a rank twice"),
    ({"ranks": (4, 0)}, "rank must be a positive integer, got 0"),
    ({"ranks": (4, 8.0)}, "rank must be a positive integer, got 8.0"),
    ({"ranks": "48"}, "ranks must be positive integers such as .*, got '48'"),
    ({"ranks": 8}, "ranks must be positive integers such as .*, got 8"),
]


@pytest.mark.parametrize("arguments, message", BAD_RANKS)
def test_bad_ranks_stop_before_any_forward_pass(arguments, message):
    model = small.seeded(small.bert)
    model.forward = None  # a forward pass would fail otherwise
    with pytest.raises(PeftLinearError, match=message):
        at_ranks(model, **arguments)


@pytest.mark.parametrize("space, ranks", [("weight", (4, 8)), ("rows", [4])])
def test_ranks_share_their_passes_in_lora_space_only(space, ranks):
    message = f'share the random A of space="lora", got space=.{space}.*once for each'
    with pytest.raises(PeftLinearError, match=message):
        KernelRequest(space=space).prepare(small.seeded(small.bert), ranks)


@pytest.mark.parametrize("kind", ["rows", "pairs"])
@pytest.mark.parametrize("ranks, draws", [((6,), 1), ((6,), 3), ((1, 2, 6), 1), ((1, 2, 6), 3)])
def test_no_more_kernels_are_held_than_are_planned_for(kind, ranks, draws, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features, n = ranks[-1] * draws, 37
    jacobians = [normal(n, features, 5) if kind == "rows" else (normal(n, 2, features), normal(n, 1, 2, 5))]
    matrix = ParameterMatrix(lambda x: x, lambda x: x, features, 5, draws=draws, nested=True)
    weight_gram, add = products.weight_gram, products._Mean.add
    most = 0

    def look(more):
        nonlocal most
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape == (n, n)]
        most = max(most, len({one.data_ptr() for one in tensors}) + more)

    def look_at_gram(*args):
        look(1)
        return weight_gram(*args)

    def look_at_add(mean, gram, may_overwrite):
        look(0 if may_overwrite else 1)
        return add(mean, gram, may_overwrite)

    monkeypatch.setattr(products, "weight_gram", look_at_gram)
    monkeypatch.setattr(products._Mean, "add", look_at_add)
    for rank, kernel in nested_kernels(jacobians, matrix, ranks):
        rows = jacobians[0] if kind == "rows" else (jacobians[0][0].mT @ jacobians[0][1][:, 0])
        draw = rows.unflatten(1, (draws, -1))[:, :, :rank] * (ranks[-1] / rank)
        expected = torch.stack([one.flatten(1) @ one.flatten(1).T for one in draw.unbind(1)])
        assert_close(kernel.gram, expected.mean(0), **EXACT)
        if draws > 1:
            deviation = float(expected.std(0).norm() / expected.mean(0).norm())
            assert kernel.spread == pytest.approx(deviation, rel=1e-9)
        del kernel, expected
    assert most <= kernels_at_work(draws, len(ranks))
    assert most == kernels_at_work(draws, len(ranks)) or draws == len(ranks) == 1


def test_the_kernels_at_work_count_towards_max_memory():
    model = small.seeded(small.bert)
    limit = "15KB"  # 3 kernels of 2.6 KB, but not 3 + 3
    ntk(model, 8, max_memory=limit, draws=2)
    at_ranks(model, RANKS, max_memory=limit)
    with pytest.raises(PeftLinearError, match="max_memory=15KB is too little for kernels of 18 rows"):
        at_ranks(model, RANKS, max_memory=limit, draws=2)
    assert MemoryPlan.make(10**6, 10, 5, 100, squares=7).jacobian_bytes == 10**6 - 100 - (7 + 5) * 800


def test_matrix_kernel_is_that_of_the_only_rank():
    rows = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = ParameterMatrix(lambda x: x, lambda x: x, 4, 3, draws=2)
    kernel = matrix_kernel([rows], matrix)
    expected = sum(half.flatten(1) @ half.flatten(1).T for half in rows.split(2, dim=1)) / 2
    assert_close(kernel.gram, expected, **EXACT)


TOGETHER = """
import sys
from tests.helpers import small_models as small
from peft_linear import Resources
from peft_linear.capture.ntk import compute_ntk_at_ranks

model, resources = small.seeded(small.bert), Resources(progress=False, folder=sys.argv[1])
several = compute_ntk_at_ranks(model, small.text_batches(SIZES), RANKS, draws=2, resources=resources)
assert all(kernels.provenance["processes"] == 2 for kernels in several.values())
""".replace("SIZES", repr(SIZES)).replace("RANKS", repr(RANKS))


def test_two_processes_give_the_kernels_of_one(tmp_path):
    port = str(free_port())
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", TOGETHER, str(tmp_path / "run")]
    both = [
        subprocess.Popen(
            command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], errors
    expected = at_ranks(small.seeded(small.bert), RANKS, draws=2)
    for rank in RANKS:
        assert_same(ModuleKernels.load(tmp_path / "run" / f"rank-{rank}"), expected[rank])
