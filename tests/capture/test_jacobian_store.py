# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What is kept of a batch: tensors that several modules share, as queries, keys and values their input, once."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.testing import assert_close

from peft_linear.capture.engine import run
from peft_linear.capture.engine.jacobian_store import JacobianStore
from peft_linear.capture.engine.processes import Team
from peft_linear.capture.engine.run_folder import RunFolder
from tests.helpers import kernels as quiet
from tests.helpers import small_models as small


EXACT = {"rtol": 1e-10, "atol": 1e-12}
SIZES = (3, 2, 1)
OPTIONS = {"targets": ["query", "key", "value"], "space": "weight"}
SELF = "bert.encoder.layer.{}.attention.self.{}#0"


def ntk(model, **kwargs):
    return quiet.ntk(model, small.text_batches(SIZES), **OPTIONS | kwargs)


def stopped_before_the_products(monkeypatch, model, folder, **kwargs):
    """The files of a run that was stopped when all batches had gone through."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "matrix_kernel", stop)
        ntk(model, folder=folder, **kwargs)
    return [folder / "parts" / f"{number:06d}.safetensors" for number in range(len(SIZES))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_queries_keys_and_values_store_their_input_once(dtype, tmp_path, monkeypatch):
    model = small.seeded(small.bert, dtype=dtype)
    files = stopped_before_the_products(monkeypatch, model, tmp_path / "run")
    for number, path in enumerate(files):
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            shared = json.loads(file.metadata()["shared"])
        width = 7 + number
        assert shared == {
            f"inputs:{SELF.format(0, 'key')}": f"inputs:{SELF.format(0, 'query')}",
            f"inputs:{SELF.format(0, 'value')}": f"inputs:{SELF.format(0, 'query')}",
            # The classifier reads one token of the last layer's queries: their positions are another selection.
            f"inputs:{SELF.format(1, 'value')}": f"inputs:{SELF.format(1, 'key')}",
        }
        assert not shared.keys() & tensors.keys()
        assert tensors[f"inputs:{SELF.format(0, 'query')}"].shape == (SIZES[number], width, 16)
        assert tensors[f"inputs:{SELF.format(1, 'query')}"].shape == (SIZES[number], 1, 16)
        assert sum(f"cotangents:{SELF.format(i, one)}" in tensors for i in (0, 1) for one in OPTIONS["targets"]) == 6
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == 8 + header + sum(tensor.nbytes for tensor in tensors.values())
    resumed = ntk(model, folder=tmp_path / "run")
    assert resumed.provenance["storage"]["resumed_batches"] == len(SIZES)
    whole, in_memory = ntk(model, folder=tmp_path / "whole"), ntk(model)
    for name in whole.names:
        assert torch.equal(resumed[name], whole[name])
        assert_close(
            resumed[name], in_memory[name], **(EXACT if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4})
        )


def test_files_without_shared_tensors_say_nothing_of_them(tmp_path, monkeypatch):
    for path in stopped_before_the_products(
        monkeypatch, small.seeded(small.bert), tmp_path / "run", space="lora", rank=2, always_trained=()
    ):
        with safe_open(path, framework="pt") as file:
            assert "shared" not in (file.metadata() or {})


def make_jacobians():
    """Keys whose jacobians share their inputs, their cotangents, a part, or nothing; a view of the same memory."""
    x, y = torch.arange(24.0).view(2, 3, 4), torch.arange(6.0).view(2, 3, 1)
    d, e = torch.ones(2, 1, 3, 5), torch.full((2, 1, 3, 5), 2.0)
    return {
        "a": (x, d),
        "b": (x.view(2, 3, 4), e),
        "c": (y, d),
        "rows": torch.full((2, 4, 5), 3.0),
        "narrower": (x[..., :2], d.clone()),
        "none": None,
    }


def bytes_of(jacobians, keys):
    """Of what the jacobians of those keys keep alive, by hand."""
    once = {"x": 96 if {"a", "b"} & keys else 0, "y": 24 if "c" in keys else 0, "d": 120 if {"a", "c"} & keys else 0}
    own = {"b": 120, "rows": 160, "narrower": 48 + 120}
    return sum(once.values()) + sum(size for key, size in own.items() if key in keys)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(["a", "b", "c", "rows", "narrower"]))
def test_shared_tensors_count_once_until_the_last_one_is_released(order):
    jacobians = make_jacobians()
    store = JacobianStore("", [2, 2], RunFolder(Team()), False, torch.device("cpu"))
    for number in (0, 1):
        assert store.put(number, jacobians, torch.zeros(2, 1)) == {}
    kept = set(order)
    assert store.held_bytes == 2 * bytes_of(jacobians, kept)
    for key in order:
        store.release([key, "none", "unknown"])
        kept.remove(key)
        assert store.held_bytes == 2 * bytes_of(jacobians, kept)
    assert store.held_bytes == 0


@pytest.mark.parametrize("from_the_start", [True, False])
def test_jacobians_come_back_from_files_as_they_were(from_the_start, tmp_path):
    jacobians, folder = make_jacobians(), RunFolder(Team(), tmp_path)
    store = JacobianStore("", [2], folder, from_the_start, torch.device("cpu"))
    store.put(0, jacobians, torch.zeros(2, 1))
    store.keep_within(bytes_of(jacobians, set(jacobians)))
    assert store.in_files == from_the_start
    store.keep_within(bytes_of(jacobians, set(jacobians)) - 1)
    assert store.in_files and store.held_bytes == 0
    other = JacobianStore("", [2], folder, True, torch.device("cpu"))
    other.adopt(0)
    with safe_open(tmp_path / store.file_of(0), framework="pt") as file:
        assert set(file.keys()) == {
            "outputs",
            "inputs:a",
            "cotangents:a",
            "cotangents:b",
            "inputs:c",
            "rows:rows",
            "inputs:narrower",
            "cotangents:narrower",
        }
    for one in (store, other):
        assert one.jacobians("none", 4, 5) is None
        for key in ("a", "b", "c", "narrower"):
            (got,) = one.jacobians(key, 4, 5)
            assert all(torch.equal(tensor, expected) for tensor, expected in zip(got, jacobians[key], strict=True))
        assert torch.equal(one.jacobians("rows", 4, 5)[0], jacobians["rows"])
