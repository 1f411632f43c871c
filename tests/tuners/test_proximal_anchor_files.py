# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The anchor file: when it is written, and when it is missing, damaged or of another adapter."""

from __future__ import annotations

import os
import random
import shutil
import warnings

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from peft_linear.errors import FileError
from peft_linear.files import tensor_digest
from peft_linear.proximal import proximal_distance
from peft_linear.tuners.proximal_lora import ProximalLoraConfig, reset_proximal_anchor
from peft_linear.tuners.proximal_lora.anchors import ANCHOR_NAME, AnchorSource
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.proximal_bert import OPTIONS, base, proximal, train, trained


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
    [(write_garbage, "cannot be read"), (write_without_metadata, "is not an anchor file of format 2")],
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


@pytest.mark.parametrize("step", ["weights", "config", "anchor"])
def test_a_save_that_is_interrupted_leaves_no_anchor_of_another_save(saved, monkeypatch, step):
    """What is there then is trained from a guess with a warning, as any adapter without an anchor is."""

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    model = train(proximal(seed=7))
    place = {
        "weights": "peft.peft_model.safe_save_file",
        "config": "peft_linear.tuners.proximal_lora.config.ProximalLoraConfig.save_pretrained",
        "anchor": "peft_linear.files.os.replace",
    }
    with monkeypatch.context() as patch:
        patch.setattr(place[step], killed)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(saved)
    assert not [name for name in os.listdir(saved) if "anchor" in name]
    with pytest.warns(UserWarning, match=f"has no {ANCHOR_NAME}"):
        PeftModel.from_pretrained(base(), saved, is_trainable=True)
    model.save_pretrained(saved)
    assert proximal_distance(load(saved)) == proximal_distance(model)


def test_arguments_that_peft_refuses_leave_the_anchor(saved):
    model = trained()
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(saved, selected_adapters=["default", "other"])
    with pytest.raises(ValueError, match="should be a directory"):
        model.save_pretrained(saved / "adapter_config.json")
    assert proximal_distance(load(saved)) == proximal_distance(model)


