# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The files of a recommendation: what is loaded equals what was saved, or a `FileError` says what is wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import fields, replace
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from peft_linear.errors import FileError
from peft_linear.functional.spectrum import Spectrum
from peft_linear.recommendation.saving import FORMAT, JSON_NAME, SPECTRA_NAME
from peft_linear.recommendation.values import Settings
from peft_linear.schema import json_digest
from peft_linear.selection import Recommendation, recommend
from tests.helpers.planted import planted_kernels


WRONG = [None, True, False, 0, -1, 3, 2**80, 0.5, "", "x", "Infinity", [], {}, [1], [[1]], {"a": 1}, ["x", None]]
THOROUGH = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@lru_cache(maxsize=1)
def planted():
    rec = recommend(planted_kernels(), budget=2)
    return replace(rec, settings=replace(rec.settings, heads=({"steps": 3, "draws": None},)))


@pytest.fixture
def saved(tmp_path):
    planted().save(tmp_path)
    return tmp_path


def record_of(folder):
    return json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))


def write_record(folder, record, version=FORMAT, digest=True):
    """As this version would have written it, with the checksum that belongs to it, or as an earlier one."""
    record = {key: value for key, value in record.items() if key != "sha256"} | {"format": version}
    if digest and version == FORMAT:
        record["sha256"] = json_digest(record)
    (folder / JSON_NAME).write_text(json.dumps(record), encoding="utf-8")


def equal_or_refused(folder, rec):
    try:
        assert Recommendation.load(folder) == rec
    except FileError as error:
        assert JSON_NAME in str(error) or SPECTRA_NAME in str(error)


def loaded_or_refused(folder):
    try:
        Recommendation.load(folder)
    except FileError as error:
        assert JSON_NAME in str(error) or SPECTRA_NAME in str(error)


def places(value, path=()):
    """The path of every value in a JSON value."""
    yield path
    for key, entry in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(entry, (*path, key))


def mutated(record, path, new):
    """A copy in which the value at a path is another one; "delete" takes it away, "rename" gives it another key."""
    if not path:
        return new
    record = copy.deepcopy(record)
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    if new == "delete":
        del holder[path[-1]]
    elif new == "rename" and isinstance(holder, dict):
        holder[f"{path[-1]}x"] = holder.pop(path[-1])
    else:
        holder[path[-1]] = new
    return record


@THOROUGH
@given(data=st.data())
def test_any_byte_changed_inserted_or_lost_gives_the_same_recommendation_or_an_error(saved, data):
    planted().save(saved)
    path = saved / data.draw(st.sampled_from([JSON_NAME, JSON_NAME, SPECTRA_NAME]))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = min(len(content), start + data.draw(st.sampled_from([0, 1, 1, 2, 10, len(content)])))
    tokens = [
        b"",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"null",
        b"{",
        b"]",
        b'"',
        b"\xff",
        b"\x00",
        b",",
        b"1",
    ]
    path.write_bytes(content[:start] + data.draw(st.sampled_from(tokens) | st.binary(max_size=2)) + content[end:])
    equal_or_refused(saved, planted())


@THOROUGH
@given(
    data=st.data(), version=st.sampled_from([FORMAT, "peft_linear.Recommendation/2", "peft_linear.Recommendation/1"])
)
def test_a_value_of_another_type_anywhere_is_an_error_and_nothing_else(saved, data, version):
    """Also with a checksum that belongs to it, and in the formats of earlier versions, which had none."""
    planted().save(saved)
    record = record_of(saved)
    path = data.draw(st.sampled_from(list(places(record))))
    new = data.draw(st.sampled_from([*WRONG, "delete", "rename"]))
    changed = mutated(record, path, new)
    if isinstance(changed, dict):
        write_record(saved, changed, version=changed.get("format") if path == ("format",) else version)
    else:
        (saved / JSON_NAME).write_text(json.dumps(changed))
    loaded_or_refused(saved)


