# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The two files of a recommendation: recommendation.json, and the eigenvalues in spectra.safetensors.

The JSON is written last and holds a checksum of each, so what was changed since, and a pair that does not belong
together, is refused. Formats 1 and 2 of earlier versions hold none of the JSON itself; their types are checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..errors import FileError
from ..files import write_bytes, write_text
from ..functional.spectrum import Spectrum
from ..schema import Place, as_json, check_same, json_digest, read_as, read_json, shortened, shown
from .values import ModuleScore, OptionScore, Settings


FORMAT = "peft_linear.Recommendation/3"
EARLIER = ("peft_linear.Recommendation/1", "peft_linear.Recommendation/2")
JSON_NAME = "recommendation.json"
SPECTRA_NAME = "spectra.safetensors"
_REMEDY = "save the recommendation again"


class _SpectraRecord(TypedDict):
    file: str
    sha256: str
    eps: Mapping[str, float]


class _LaterRecord(TypedDict, total=False):  # what files of earlier versions lack
    module_ranks: Mapping[str, int]
    learning_rate: float | None
    learning_rate_interval: tuple[float, float] | None
    options: tuple[OptionScore, ...]


class _EarlierRecord(_LaterRecord):
    format: str
    modules: tuple[str, ...]
    scores: tuple[ModuleScore, ...]
    predicted: Mapping[str, float | Mapping[str, float]]
    criterion: str
    budget: int | float | str | tuple[int | float | str, ...]
    ridge: float | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    spectra: _SpectraRecord


class _Record(_EarlierRecord):
    sha256: str  # of everything else


def write_recommendation(
    directory: str | os.PathLike, values: Mapping[str, Any], spectra: Mapping[str, Spectrum]
) -> None:
    """Writes the files; `values` are all fields but the spectra, with scores and settings as mappings.

    Raises:
        FileError: a value is of a type that could not be read again, or the folder cannot be written.
    """
    folder = Path(directory)
    place = Place(os.fspath(folder / JSON_NAME), "make the recommendation with values of the documented types")
    content = save_tensors({name: s.eigenvalues.clone() for name, s in spectra.items()}, {"format": FORMAT})
    about = {
        "file": SPECTRA_NAME,
        "sha256": hashlib.sha256(content).hexdigest(),
        "eps": {name: spectrum.eps for name, spectrum in spectra.items()},
    }
    record = as_json({"format": FORMAT, **values, "spectra": about}, place)
    record["sha256"] = json_digest(record)
    _read_record(record, place)
    text = json.dumps(record, indent=2, ensure_ascii=not _is_unicode(record), allow_nan=False)
    write_bytes(folder / SPECTRA_NAME, content)
    write_text(folder / JSON_NAME, text + "\n")


def read_recommendation(directory: str | os.PathLike) -> dict[str, Any]:
    """The fields of the recommendation in a folder.

    Raises:
        FileError: there is none, it is damaged, or its two files do not belong together.
    """
    path = Path(directory) / JSON_NAME
    place = Place(os.fspath(path), _REMEDY)
    if not os.path.isfile(path):
        raise FileError(f"there is no {JSON_NAME} in {os.fspath(directory)!r}; pass the folder given to save")
    record = read_json(path, place)
    values = _read_record(record, place)
    if values.pop("format") == FORMAT:
        check_same(values.pop("sha256"), json_digest({k: v for k, v in record.items() if k != "sha256"}), place)
    values["spectra"] = _read_spectra(path.with_name(SPECTRA_NAME), values["spectra"], place)
    return values


def _read_record(record: Any, place: Place) -> dict[str, Any]:
    found = record.get("format") if isinstance(record, dict) else None
    if not isinstance(found, str) or found not in (FORMAT, *EARLIER):
        holds = shown(found) if found is not None or isinstance(record, dict) else shown(record)
        raise FileError(f"{place.file} holds {holds}, expected the format {FORMAT!r}; {place.remedy}")
    values = read_as(_Record if found == FORMAT else _EarlierRecord, record, place)
    values["settings"] = Settings.from_json(values["settings"], place.at("settings"))
    return values


def _read_spectra(path: Path, about: _SpectraRecord, place: Place) -> dict[str, Spectrum]:
    if about["file"] != SPECTRA_NAME:
        raise place.at("spectra").at("file").error(f"{SPECTRA_NAME!r}", shown(about["file"]))
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error}); {place.remedy}") from error
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise FileError(f"{path} is missing or not the one saved with {JSON_NAME}; {place.remedy}")
    try:
        tensors = load_tensors(content)
    except SafetensorError as error:
        raise FileError(f"{path} is not a whole safetensors file: {error}; {place.remedy}") from error
    if set(tensors) != set(about["eps"]):
        got = shortened(", ".join(sorted(about["eps"])))
        raise place.at("spectra").at("eps").error(f"of the spectra {', '.join(sorted(tensors))}", got or "none")
    return {name: _spectrum(tensors[name], eps, place.at(name)) for name, eps in about["eps"].items()}


def _spectrum(eigenvalues: Tensor, eps: float, place: Place) -> Spectrum:
    try:
        return Spectrum(eigenvalues, eps=eps)
    except ValueError as error:
        raise FileError(f"{place.file}: spectrum {place.keys!r}: {error}; {place.remedy}") from error


def _is_unicode(record: Any) -> bool:
    """Whether all texts can be written as UTF-8: halves of surrogate pairs cannot, they are written as escapes."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
