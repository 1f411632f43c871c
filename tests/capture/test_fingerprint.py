# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A run folder is resumed by its own run only: all that the kernels depend on is in its fingerprint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_linear.capture.batches import Batch
from peft_linear.capture.engine.digests import digest
from peft_linear.capture.engine.fingerprint import fingerprint
from peft_linear.errors import FileError
from tests.helpers.kernels import ntk
from tests.helpers.odd_models import TwoLayers, numbers


class Activated(TwoLayers):
    def __init__(self, activation=None, slope=1.0, name="tanh"):
        super().__init__()
        self.activation = activation or nn.Tanh()
        self.slope, self.settings = slope, {"name": name}

    def forward(self, x):
        return self.b(self.activation(self.slope * self.a(x)))


class Other(Activated):
    def forward(self, x):
        return self.b(torch.sin(self.slope * self.a(x)))


def hooked():
    model = Activated()
    model.a.register_forward_hook(lambda module, args, output: 2 * output)
    return model


SCALE = {"factor": 1.0}


def scaled(x):
    return inner(x)


def inner(x):
    return SCALE["factor"] * x


class WithAMethod(Activated):
    def forward(self, x):
        return self.b(self.act(self.a(x)))

    def act(self, x):
        return torch.tanh(x)


OTHERS = {
    "activation": lambda: Activated(nn.ReLU()),
    "extra_repr": lambda: Activated(nn.LeakyReLU(0.2)),
    "attribute": lambda: Activated(slope=2.0),
    "attribute in a dict": lambda: Activated(name="sin"),
    "function": lambda: Activated(torch.sin),
    "lambda": lambda: Activated(lambda x: x**3),
    "forward": Other,
    "hook": hooked,
}


def test_models_that_differ_in_anything_have_different_fingerprints_and_equal_ones_the_same():
    found = {name: fingerprint(make(), (), {})["model"]["modules"] for name, make in OTHERS.items()}
    found["none"] = fingerprint(Activated(), (), {})["model"]["modules"]
    assert len(set(found.values())) == len(OTHERS) + 1
    again = {name: fingerprint(make(), (), {})["model"]["modules"] for name, make in OTHERS.items()}
    assert all(found[name] == value for name, value in again.items())


def test_the_folder_of_another_model_is_refused(tmp_path):
    ntk(Activated(), numbers(), targets=["a"], folder=tmp_path / "run")
    with pytest.raises(FileError, match="holds the run of something else: it differs in the model's .*modules"):
        ntk(Activated(nn.ReLU()), numbers(), targets=["a"], folder=tmp_path / "run")


def test_tensors_in_lists_count():
    model, x = TwoLayers(), torch.ones(2, 4)
    prints = [
        fingerprint(model, [Batch({"x": x, "parts": [x, {"y": value * x}]}, None)], {})["batch"] for value in (1, 1, 2)
    ]
    assert prints[0] == prints[1] != prints[2]
    large = [torch.zeros(5000), torch.zeros(5000)]
    large[1][2500] = 1  # which repr() leaves out
    assert digest([large[0]]) != digest([large[1]])


def test_what_cannot_be_told_apart_is_refused():
    batch = Batch({"x": torch.ones(2, 4), "thing": object()}, None)
    with pytest.raises(FileError, match="'thing' of type object, whose content cannot be told from another"):
        fingerprint(TwoLayers(), [batch], {})


def test_a_folder_whose_first_file_was_not_finished_can_be_used(tmp_path):
    (tmp_path / ".manifest.json.abc.tmp").write_text('{"form')
    assert len(ntk(Activated(), numbers(), targets=["a"], folder=tmp_path)) == 1


def test_two_processes_do_not_compute_in_one_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    ntk(Activated(), numbers(), targets=["a"], folder=tmp_path)
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileError, match="another process computes kernels in the folder.*wait for it to end"):
            ntk(Activated(), numbers(), targets=["a"], folder=tmp_path)
    assert len(ntk(Activated(), numbers(), targets=["a"], folder=tmp_path)) == 1


MANIFESTS = [
    b"", b"{", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000,
    b'{"format": 3, "fingerprint": {}}',
    b'{"format": "peft_linear.compute_ntk/1"}',
    b'{"format": "peft_linear.compute_ntk/1", "fingerprint": []}',
    b'{"format": "peft_linear.compute_ntk/1", "fingerprint": {"model": 3}}',
]  # fmt: skip


@pytest.mark.parametrize("content", MANIFESTS)
def test_a_manifest_that_is_none_is_an_error(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(FileError, match="manifest.json.*; pass another folder, or remove this one"):
        ntk(Activated(), numbers(), targets=["a"], folder=tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\n", b"[1]\n", b'{"file": 3, "sha256": 4}\n', b'{"file": "a\\u0000", "sha256": "b"}\n', b"[" * 100_000],
)
def test_lines_of_the_record_that_are_none_are_left_out(content, tmp_path):
    expected = ntk(Activated(), numbers(), targets=["a"], folder=tmp_path).subset()
    (tmp_path / "finished.jsonl").write_bytes(content)
    assert torch.equal(ntk(Activated(), numbers(), targets=["a"], folder=tmp_path).subset(), expected)


@pytest.mark.parametrize("path", ["x" * 300, "/dev/null/x", "a\0b", "/proc/none/x"])
def test_a_folder_that_cannot_be_is_an_error(path):
    with pytest.raises(FileError, match="cannot write .*; "):
        ntk(Activated(), numbers(), targets=["a"], folder=path)


def test_globals_and_methods_that_a_forward_uses_count(monkeypatch):
    def of(model):
        return fingerprint(model, (), {})["model"]["modules"]

    before = [of(Activated(scaled)), of(WithAMethod())]
    assert before == [of(Activated(scaled)), of(WithAMethod())]
    monkeypatch.setitem(SCALE, "factor", 2.0)
    monkeypatch.setattr(WithAMethod, "act", lambda self, x: torch.sin(x))
    after = [of(Activated(scaled)), of(WithAMethod())]
    assert before[0] != after[0] and before[1] != after[1]


class Setting:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Holder(TwoLayers):
    scale = 1.0

    def __init__(self, held=None):
        super().__init__()
        self.held = held

    def forward(self, x):
        return self.b(torch.tanh(self.scale * self.a(x)))

    @property
    def doubled(self):
        return 2 * self.scale


def test_attributes_of_classes_and_of_objects_in_containers_count(monkeypatch):
    def printed(*held):
        return fingerprint(Holder(*held), [], {})

    kinds = [Setting, lambda v: [Setting(v)], lambda v: {"a": (Setting(v),)}, lambda v: Setting(Setting(v))]
    for kind in kinds:
        assert printed(kind(1.0)) == printed(kind(1.0)) != printed(kind(2.0))
    loop = [Setting(1.0)]
    loop.append(loop)
    assert printed(loop) == printed(loop)
    before = printed()
    monkeypatch.setattr(Holder, "scale", 2.0)
    assert printed() != before
    monkeypatch.undo()
    assert printed() == before
    monkeypatch.setattr(Holder, "doubled", property(lambda self: 3 * self.scale))
    assert printed() != before