@THOROUGH
@given(data=st.data())
def test_a_value_changed_without_the_checksum_gives_the_same_recommendation_or_an_error(saved, data):
    planted().save(saved)
    record = record_of(saved)
    path = data.draw(st.sampled_from(list(places(record))))
    changed = mutated(record, path, data.draw(st.sampled_from([*WRONG, "delete", "rename"])))
    (saved / JSON_NAME).write_text(json.dumps(changed), encoding="utf-8")
    equal_or_refused(saved, planted())


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (
            ("scores", 3, "rank"),
            "first",
            r'scores\[3\]\.rank must be an integer, got "first"; save the recommendation',
        ),
        (("scores", 0, "chosen"), 1, r"scores\[0\]\.chosen must be true or false, got 1"),
        (("scores", 0, "interval"), [1.0], r"scores\[0\]\.interval must be a list of 2, got a list of 1"),
        (("scores", 0, "name"), "delete", r"scores\[0\]\.name must be there, got nothing"),
        (("scores", 0, "score"), "rename", r"scores\[0\]\.score must be there"),
        (("modules",), {}, "modules must be a list, got an object of 0"),
        (("modules", 0), "other", r"recommendation\.json: a recommendation needs modules that have a score"),
        (("ridge",), True, "ridge must be a number or null, got true"),
        (("ridge",), "1", 'ridge must be a number or null, got "1"'),
        (("budget",), {"a": 2}, "budget must be an integer or a number or a text or a list, got an object of 1"),
        (("predicted", "loss"), "low", 'predicted.loss must be a number or an object, got "low"'),
        (("settings", "shapes", "x"), [1, 2, 3], "settings.shapes.x must be a list of 2, got a list of 3"),
        (("settings", "rank"), 8.5, "settings.rank must be an integer, got 8.5"),
        (("settings", "reliability", "splits"), "delete", "settings.reliability.splits must be there"),
        (("settings", "reliability"), [1], "settings.reliability must be an object, got a list of 1"),
        (("settings", "kernels", "deep"), json.loads("[" * 99 + "]" * 99), "must be nested at most 64 levels deep"),
        (("unknown",), 1, "unknown must be one of the keys budget, criterion, format, .*got an unknown one"),
        (("spectra", "file"), "../x", "spectra.file must be 'spectra.safetensors', got \"../x\""),
        (("spectra", "eps", "chosen"), "delete", "spectra.eps must be of the spectra all, .*always trained"),
    ],
)
@pytest.mark.parametrize("version", [FORMAT, "peft_linear.Recommendation/2"])
def test_the_error_names_the_key_and_what_is_expected(saved, path, new, message, version):
    record = record_of(saved)
    write_record(saved, mutated(record, path, new), version)
    with pytest.raises(FileError, match=message):
        Recommendation.load(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'{"format": "\xff"}', "is not valid JSON: 'utf-8' codec can't decode"),
        (b'{"ridge": NaN}', "NaN is not a number in JSON"),
        (b'{"ridge": -Infinity}', "-Infinity is not a number in JSON"),
        (b'{"ridge": 1e999}', "the number 1e999 is out of range"),
        (b'{"ridge": 1' + b"0" * 9999 + b"}", "the integer 1000.* is out of range"),
        (b'{"ridge": 1, "ridge": 2}', "the key .ridge. is there twice; save the recommendation again"),
        (b"", "is not valid JSON"),
        (b"7", "holds 7, expected the format"),
        (b'{"format": ["peft_linear.Recommendation/3"]}', "holds a list of 1, expected the format"),
    ],
)
def test_what_is_no_json_of_ours(saved, content, message):
    (saved / JSON_NAME).write_bytes(content)
    with pytest.raises(FileError, match=message):
        Recommendation.load(saved)


def test_a_change_that_fits_every_type_is_seen_by_the_checksum(saved):
    record = record_of(saved)
    write_record(saved, record | {"ridge": 2 * record["ridge"]}, digest=False)
    with pytest.raises(FileError, match="sha256 must be there"):
        Recommendation.load(saved)
    text = json.dumps(record | {"ridge": 2 * record["ridge"]})
    (saved / JSON_NAME).write_text(text)
    with pytest.raises(FileError, match="was changed after it was saved: its checksum is .*; save the recommendation"):
        Recommendation.load(saved)


def test_another_layout_of_the_same_json_is_the_same_recommendation(saved):
    record = record_of(saved)
    (saved / JSON_NAME).write_text(json.dumps(dict(reversed(record.items())), indent=7, ensure_ascii=True))
    assert Recommendation.load(saved) == planted()


@pytest.mark.parametrize("version", ["peft_linear.Recommendation/1", "peft_linear.Recommendation/2"])
def test_the_formats_of_earlier_versions_are_read(saved, version):
    record = record_of(saved)
    record["settings"]["avoided"] = record["settings"].pop("excluded")
    record["settings"]["of_then"] = 1
    record["settings"]["optimizer"] = None
    write_record(saved, record, version)
    expected = replace(planted(), settings=replace(planted().settings, optimizer=None))
    assert Recommendation.load(saved) == expected


