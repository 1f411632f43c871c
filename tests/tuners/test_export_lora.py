# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A ProximalLoRA adapter exported as plain LoRA, read by a process that does not import this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_linear.errors import FileError
from peft_linear.tuners.proximal_lora import ProximalLoraConfig, export_lora
from tests.helpers import small_models


IDS = torch.arange(1, 13).reshape(2, 6)
VARIANTS = {
    "plain": {},
    "patterns": {"rank_pattern": {"query": 5, "layer.1.output.dense": 1}, "alpha_pattern": {"value": 32}},
    "rslora": {"use_rslora": True, "rank_pattern": {"query": 5}, "alpha_pattern": {"value": 3}},
    "rslora-plain": {"use_rslora": True},
    "dora": {"use_dora": True, "rank_pattern": {"query": 5}},
    "embedding": {"target_modules": ["word_embeddings", "query"], "rank_pattern": {"query": 4}},
    "head": {"task_type": "SEQ_CLS", "bias": "all", "alpha_pattern": {"value": 1}},
    "alpha-zero": {"lora_alpha": 0, "alpha_pattern": {"value": 2}},
}


def base():
    torch.manual_seed(0)
    return small_models.bert().float().eval()


def save(folder, cls=ProximalLoraConfig, **kwargs):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value", "dense"]} | kwargs
    model = base()
    torch.manual_seed(1)
    model = get_peft_model(model, cls(**options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
                assert "lora" in name or "classifier" in name or "bias" in name
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_stock_peft_reads_every_variant_with_warnings_as_errors(tmp_path):
    base().save_pretrained(tmp_path / "base")
    for name, variant in VARIANTS.items():
        torch.save(save(tmp_path / name, **variant), tmp_path / f"{name}.pt")
        export_lora(tmp_path / name, tmp_path / f"{name}-out")
    # one deprecation inside transformers is ignored: peft calls the deprecated function for LoRA as well
    code = f"""
import sys, warnings
from pathlib import Path
import torch, peft
from transformers import BertForSequenceClassification
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
root = Path({str(tmp_path)!r})
for name in {list(VARIANTS)!r}:
    base = BertForSequenceClassification.from_pretrained(root / "base")
    model = peft.PeftModel.from_pretrained(base, root / f"{{name}}-out").eval()
    assert type(model.peft_config["default"]) is peft.LoraConfig
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits
    expected = torch.load(root / f"{{name}}.pt", weights_only=True)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6, msg=name)
assert not [name for name in sys.modules if name.startswith("peft_linear")]
print("fine")
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert result.stdout.strip().endswith("fine"), result.stderr


def test_without_patterns_the_tensors_are_the_same_bits(tmp_path):
    save(tmp_path / "in")
    assert export_lora(tmp_path / "in", tmp_path / "out") == tmp_path / "out"
    before = load_file(tmp_path / "in" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not [key for key in config if key.startswith("proximal")]
    assert set(config) <= set(LoraConfig().to_dict())


@pytest.mark.parametrize("name", ["patterns", "rslora", "alpha-zero"])
def test_one_alpha_over_r_holds_for_every_module(tmp_path, name):
    """What a consumer computes from `lora_alpha / r` and the tensors, without patterns."""
    save(tmp_path / "in", **VARIANTS[name])
    export_lora(tmp_path / "in", tmp_path / "out")
    model = PeftModel.from_pretrained(base(), tmp_path / "in")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    for key, a in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        assert a.shape[0] == config["r"]
        layer = model.get_submodule(key.removesuffix(".lora_A.weight"))
        product = scale * tensors[key.replace("lora_A", "lora_B")] @ a
        torch.testing.assert_close(product, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-7)


def test_parameters_and_grouped_convolutions_keep_their_patterns(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 6, 3, groups=2))
    config = ProximalLoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"0": 4})
    model = get_peft_model(net, config)
    model.save_pretrained(tmp_path / "in")
    export_lora(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"] == {"0": 4}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 6, 3, groups=2))
    loaded = PeftModel.from_pretrained(net, tmp_path / "out")
    x = torch.randn(2, 4, 8)
    assert torch.equal(loaded(x), model.eval()(x))


def damage(folder, what):
    config = folder / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    if what == "no config":
        config.unlink()
    elif what == "nested":
        (folder / "sub").mkdir()
        config.rename(folder / "sub" / "adapter_config.json")
    elif what == "bad json":
        config.write_text("{")
    elif what == "list":
        config.write_text("[]")
    elif what == "no weights":
        weights.unlink()
    elif what == "pickle":
        weights.rename(folder / "adapter_model.bin")
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "is not an adapter: it has no adapter_config.json$"),
        ("nested", r"there are adapters in its subfolders \['sub'\]"),
        ("bad json", "is not valid JSON"),
        ("list", "contains an adapter of type None"),
        ("no weights", "has no adapter_model.safetensors$"),
        ("pickle", "is a pickle, which is not read"),
        ("truncated", "cannot be read"),
    ],
)
def test_an_incomplete_adapter_is_refused_and_nothing_written(tmp_path, what, message):
    save(tmp_path / "in")
    damage(tmp_path / "in", what)
    with pytest.raises(FileError, match=message):
        export_lora(tmp_path / "in", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in"]


def save_vera(folder):
    get_peft_model(base(), VeraConfig(r=2, target_modules=["query"])).save_pretrained(folder)


def save_vera_weights_as_ours(folder):
    save(folder)
    save_vera(folder / "vera")
    (folder / "vera" / "adapter_model.safetensors").replace(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (partial(save, cls=LoraConfig), "contains an adapter of type 'LORA', not 'PROXIMAL_LORA': it needs no export"),
        (save_vera, "of type 'VERA'.*only ProximalLoRA adapters can be exported"),
        (save_vera_weights_as_ours, "contains no LoRA factors"),
        (lambda folder: None, "is not a folder; pass the local folder"),
    ],
    ids=["lora", "vera", "other weights", "nothing"],
)
def test_what_is_not_a_proximal_lora_adapter_is_refused(tmp_path, write, message):
    write(tmp_path / "in")
    with pytest.raises(FileError, match=message):
        export_lora(tmp_path / "in", tmp_path / "out")


def test_the_adapters_own_folder_is_refused_as_output(tmp_path):
    save(tmp_path / "in")
    with pytest.raises(FileError, match="is the adapter's own"):
        export_lora(tmp_path / "in", tmp_path / "in", overwrite=True)


@pytest.fixture
def occupied(tmp_path):
    """An adapter in `in` and a folder `out` that is not empty."""
    save(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_that_holds_anything_else_is_never_touched(occupied):
    for overwrite, message in (
        (False, "is not empty; choose another one or pass overwrite"),
        (True, "holds 'mine', wh"),
    ):
        with pytest.raises(FileError, match=message):
            export_lora(occupied / "in", occupied / "out", overwrite=overwrite)
    (occupied / "out" / "README.md").mkdir()
    with pytest.raises(FileError, match="holds 'README.md' and more, which is no part of a plain adapter"):
        export_lora(occupied / "in", occupied / "out", overwrite=True)
    assert contents(occupied / "out") == {"mine": b"keep"} and sorted(os.listdir(occupied)) == ["in", "out"]


def test_an_earlier_export_is_replaced_only_with_overwrite(tmp_path):
    save(tmp_path / "in")
    save(tmp_path / "new", r=3)
    export_lora(tmp_path / "in", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(FileError, match="is not empty; choose another one or pass overwrite=True"):
        export_lora(tmp_path / "new", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    export_lora(tmp_path / "new", tmp_path / "out", overwrite=True)
    export_lora(tmp_path / "new", tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected") != before
    assert sorted(os.listdir(tmp_path)) == ["expected", "in", "new", "out"]


def test_a_card_in_the_output_folder_stays_if_the_adapter_has_none(tmp_path):
    save(tmp_path / "in")
    (tmp_path / "in" / "README.md").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    export_lora(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert (tmp_path / "out" / "adapter_config.json").is_file()


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_an_adapter_that_was_trained_is_no_export_and_stays(tmp_path, lam):
    save(tmp_path / "in")
    save(tmp_path / "other", proximal_lambda=lam)
    before = contents(tmp_path / "other")
    with pytest.raises(FileError, match="holds a ProximalLoRA adapter, no export|holds 'proximal_anchor.safetensors'"):
        export_lora(tmp_path / "in", tmp_path / "other", overwrite=True)
    assert contents(tmp_path / "other") == before


def by_link(run):
    (run.parent / "link").symlink_to(run)
    return run.parent / "link"


@pytest.mark.parametrize("there", [lambda run: run, lambda run: run.parent, by_link, lambda run: run / "x" / ".."])
def test_a_folder_that_contains_the_adapter_is_refused(tmp_path, there):
    """With `overwrite` it once deleted the adapter and everything beside it."""
    save(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "x").mkdir()
    before = contents(tmp_path / "run" / "adapter")
    for overwrite in (True, False):
        with pytest.raises(FileError, match="contains the adapter .*; choose another one"):
            export_lora(tmp_path / "run" / "adapter", there(tmp_path / "run"), overwrite=overwrite)
        (tmp_path / "link").unlink(missing_ok=True)
    assert contents(tmp_path / "run" / "adapter") == before and (tmp_path / "run" / "x").is_dir()


def test_the_adapters_own_folder_is_found_through_links(tmp_path):
    save(tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for source, target in (("in", "link"), ("link", "in"), ("in", "in/../link")):
        with pytest.raises(FileError, match="is the adapter's own"):
            export_lora(tmp_path / source, tmp_path / target, overwrite=True)


def test_an_adapter_whose_files_are_links_into_the_output_folder_is_not_destroyed(tmp_path):
    save(tmp_path / "in")
    (tmp_path / "out").mkdir()
    path = tmp_path / "in" / "adapter_model.safetensors"
    path.rename(tmp_path / "out" / path.name)
    path.symlink_to(tmp_path / "out" / path.name)
    before = contents(tmp_path / "out")
    with pytest.raises(FileError, match="adapter_model.safetensors of the adapter .* is a link into"):
        export_lora(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before and path.is_file()


def test_a_subfolder_of_the_adapters_folder_is_written_and_the_adapter_stays(tmp_path):
    save(tmp_path / "in")
    before = contents(tmp_path / "in")
    for overwrite in (False, True):
        export_lora(tmp_path / "in", tmp_path / "in" / "plain", overwrite=overwrite)
        assert contents(tmp_path / "in") == before
        assert "adapter_config.json" in os.listdir(tmp_path / "in" / "plain")


class Killed(BaseException):
    """What a process that is killed would not live to see."""


@pytest.mark.parametrize("exchanges", [True, False])
def test_killed_at_any_step_the_old_or_the_new_export_is_whole(tmp_path, monkeypatch, exchanges):
    save(tmp_path / "in")
    save(tmp_path / "new", r=3)
    export_lora(tmp_path / "in", tmp_path / "old")
    export_lora(tmp_path / "new", tmp_path / "expected")
    old, new, sources = contents(tmp_path / "old"), contents(tmp_path / "expected"), contents(tmp_path / "new")
    if not exchanges:
        monkeypatch.setattr("peft_linear.files.exchange", lambda one, other: False)

    def export(folder, kill_at):
        count = 0

        def counted(original):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count >= kill_at:
                    raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "chmod"):
                patch.setattr(os, name, counted(getattr(os, name)))
            for name in ("rmtree", "copyfile"):
                patch.setattr(shutil, name, counted(getattr(shutil, name)))
            for name in ("peft_linear.files.exchange", "peft_linear.tuners.proximal_lora.export.save_file"):
                owner, _, attribute = name.rpartition(".")
                patch.setattr(name, counted(getattr(sys.modules[owner], attribute)))
            export_lora(tmp_path / "new", folder, overwrite=True)
        return count

    steps = export(tmp_path / "new-folder", kill_at=10**9)
    assert steps >= 4
    for step in range(1, steps + 4):
        folder = tmp_path / f"at{step}"
        shutil.copytree(tmp_path / "old", folder)
        with suppress(Killed):
            export(folder, kill_at=step)
        if not folder.exists():
            assert not exchanges
            (folder,) = tmp_path.glob(f".at{step}.*.old/replaced")
        assert contents(folder) in (old, new)
        assert contents(tmp_path / "new") == sources
    assert contents(folder) == new


def test_an_export_that_fails_leaves_the_output_folder_as_it_was(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    save(tmp_path / "in")
    export_lora(tmp_path / "in", tmp_path / "out")
    before = contents(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("peft_linear.tuners.proximal_lora.export.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            export_lora(tmp_path / "in", tmp_path / "out", overwrite=True)
        with pytest.raises(OSError, match="disk full"):
            export_lora(tmp_path / "in", tmp_path / "far" / "away")
    assert contents(tmp_path / "out") == before and sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "exists and is not a folder; choose another output path"),
        ("file/out", "a parent in the path is a file"),
        ("x" * 300, "too long"),
        ("a/" + "x" * 300, "too long"),
    ],
)
def test_an_output_folder_that_cannot_be(tmp_path, path, message):
    save(tmp_path / "in")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match=message):
        export_lora(tmp_path / "in", tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["file", "in"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": None}, r"adapter_config.json: r must be an integer, got null; save the adapter again"),
        ({"r": 0}, "r must be a rank of 1 or more, got 0"),
        ({"r": "8"}, 'r must be an integer, got "8"'),
        ({"lora_alpha": [16]}, "lora_alpha must be a number, got a list of 1"),
        ({"lora_alpha": "Infinity"}, "lora_alpha must be a finite number, got inf"),
        ({"rank_pattern": ["query"]}, "rank_pattern must be an object or null, got a list of 1"),
        ({"rank_pattern": {"query": 0}}, "query must be a rank of 1 or more, got 0"),
        ({"rank_pattern": {"query": 2.5}}, "rank_pattern.query must be an integer, got 2.5"),
        ({"alpha_pattern": {"(": 2}}, r"\( must be a name or regular expression, got one that does not compile"),
        ({"use_rslora": "yes"}, 'use_rslora must be true or false or null, got "yes"'),
        ({"peft_type": ["PROXIMAL_LORA"]}, "contains an adapter of type None"),
    ],
)
def test_a_configuration_with_wrong_types_is_refused(tmp_path, changed, message):
    save(tmp_path / "in", alpha_pattern={"value": 32})
    path = tmp_path / "in" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(FileError, match=message):
        export_lora(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "is not valid JSON: it is nested too deeply; save the adapter again"),
        (b"\xff", "is not valid JSON: 'utf-8' codec"),
        (b'{"r": NaN}', "NaN is not a number in JSON"),
        (b'{"r": 1, "r": 2}', "the key 'r' is there twice"),
    ],
)
def test_a_configuration_that_is_no_json_is_refused(tmp_path, content, message):
    save(tmp_path / "in")
    (tmp_path / "in" / "adapter_config.json").write_bytes(content)
    with pytest.raises(FileError, match=message):
        export_lora(tmp_path / "in", tmp_path / "out")


def test_null_patterns_and_missing_ones_are_none(tmp_path):
    save(tmp_path / "in", alpha_pattern={"value": 32})
    path = tmp_path / "in" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"rank_pattern": None}
    del config["use_rslora"]
    path.write_text(json.dumps(config))
    export_lora(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["alpha_pattern"] == {}


@pytest.mark.parametrize("change", [lambda tensors, key: tensors.pop(key), lambda t, key: t.update({key: t[key][0]})])
def test_factors_without_their_pair_are_refused(tmp_path, change):
    save(tmp_path / "in", rank_pattern={"query": 3})
    path = tmp_path / "in" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, next(key for key in tensors if "lora_B" in key))
    save_file(tensors, path)
    with pytest.raises(FileError, match="has no matrices .*lora_A.weight' and .*lora_B.weight', which are a pair"):
        export_lora(tmp_path / "in", tmp_path / "out")
