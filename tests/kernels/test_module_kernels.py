# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""ModuleKernels as a value: sums, examples, files, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.testing import assert_close

from peft_linear.errors import FileError, KernelError, TargetError
from peft_linear.kernels import ModuleKernels


NAMES = ("layer.0.query", "layer.0.value", "layer.1.query", "layer.1.value")


def make(n_examples=3, n_outputs=2, seed=0, labels=True) -> ModuleKernels:
    generator = torch.Generator().manual_seed(seed)
    n = n_examples * n_outputs

    def gram(width):
        rows = torch.randn(n, width, generator=generator, dtype=torch.float64)
        return rows @ rows.T

    return ModuleKernels(
        blocks={name: gram(4) for name in NAMES},
        base=gram(2),
        outputs=torch.randn(n_examples, n_outputs, generator=generator, dtype=torch.float64),
        labels=torch.arange(n_examples) % n_outputs if labels else None,
        num_parameters=dict.fromkeys(NAMES, 10),
        shapes=dict.fromkeys(NAMES, (4, 6)),
        spread={NAMES[0]: 0.25},
        provenance={"seed": 3, "versions": {"torch": "x"}},
    )


@settings(max_examples=25, deadline=None)
@given(chosen=st.lists(st.sampled_from(NAMES), unique=True), seed=st.integers(0, 5))
def test_a_union_is_the_sum_and_adding_a_module_adds_a_positive_semidefinite_block(chosen, seed):
    kernels = make(seed=seed)
    assert_close(kernels.subset(chosen), sum((kernels[name] for name in chosen), kernels.base))
    for name in set(NAMES) - set(chosen):
        difference = kernels.subset([*chosen, name]) - kernels.subset(chosen)
        assert float(torch.linalg.eigvalsh(difference)[0]) > -1e-10
    assert_close(kernels.spectrum(chosen).trace, float(kernels.subset(chosen).trace()))


@settings(max_examples=25, deadline=None)
@given(indices=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_choosing_examples_permutes_rows_and_columns(indices):
    kernels = make()
    chosen = kernels.select_examples(indices)
    assert chosen.num_examples == len(indices)
    for i, old_i in enumerate(indices):
        assert torch.equal(chosen.outputs[i], kernels.outputs[old_i])
        assert chosen.labels[i] == kernels.labels[old_i]
        for j, old_j in enumerate(indices):
            expected = kernels[NAMES[2]][2 * old_i : 2 * old_i + 2, 2 * old_j : 2 * old_j + 2]
            assert torch.equal(chosen[NAMES[2]][2 * i : 2 * i + 2, 2 * j : 2 * j + 2], expected)


@pytest.mark.parametrize("labels", [True, False])
def test_a_file_gives_back_the_same_value(tmp_path, labels):
    kernels = make(labels=labels)
    path = tmp_path / "deep" / "kernels.safetensors"
    kernels.save(path)
    loaded = ModuleKernels.load(path)
    assert loaded.names == kernels.names
    for name in ("base", "outputs"):
        assert torch.equal(getattr(loaded, name), getattr(kernels, name))
    for name in NAMES:
        assert torch.equal(loaded[name], kernels[name])
    assert (loaded.labels is None) == (not labels)
    for field in ("num_parameters", "shapes", "spread", "provenance", "rank", "space", "lora_alpha", "output_kind"):
        assert getattr(loaded, field) == getattr(kernels, field), field
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "kernels.safetensors"
    make().save(path)
    before = path.read_bytes()

    def broken(tensors, file, metadata, blocks=None):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("peft_linear.kernels.saving.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        make(seed=1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def cut_in_half(path):
    make().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


NOT_KERNELS = [
    (lambda path: None, "there is no file"),
    (lambda path: path.write_text("hello"), "not a whole safetensors file"),
    (lambda path: save_file({"x": torch.zeros(1)}, path), "expected 'peft_linear.ModuleKernels/2'"),
    (cut_in_half, "not a whole safetensors file"),
]


@pytest.mark.parametrize("write, message", NOT_KERNELS)
def test_a_file_that_is_not_kernels_is_refused(write, message, tmp_path):
    write(tmp_path / "file")
    with pytest.raises(FileError, match=message):
        ModuleKernels.load(tmp_path / "file")


BAD_CALLS = [
    (lambda k: k["layer.9.query"], TargetError, "no kernel of a module 'layer.9.query'; there are: layer.0.query"),
    (lambda k: k.subset([NAMES[0], NAMES[0]]), TargetError, "named twice"),
    *[(lambda k, bad=bad: k.select_examples(bad), KernelError, r"numbers in \[0, 3\)") for bad in ([], [3], [-1])],
    (
        lambda _: ModuleKernels({}, torch.zeros(5, 5), torch.zeros(3, 2), None, {}, {}),
        KernelError,
        r"block 'base' has shape \(5, 5\)",
    ),
    (
        lambda _: ModuleKernels({}, torch.zeros(6, 6), torch.zeros(3, 2), torch.zeros(2), {}, {}),
        KernelError,
        "2 labels for 3 examples",
    ),
    (lambda _: ModuleKernels({}, torch.zeros(0, 0), torch.zeros(0, 2), None, {}, {}), KernelError, "non-empty"),
]


@pytest.mark.parametrize("call, error, message", BAD_CALLS)
def test_errors_say_what_and_where(call, error, message):
    kernels = make()
    with pytest.raises(error, match=message):
        call(kernels)


def test_it_is_printable_and_cannot_be_changed():
    kernels = make()
    assert "4 modules, 3 examples x 2 logits" in repr(kernels)
    assert len(kernels) == 4 and list(kernels) == list(NAMES) and NAMES[0] in kernels and "x" not in kernels
    with pytest.raises(AttributeError):
        kernels.rank = 4
    with pytest.raises(TypeError):
        kernels.blocks["new"] = kernels.base