def test_infinite_numbers_are_saved_and_loaded(tmp_path):
    """The condition number of a singular kernel without a ridge is infinite; JSON has no number for it."""
    rec = planted()
    rows = tuple(replace(row, condition_number=math.inf, score=-math.inf) for row in rec.scores)
    rec = replace(rec, scores=rows, predicted={"loss": math.inf, "all_candidates": {"loss": 1.0}})
    rec.save(tmp_path)
    loaded = Recommendation.load(tmp_path)
    assert loaded == rec and loaded.to_markdown() == rec.to_markdown()
    replace(rec, ridge=math.nan).save(tmp_path)
    assert math.isnan(Recommendation.load(tmp_path).ridge)


@pytest.mark.parametrize("name", ["a\nb", 'quote"', "\ud800half", "ünïcode", "x" * 3000, ""])
def test_any_module_name_comes_back(tmp_path, name):
    rec = planted()
    rows = tuple(replace(row, name=name) if row.name == rec.modules[0] else row for row in rec.scores)
    rec = replace(rec, modules=(name, *rec.modules[1:]), scores=rows)
    rec.save(tmp_path)
    assert Recommendation.load(tmp_path) == rec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": {"loss": "low"}}, 'predicted.loss must be a number or an object, got "low"'),
        (
            {"settings": Settings(kernels={"seen": {1, 2}})},
            "settings.kernels.seen must be something that JSON can hold",
        ),
        (
            {"settings": Settings(kernels={"seeds": {1: 2}})},
            "seeds must be a mapping with texts as keys, got the key 1",
        ),
        ({"settings": Settings(seed=2**70)}, "settings.seed must be an integer of 64 bits, got a larger one"),
        ({"criterion": None}, "criterion must be a text, got null"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, change, message):
    with pytest.raises(FileError, match=message):
        replace(planted(), **change).save(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_eigenvalues_that_are_none_are_refused(saved):
    record = record_of(saved)
    for values, message in (
        (torch.tensor([float("nan")], dtype=torch.float64), "spectrum 'chosen': .*not finite"),
        (torch.ones(2, 2), "needs a non-empty vector of eigenvalues"),
    ):
        content = save({name: values.clone() for name in record["spectra"]["eps"]})
        record["spectra"]["sha256"] = hashlib.sha256(content).hexdigest()
        (saved / SPECTRA_NAME).write_bytes(content)
        write_record(saved, record)
        with pytest.raises(FileError, match=message):
            Recommendation.load(saved)
    (saved / SPECTRA_NAME).write_bytes(b"no tensors")
    record["spectra"]["sha256"] = hashlib.sha256(b"no tensors").hexdigest()
    write_record(saved, record)
    with pytest.raises(FileError, match="is not a whole safetensors file"):
        Recommendation.load(saved)


def test_spectra_that_are_one_object_are_saved(tmp_path):
    """As when everything is chosen: safetensors refuses tensors that share memory."""
    one = planted().spectra["all"]
    rec = replace(planted(), spectra={"chosen": one, "all": one})
    rec.save(tmp_path)
    assert Recommendation.load(tmp_path) == rec


def test_files_that_cannot_be_read(saved, monkeypatch):
    (saved / SPECTRA_NAME).unlink()
    (saved / SPECTRA_NAME).mkdir()
    with pytest.raises(FileError, match="is missing or not the one saved with"):
        Recommendation.load(saved)
    with pytest.raises(FileError, match="there is no recommendation.json"):
        Recommendation.load(saved / ("x" * 300))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", refuse)
        with pytest.raises(FileError, match="recommendation.json cannot be read .*Permission denied"):
            Recommendation.load(saved)


def test_every_setting_has_a_type_that_files_can_have(saved):
    """A new field of `Settings` is checked by its annotation; one that JSON cannot hold fails here."""
    record = record_of(saved)
    for field in fields(Settings):
        write_record(saved, mutated(record, ("settings", field.name), {"wrong": [object.__name__, {}]}))
        if field.name == "kernels":
            Recommendation.load(saved)
        else:
            with pytest.raises(FileError, match=f"settings.{field.name}"):
                Recommendation.load(saved)
    assert isinstance(planted().spectra["chosen"], Spectrum)
