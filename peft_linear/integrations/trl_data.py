# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Batches of language data as TRL's SFTTrainer makes them, by TRL's own code."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..errors import PeftLinearError
from .language_rows import FIVE_FORMATS, FORMATS, PREPARED, find_format, is_chat, to_trl_rows


logger = logging.get_logger(__name__)

DEFAULT_EXAMPLES = 64
TRL_IS_MISSING = (
    "rows of text or chats are prepared by TRL, which is not installed; install it with pip install "
    "'peft-linear[trl]', or pass batches with input_ids, attention_mask and labels"
)


def language_batches(
    dataset: Any,
    tokenizer: Any,
    args: Any = None,
    *,
    examples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Batches of a dataset's rows with the tokens and labels that `SFTTrainer` would train on.

    TRL prepares the rows: chat template, end token, masks (`completion_only_loss`, `assistant_only_loss`), truncation
    and collator are its own. With `packing` and `padding_free` the sequences of a row are put back into rows of their
    own, padded, because kernels are between examples; their tokens and their loss are the same. With
    `packing_strategy="wrapped"` a row is an example, as it is in training.

    Args:
        dataset: A `datasets.Dataset` (also a stream) or a list of rows, in one of five formats: `messages`; `prompt`
            and `completion`; `text`; `instruction`, `input`, `output` (Alpaca); `conversations` (ShareGPT). Rows with
            `input_ids` are taken as they are.
        tokenizer: Of the model (a processor is taken too); it is not changed.
        args: The `trl.SFTConfig` of the training that is planned, or a dict of its fields that differ from TRL's
            defaults.
        examples: Rows to take: a random sample, or the first of a stream. Default: 64.
        batch_size: Examples in a batch. Default: `args.per_device_train_batch_size`.
        seed: Of the sample.

    Raises:
        PeftLinearError: TRL is not installed; `dataset` is no dataset, or its columns are of none of the formats; a
            completion is empty; the tokenizer is missing, or has no chat template or end token where one is needed;
            truncation leaves no label token in any example.
    """
    trl = require_trl()
    if not isinstance(tokenizer, (PreTrainedTokenizerBase, ProcessorMixin)):
        raise PeftLinearError(
            f"`tokenizer` must be the model's tokenizer, got {type(tokenizer).__name__}; load it with "
            "AutoTokenizer.from_pretrained(...)"
        )
    if examples is not None and examples < 1:
        raise PeftLinearError(f"examples must be at least 1, got {examples}")
    with _left_as_found():
        args = _own_arguments(trl, args)
        rows, numbers = _sampled(dataset, examples or DEFAULT_EXAMPLES, seed)
        rows = _in_trl_format(rows, numbers, tokenizer, args)
        prepared, collate = _prepare(trl, rows, copy.deepcopy(tokenizer), args)
    size = args.per_device_train_batch_size if batch_size is None else batch_size
    if size < 1:
        raise PeftLinearError(f"batch_size must be at least 1, got {size}")
    features, collate = single_examples(list(prepared), collate)
    features = with_label_tokens(features[: examples or DEFAULT_EXAMPLES], collate, args.max_length)
    return [collate(features[start : start + size]) for start in range(0, len(features), size)]


def single_examples(features: Sequence[Mapping[str, Any]], collate: Any) -> tuple[list[Any], Any]:
    """Packed rows cut into their sequences, and a collator that pads what another would put into a single row."""
    if getattr(collate, "padding_free", False):
        collate = replace(collate, padding_free=False)
    if not features or not isinstance(features[0], Mapping) or "seq_lengths" not in features[0]:
        return list(features), collate
    single = []
    for row in features:
        lengths = row["seq_lengths"]
        columns = {name: value for name, value in row.items() if _has_length(value, sum(lengths))}
        ends = np.cumsum(lengths).tolist()
        single += [
            {name: value[start:end] for name, value in columns.items()}
            for start, end in zip([0, *ends], ends, strict=False)
        ]
    return single, collate


def with_label_tokens(features: Sequence[Any], collate: Any, max_length: int | None = None) -> list[Any]:
    """The features that have a token which is predicted and counts in the loss; the first token is never predicted.

    Raises:
        PeftLinearError: there are none.
    """
    kept = [row for row in features if bool((collate([row])["labels"][:, 1:] != -100).any())]
    if not kept:
        raise PeftLinearError(
            f"no label token is left in any of the examples: with max_length={max_length} the prompts alone fill "
            "them, or a mask leaves all tokens out; raise max_length, or choose other examples"
        )
    if len(kept) < len(features):
        logger.warning(
            f"{len(features) - len(kept)} of {len(features)} examples have no label token within max_length and are "
            "left out; they add nothing to the loss in training either."
        )
    return kept


def looks_like_rows(data: Any) -> bool:
    """Whether these are rows of text or chats and not batches of tensors; nothing is taken from an iterator."""
    if isinstance(data, Mapping):
        return bool(data) and _has_splits(data)
    if hasattr(data, "column_names"):
        return True
    first = data[0] if isinstance(data, (list, tuple)) and data else None
    return isinstance(first, Mapping) and find_format(first) in FORMATS


def _has_length(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple, np.ndarray, torch.Tensor)) and len(value) == length


def require_trl() -> Any:
    """The package TRL.

    Raises:
        PeftLinearError: it is not installed.
    """
    try:
        import trl
    except ImportError as error:
        raise PeftLinearError(TRL_IS_MISSING) from error
    return trl


def _own_arguments(trl: Any, args: Any) -> Any:
    """A copy that the preparation may change, without what concerns the model alone."""
    if args is None or isinstance(args, Mapping):
        # among several processes a config joins their group, which must be that of the training's device
        alone = int(os.environ.get("WORLD_SIZE", "1")) <= 1
        return trl.SFTConfig(output_dir="unused", report_to="none", use_cpu=alone, bf16=False, **(args or {}))
    if not isinstance(args, trl.SFTConfig):
        raise PeftLinearError(f"`args` must be a trl.SFTConfig or a dict of its fields, got {type(args).__name__}")
    args = copy.copy(args)
    args.model_init_kwargs = args.gradient_checkpointing_kwargs = None
    args.gradient_checkpointing, args.label_smoothing_factor = False, 0.0
    return args


def _sampled(dataset: Any, count: int, seed: int) -> tuple[Any, list[int]]:
    """Random rows of a dataset, the first of a stream, and their numbers; a `datasets.Dataset` stays one."""
    import datasets

    random_access = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, (Mapping, str)) or not (random_access or isinstance(dataset, Iterable)):
        splits = f" with the splits {', '.join(map(str, dataset))}; pass one of them" if _has_splits(dataset) else ""
        raise PeftLinearError(
            f"expected a dataset (datasets.Dataset, or a list of rows), got {type(dataset).__name__}"
            f"{splits or '; load it with datasets.load_dataset(...)'}"
        )
    if random_access:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        if isinstance(dataset, datasets.Dataset):
            return dataset.select(order).flatten_indices(keep_in_memory=True), order
        rows = [dataset[i] for i in order]
    else:
        rows = list(islice(iter(dataset), count))
        order = list(range(len(rows)))
    for row in rows:
        if not isinstance(row, Mapping) or any(isinstance(v, torch.Tensor) and v.ndim > 1 for v in row.values()):
            what = "batch of tensors" if isinstance(row, Mapping) else type(row).__name__
            raise PeftLinearError(
                f"the dataset holds a {what}, expected rows in one of the five formats: {FIVE_FORMATS}. Batches of "
                "tensors are passed without a tokenizer"
            )
    return rows, order


def _has_splits(dataset: Any) -> bool:
    return isinstance(dataset, Mapping) and all(hasattr(split, "column_names") for split in dataset.values())


def _in_trl_format(rows: Any, numbers: list[int], tokenizer: Any, args: Any) -> Any:
    """The rows as a `datasets.Dataset` that SFTTrainer takes; those that it takes already keep their features."""
    import datasets

    template = bool(tokenizer.chat_template or args.chat_template_path)
    converted = to_trl_rows(rows, template, args.dataset_text_field, numbers)
    if is_chat(converted[0]) and not template:
        raise PeftLinearError(
            "the rows are chats, and the tokenizer has no chat template; take the tokenizer of an instruction-tuned "
            "model, or set tokenizer.chat_template or SFTConfig(chat_template_path=...)"
        )
    found = find_format(rows[0], args.dataset_text_field)
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if found != PREPARED and not is_chat(converted[0]) and not (inner.eos_token or args.eos_token):
        raise PeftLinearError(
            "the tokenizer has no eos_token, which TRL puts at the end of every text; set tokenizer.eos_token or "
            "SFTConfig(eos_token=...)"
        )
    if isinstance(rows, datasets.Dataset) and [dict(row) for row in rows] == converted:
        return rows
    return datasets.Dataset.from_list(converted)


class _Prepared(Exception):
    """Stops the making of a trainer where its data are ready."""

    def __init__(self, dataset: Any, collate: Any) -> None:
        super().__init__()
        self.dataset, self.collate = dataset, collate


def _prepare(trl: Any, rows: Any, tokenizer: Any, args: Any) -> tuple[Any, Any]:
    """What SFTTrainer passes to the Trainer that it extends: the prepared dataset and the collator.

    No Trainer is made, so nothing is moved, patched or reported; the model is a stand-in, as data do not depend on it.
    """
    trainer: Any = trl.SFTTrainer
    base: Any = trainer.__mro__[1]

    class UntilPrepared(base):
        def __init__(self, *, data_collator: Any, train_dataset: Any, **others: Any) -> None:
            raise _Prepared(train_dataset, data_collator)

    class Preparation(trainer, UntilPrepared):
        pass

    sizes: dict[str, Any] = {"hidden_size": 2, "intermediate_size": 2, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes))
    try:
        preparation: Any = Preparation
        preparation(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    except _Prepared as ready:
        return ready.dataset, ready.collate
    except PeftLinearError:
        raise
    except Exception as error:  # of templates, tokenizers and TRL's own checks: a dozen unrelated types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PeftLinearError(
            f"TRL's SFTTrainer cannot prepare these rows: {type(error).__name__}: {reason}"
        ) from error
    raise PeftLinearError(
        f"SFTTrainer of TRL {trl.__version__} prepares its data in a way that is not known here; "
        "pass the batches of trainer.get_train_dataloader()"
    )


@contextmanager
def _left_as_found() -> Iterator[None]:
    """TRL's configs and trainers seed the global generators and set accelerate's global state anew.

    The progress bars of its steps, each of which takes less than a second here, are not shown.
    """
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    generators = random.getstate(), np.random.get_state()
    states = [(kind._shared_state, dict(kind._shared_state)) for kind in (AcceleratorState, PartialState)]
    environment = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        if shown:
            enable_progress_bars()
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        for shared, saved in states:
            shared.clear()
            shared.update(saved)
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        os.environ.update(environment)