def load(folder, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(base(), folder, is_trainable=True, **kwargs)


def read(folder, model):
    """What loading for training reads, without the time that peft needs to make the adapter."""
    shapes = {name: (a.shape, b.shape) for name, _, a, b in find_adapters(model)[0].layers()}
    return AnchorSource(str(folder), {}).read(shapes)


def same(found, expected):
    return found.keys() == expected.keys() and all(
        (x is None) == (y is None) and (x is None or (x.dtype == y.dtype and torch.equal(x, y)))
        for name, anchor in found.items()
        for x, y in ((anchor.a, expected[name].a), (anchor.b, expected[name].b))
    )


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", [ANCHOR_NAME, "adapter_model.safetensors"])
def test_every_flipped_bit_is_found_or_changes_nothing(saved, name):
    """Of names, shapes and dtypes, which are in the header, and of values."""
    model = load(saved)
    anchors, content = read(saved, model), (saved / name).read_bytes()
    bits = random.Random(0).sample(range(8 * len(content)), 600) + list(range(8 * 200))
    found = 0
    for bit in bits:
        (saved / name).write_bytes(flipped(content, bit))
        try:
            assert same(read(saved, model), anchors), f"bit {bit}"
        except FileError:
            found += 1
    assert found > 0.9 * len(bits)  # the others are in metadata that do not count
    (saved / name).write_bytes(content)
    assert same(read(saved, model), anchors)


def test_flipped_bits_are_found_when_an_adapter_is_loaded_for_training(saved):
    of_peft = (SafetensorError, KeyError, RuntimeError)  # which reads the weights first
    for name, errors in ((ANCHOR_NAME, FileError), ("adapter_model.safetensors", (FileError, *of_peft))):
        content = (saved / name).read_bytes()
        for bit in random.Random(1).sample(range(64 * 8, 8 * len(content)), 8):
            (saved / name).write_bytes(flipped(content, bit))
            with pytest.raises(errors):
                load(saved)
        (saved / name).write_bytes(content)
    load(saved)


@pytest.mark.parametrize("name", [ANCHOR_NAME, "adapter_model.safetensors"])
@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(saved, name, kept):
    model, content = load(saved), (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(FileError, match="cannot be read"):
        read(saved, model)
    with pytest.raises((FileError, SafetensorError)):
        load(saved)


@pytest.mark.parametrize("swapped", [ANCHOR_NAME, "adapter_model.safetensors"])
def test_files_of_two_adapters_of_the_same_shapes_do_not_belong_together(saved, tmp_path, swapped):
    train(proximal(seed=9)).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / swapped, saved / swapped)
    with pytest.raises(
        FileError, match="adapter_model.safetensors is not what it was saved with .*restore both files"
    ):
        load(saved)
    shutil.copyfile(tmp_path / "other" / ANCHOR_NAME, saved / ANCHOR_NAME)
    shutil.copyfile(tmp_path / "other" / "adapter_model.safetensors", saved / "adapter_model.safetensors")
    load(saved)


def test_an_anchor_of_another_step_of_the_same_run_is_refused(tmp_path):
    """Its own values would be right, but nobody can know that."""
    model = trained()
    model.save_pretrained(tmp_path / "early")
    train(model).save_pretrained(tmp_path / "late")
    os.replace(tmp_path / "early" / ANCHOR_NAME, tmp_path / "late" / ANCHOR_NAME)
    with pytest.raises(FileError, match="is not what it was saved with"):
        load(tmp_path / "late")


def test_weights_saved_again_by_another_tool_are_the_same_if_their_values_are(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    expected = proximal_distance(load(saved))
    save_file(dict(reversed(tensors.items())), path, metadata={"tool": "another"})
    assert proximal_distance(load(saved)) == expected
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(FileError, match="saved again in another precision"):
        load(saved)
    (saved / ANCHOR_NAME).unlink()  # what the message says
    with pytest.warns(UserWarning, match=f"has no {ANCHOR_NAME}"):
        model = PeftModel.from_pretrained(base(), saved, is_trainable=True)
    reset_proximal_anchor(model)
    assert proximal_distance(model) == 0


def test_an_edited_head_is_seen_too(saved):
    """The task head is saved with the factors: the digest is of all that is saved."""
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    head = next(name for name in tensors if "classifier" in name)
    tensors[head] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FileError, match="is not what it was saved with"):
        load(saved)


def rewrite(path, change, version="2"):
    """An anchor file with other tensors, and with the checksums that belong to them (version 2) or none (1)."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    if version == "1":
        metadata = {"format": "pt", "proximal_anchor": "1", "modules": metadata["modules"]}
    else:
        about = metadata["modules"] + metadata["adapter_sha256"]
        metadata["sha256"] = tensor_digest(tensors, tensors.__getitem__, about)
    save_file(tensors, path, metadata=metadata)


def keep(tensors):
    pass


def with_first(change):
    def changed(tensors):
        name = sorted(tensors)[0]
        tensors[name] = change(tensors[name])

    return changed


def rename(tensors):
    name = sorted(tensors)[0]
    tensors[name.replace("lora_A", "lora_a")] = tensors.pop(name)


def lose(tensors):
    del tensors[sorted(tensors)[0]]


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_first(lambda a: a * float("nan")), "lora_A must be finite, got NaN or infinite values"),
        (with_first(lambda a: a.fill_(float("inf"))), "lora_A must be finite"),
        (with_first(lambda a: a.to(torch.int8)), "lora_A must be of a floating dtype, got torch.int8"),
        (with_first(lambda a: a != 0), "lora_A must be of a floating dtype, got torch.bool"),
        (with_first(lambda a: a.t().contiguous()), r"lora_A of .* has shape \(16, 2\), not \(2, 16\)"),
        (rename, "lora_a must be a factor of one of the modules that the file lists, got an unknown name"),
    ],
    ids=["nan", "inf", "int8", "bool", "shape", "name"],
)
def test_values_that_are_no_anchor_are_refused_even_with_checksums_that_fit(saved, change, message, version):
    rewrite(saved / ANCHOR_NAME, change, version)
    with pytest.raises(FileError, match=message):
        load(saved)


def test_anchors_in_eight_bit_floats_are_checked_too(saved):
    rewrite(saved / ANCHOR_NAME, with_first(lambda a: a.to(torch.float8_e4m3fn)))
    load(saved)
    rewrite(saved / ANCHOR_NAME, with_first(lambda a: torch.full(a.shape, float("nan")).to(torch.float8_e4m3fn)))
    with pytest.raises(FileError, match="must be finite"):
        load(saved)


def test_an_anchor_of_an_earlier_version_is_read_with_a_warning(saved):
    expected = proximal_distance(load(saved))
    rewrite(saved / ANCHOR_NAME, keep, version="1")
    with pytest.warns(UserWarning, match="written by an earlier version of peft_linear: it cannot be checked"):
        model = PeftModel.from_pretrained(base(), saved, is_trainable=True)
    assert proximal_distance(model) == expected
    model.save_pretrained(saved)
    assert proximal_distance(load(saved)) == expected  # without a warning


def test_a_tensor_that_an_earlier_file_lacks_is_not_read_as_zeros(saved):
    rewrite(saved / ANCHOR_NAME, lose, version="1")
    with pytest.raises(FileError, match="must be there with one factor at least, got none"):
        load(saved)


def change_metadata(path, **changed):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changed
    save_file(load_file(path), path, metadata={key: value for key, value in metadata.items() if value is not None})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"proximal_anchor": "3"}, "is not an anchor file of format 2"),
        ({"proximal_anchor": "1"}, "is not an anchor file of format 2"),
        ({"sha256": None}, "is not an anchor file of format 2"),
        ({"sha256": "0"}, "was changed after it was saved: its checksum is 0"),
        ({"adapter_sha256": "0"}, "was changed after it was saved"),
        ({"modules": "{}"}, "modules must be a list, got an object"),
        ({"modules": "[1]"}, r"modules\[0\] must be a text, got 1"),
        ({"modules": "[" * 10**5}, "is not valid JSON: it is nested too deeply"),
        ({"modules": "["}, "is not valid JSON"),
        ({"modules": "[]"}, "was changed after it was saved"),
    ],
)
def test_metadata_that_are_not_what_was_written_are_refused(saved, changed, message):
    change_metadata(saved / ANCHOR_NAME, **changed)
    with pytest.raises(FileError, match=message):
        load(saved)


@pytest.mark.parametrize(
    ("fewer", "message"), [(True, "is missing in it"), (False, "which the adapter does not have")]
)
def test_an_anchor_is_of_exactly_the_adapters_modules(saved, tmp_path, fewer, message):
    trained(target_modules=["query"]).save_pretrained(tmp_path / "less")
    model = load(saved if fewer else tmp_path / "less")
    with pytest.raises(FileError, match=message):
        read(tmp_path / "less" if fewer else saved, model)


def test_weights_in_a_pickle_are_checked(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert proximal_distance(load(tmp_path)) == proximal_distance(model)
    train(model)
    model.save_pretrained(tmp_path / "later", safe_serialization=False)
    os.replace(tmp_path / "later" / "adapter_model.bin", tmp_path / "adapter_model.bin")
    with pytest.raises(FileError, match="adapter_model.bin is not what it was saved with"):
        load(tmp_path)


def test_an_old_file_that_peft_prefers_to_the_pickle_is_seen(saved):
    """peft loads adapter_model.safetensors where it is there, also if the pickle beside it is newer."""
    train(proximal(seed=9)).save_pretrained(saved, safe_serialization=False)
    with pytest.raises(FileError, match="adapter_model.safetensors is not what it was saved with"):
        load(saved)


def test_weights_in_shards_are_the_same_weights(saved):
    model = load(saved)
    tensors = load_file(saved / "adapter_model.safetensors")
    anchors = read(saved, model)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match=f"found no weights beside {ANCHOR_NAME}"):
        assert same(read(saved, model), anchors)
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        part = {name: tensors[name] for name in names}
        save_file(part, saved / f"adapter_model-0000{number}-of-00002.safetensors")
    assert same(read(saved, model), anchors)
    (saved / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileError, match="is not what it was saved with"):
        read(saved, model)


def test_adapters_in_subfolders_are_checked_each(tmp_path):
    model = trained()
    torch.manual_seed(3)
    model.add_adapter("other", ProximalLoraConfig(proximal_lambda=2.0, **OPTIONS))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / ANCHOR_NAME).is_file()
    assert proximal_distance(load(tmp_path, subfolder="other"), "default") == proximal_distance(model, "other")
    shutil.copyfile(tmp_path / ANCHOR_NAME, tmp_path / "other" / ANCHOR_NAME)
    with pytest.raises(FileError, match="does not belong to the adapter beside it"):
        load(tmp_path, subfolder="other")
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    load(tmp_path, subfolder="other")
    load(tmp_path)


def test_an_adapter_on_the_hub_is_checked_with_what_is_downloaded(saved, monkeypatch):
    model = load(saved)
    asked = []

    def download(repository, name, **kwargs):
        asked.append((repository, name, kwargs))
        if not (saved / name).is_file():
            raise EntryNotFoundError(f"no {name}")
        return str(saved / name)

    monkeypatch.setattr("peft_linear.tuners.proximal_lora.anchors.hf_hub_download", download)
    shapes = {name: (a.shape, b.shape) for name, _, a, b in find_adapters(model)[0].layers()}
    source = AnchorSource("me/adapter", {"revision": "v1"})
    assert same(source.read(shapes), read(saved, model)) and source.exists()
    assert asked[0] == ("me/adapter", ANCHOR_NAME, {"revision": "v1"})
    assert asked[1] == ("me/adapter", "adapter_model.safetensors", {"revision": "v1"})
    (saved / ANCHOR_NAME).unlink()
    assert source.read(shapes) is None and not source.exists()


def test_an_adapter_loaded_for_inference_keeps_its_anchor_when_it_is_saved_over_itself(saved):
    """Its anchor is read when it is needed: here from the file that is about to be replaced."""
    model = PeftModel.from_pretrained(base(), saved)
    expected = proximal_distance(load(saved))
    model.save_pretrained(saved)
    assert proximal_distance(load(saved)) == expected


def test_an_anchor_that_was_replaced_after_the_weights_were_loaded_is_refused(saved):
    model, early = PeftModel.from_pretrained(base(), saved), PeftModel.from_pretrained(base(), saved)
    expected = proximal_distance(early)
    train(proximal(seed=9)).save_pretrained(saved)
    with pytest.raises(
        FileError, match="it was replaced after the adapter was loaded from there; load the adapter ag"
    ):
        proximal_distance(model)
    assert proximal_distance(early) == expected
    reset_proximal_anchor(model)
    assert proximal_distance(model) == 0


def test_a_damaged_anchor_is_refused_before_anything_is_saved(saved, tmp_path):
    write_garbage(saved / ANCHOR_NAME)
    model = PeftModel.from_pretrained(base(), saved)
    with pytest.raises(FileError, match="cannot be read"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
