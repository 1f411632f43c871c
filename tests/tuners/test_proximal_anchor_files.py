# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The anchor file: when it is written, and when it is missing, damaged or of another adapter."""

from __future__ import annotations

import os
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_linear.errors import FileError
from peft_linear.proximal import proximal_distance
from peft_linear.tuners.proximal_lora.anchors import ANCHOR_NAME
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.proximal_bert import base, train, trained


@pytest.fixture
def saved(tmp_path):
    trained().save_pretrained(tmp_path)
    return tmp_path


def test_an_adapter_without_anchor_file_trains_with_a_warning(saved):
    (saved / ANCHOR_NAME).unlink()
    with pytest.warns(UserWarning, match=f"has no {ANCHOR_NAME}"):
        loaded = PeftModel.from_pretrained(base(), saved, is_trainable=True)
    assert all(anchor.b is None for anchor in find_adapters(loaded)[0].anchors().values())
    parameters = {n: p for n, p in loaded.named_parameters() if "lora_A" in n}
    kept = [p.detach().clone() for p in parameters.values()]
    for a, anchor in zip(kept, find_adapters(loaded)[0].anchors().values(), strict=True):
        assert torch.equal(a, anchor.a)
    loaded.save_pretrained(saved / "again")
    assert not (saved / "again" / ANCHOR_NAME).exists()  # a guess is not saved
    train(loaded, steps=1)
    loaded.save_pretrained(saved / "again")  # but an anchor that was trained with is, so that a resumed run continues
    assert (saved / "again" / ANCHOR_NAME).exists()


@pytest.mark.parametrize(("selective", "warns"), [(True, True), (False, False)])
def test_in_delta_space_only_the_selective_rule_needs_the_anchor_file(tmp_path, selective, warns):
    """Its inner product is over the factors; the distance of the weights needs no anchor where a factor is zero."""
    trained(proximal_space="delta", proximal_selective=selective).save_pretrained(tmp_path)
    (tmp_path / ANCHOR_NAME).unlink()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert any(f"has no {ANCHOR_NAME}" in str(warning.message) for warning in seen) == warns


@pytest.mark.parametrize("lam", [2.0, 0.0])
def test_loading_an_earlier_state_of_the_run_keeps_its_anchor(tmp_path, lam):
    """As the Trainer does with its best checkpoint, which may be deleted afterwards."""
    model = trained(lam=lam)
    early = proximal_distance(model)
    model.save_pretrained(tmp_path)
    train(model)
    assert proximal_distance(model) != early
    model.load_adapter(tmp_path, "default")
    shutil.rmtree(tmp_path)
    assert proximal_distance(model) == early


def test_the_weight_distance_needs_no_anchor_file(tmp_path, recwarn):
    model = trained(proximal_space="delta", proximal_selective=False)
    model.save_pretrained(tmp_path)
    (tmp_path / ANCHOR_NAME).unlink()
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert proximal_distance(loaded) == proximal_distance(model)
    assert not [w for w in recwarn if ANCHOR_NAME in str(w.message)]


def write_garbage(path):
    path.write_bytes(b"not safetensors")


def write_without_metadata(path):
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(write_garbage, "cannot be read"), (write_without_metadata, "is not an anchor file of format 1")],
)
def test_a_damaged_anchor_file_is_refused_for_training_only(saved, damage, message):
    damage(saved / ANCHOR_NAME)
    with pytest.raises(FileError, match=message):
        PeftModel.from_pretrained(base(), saved, is_trainable=True)
    PeftModel.from_pretrained(base(), saved)


@pytest.mark.parametrize("damage", ["module", "shape"])
def test_the_anchor_of_another_adapter_is_refused(saved, tmp_path, damage):
    kwargs = {"target_modules": ["query"]} if damage == "module" else {"r": 3}
    trained(**kwargs).save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / ANCHOR_NAME, saved / ANCHOR_NAME)
    with pytest.raises(FileError, match="does not belong to the adapter beside it"):
        PeftModel.from_pretrained(base(), saved, is_trainable=True)


def test_a_failed_write_leaves_the_old_anchor_file(saved, monkeypatch):
    before = (saved / ANCHOR_NAME).read_bytes()
    model = trained()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("peft_linear.tuners.proximal_lora.anchors.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(saved)
    assert (saved / ANCHOR_NAME).read_bytes() == before
    assert not [name for name in os.listdir(saved) if name.endswith(".tmp")]
