# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which keys of a batch a model takes, as in training."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftLinearError
from .targets import base_model


# What tokenizers, processors and collators of transformers make, for models that pass **kwargs on to a part of them.
MODEL_INPUTS = frozenset(
    {
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "global_attention_mask"),
        *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "mm_token_type_ids"),
        *("pixel_values", "pixel_mask", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes"),
        *("input_features", "input_values", "cache_position"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    }
)


def accepted_keys(model: nn.Module) -> Callable[[str, Any], bool]:
    """Whether the model's `forward` takes a key with a value.

    Where it takes any keyword: those that its annotation lists (`Unpack`) and the inputs of transformers' models for
    a model of transformers itself, all tensors and numbers for other models.
    """
    forward = base_model(model).forward
    parameters = inspect.signature(forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    rest = next((p for p in parameters if p.kind == p.VAR_KEYWORD), None)
    if rest is None:
        return lambda key, value: not named or key in named
    listed = _listed(forward, rest) | MODEL_INPUTS
    if type(base_model(model)).__module__.partition(".")[0] == "transformers":
        return lambda key, value: key in named or (key in listed and value is not None)
    return lambda key, value: key in named or key in listed or isinstance(value, (Tensor, Number))


def copied(value: Any, keep: bool = False) -> Any:
    """`value` with its tensors copied, those in lists and dicts too; with `keep` those of inference mode only."""
    if isinstance(value, Tensor):
        if keep and not value.is_inference():
            return value
        with torch.inference_mode(False):
            return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: copied(inner, keep) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(inner, keep) for inner in value)
    return value


def nothing_taken(
    model: nn.Module, raw: Mapping[str, Any], number: int, missing: str | None = None
) -> PeftLinearError:
    """The error for a batch whose keys are not what the model takes; `missing`: what python says about the call."""
    root = base_model(model)
    names = [name for name in inspect.signature(root.forward).parameters if name != "self"]
    kind = type(root).__name__
    if any(isinstance(value, Tensor) and value.ndim for value in raw.values()):
        advice = (
            f"the forward of {kind} takes {', '.join(names)}: name the keys so, or, where it takes one dict, wrap it "
            "in a module whose forward takes the tensors by name"
        )
    else:
        advice = "call the tokenizer with return_tensors='pt'"
    wrong = f"has no tensor that {kind} takes" if missing is None else f"is not what {kind} takes ({missing})"
    return PeftLinearError(f"batch {number} {wrong}; its keys are {', '.join(map(str, raw))}. {advice}")


def _listed(forward: Any, rest: inspect.Parameter) -> set[str]:
    """The keys of a TypedDict that annotates **kwargs."""
    annotation = rest.annotation
    if isinstance(annotation, str):
        try:
            annotation = typing.get_type_hints(inspect.unwrap(forward)).get(rest.name)
        except Exception:  # names that exist for type checkers alone
            return set()
    names: set[str] = set()
    for argument in typing.get_args(annotation):
        names |= set(getattr(argument, "__annotations__", {}))
    return names
