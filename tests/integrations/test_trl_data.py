# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Batches of language data: equal to those of SFTTrainer's own DataLoader, with everything else left as it was."""

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, are_progress_bars_disabled

from peft_linear import PeftLinearError, language_batches
from peft_linear.integrations.trl_data import single_examples
from tests.helpers.language import FORMATS, TRL_KIND, chat_tokenizer, language_model, rows_in, sft_arguments, turn


pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")
from trl import SFTTrainer


def trainer_batches(rows, tokenizer, arguments, model=None):
    """What SFTTrainer trains on, in the order of the rows."""
    trainer = SFTTrainer(
        model=model or language_model(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return list(trainer.get_train_dataloader())


def sample_of(rows, seed=0):
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order]


def assert_equal_batches(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) == set(theirs)
        for key, value in ours.items():
            assert torch.equal(value, theirs[key].cpu()), key


VARIANTS = {
    "default": {},
    "short": {"max_length": 11},
    "all tokens": {"completion_only_loss": False},
    "rounded": {"pad_to_multiple_of": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_batches_are_those_of_sft_trainer(kind, variant, tmp_path):
    arguments = sft_arguments(tmp_path, **VARIANTS[variant])
    found = language_batches(Dataset.from_list(rows_in(kind)), chat_tokenizer(), arguments)
    expected = trainer_batches(sample_of(rows_in(TRL_KIND.get(kind, kind))), chat_tokenizer(), arguments)
    assert_equal_batches(found, expected)
    masked = kind in ("plain", "turns", "alpaca") and variant != "all tokens"
    assert bool((found[0]["labels"][:, 1] == -100).all()) == masked  # the masks differ, so the test can fail


@pytest.mark.parametrize("kind", ["messages", "sharegpt", "turns"])
def test_the_assistants_tokens_alone(kind, tmp_path):
    arguments = sft_arguments(tmp_path, assistant_only_loss=True)
    found = language_batches(rows_in(kind), chat_tokenizer(), arguments)
    rows = sample_of(rows_in(TRL_KIND.get(kind, kind)))
    assert_equal_batches(found, trainer_batches(rows, chat_tokenizer(), arguments))
    assert bool((found[0]["labels"][:, :3] == -100).all())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_the_model_does_not_matter(kind, tmp_path):
    arguments = sft_arguments(tmp_path)
    expected = trainer_batches(sample_of(rows_in("turns")), chat_tokenizer(), arguments, language_model(kind))
    assert_equal_batches(language_batches(rows_in("turns"), chat_tokenizer(), arguments), expected)


def test_the_pad_token_that_trl_would_choose(tmp_path):
    tokenizer = chat_tokenizer(pad_token=None)
    arguments = sft_arguments(tmp_path)
    found = language_batches(rows_in("plain"), tokenizer, arguments)
    assert tokenizer.pad_token is None
    assert_equal_batches(found, trainer_batches(sample_of(rows_in("plain")), tokenizer, arguments))


def token_loss(model, batches):
    """Summed over the label tokens of all batches, as the model computes it."""
    total = 0.0
    for batch in batches:
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch, use_cache=False).loss) * count  # as TRL calls it
    return total


@pytest.mark.parametrize(
    "settings",
    [{"packing": True, "max_length": 40}, {"padding_free": True, "max_length": None}],
    ids=["packing", "padding_free"],
)
@pytest.mark.parametrize("kind", ["messages", "plain", "text"])
def test_packed_sequences_are_examples_of_the_same_loss(kind, settings, tmp_path):
    arguments = sft_arguments(tmp_path, **settings)
    found = language_batches(rows_in(kind), chat_tokenizer(), arguments)
    assert sum(len(batch["input_ids"]) for batch in found) == len(rows_in(kind))
    plain = language_batches(rows_in(kind), chat_tokenizer(), sft_arguments(tmp_path))
    rows = [
        sorted(
            ids[mask.bool()].tolist()
            for b in part
            for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        )
        for part in (found, plain)
    ]
    assert rows[0] == rows[1]
    model = language_model(dtype=torch.float64)
    packed = trainer_batches(sample_of(rows_in(kind)), chat_tokenizer(), arguments)
    if any("position_ids" not in b or bool((b["labels"][b["position_ids"] == 0] != -100).any()) for b in packed):
        return  # early versions of TRL predict the first token of a sequence from the sequence before
    with torch.no_grad():
        flat = token_loss(model, packed)
        assert token_loss(model, found) == pytest.approx(flat, rel=1e-6)  # the loss is in float32


def test_wrapped_rows_stay_whole(tmp_path):
    arguments = sft_arguments(tmp_path, packing=True, packing_strategy="wrapped", max_length=16)
    found = language_batches(rows_in("messages"), chat_tokenizer(), arguments)
    assert_equal_batches(found, trainer_batches(sample_of(rows_in("messages")), chat_tokenizer(), arguments))


def test_rows_are_cut_at_their_lengths():
    packed = [{"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5], "seq_lengths": [2, 3]}]
    single, _ = single_examples(packed, None)
    assert single == [
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]},
    ]


def test_samples_streams_and_prepared_rows(tmp_path):
    data = Dataset.from_list(rows_in("text"))
    (batch,) = language_batches(data, chat_tokenizer(), examples=4, batch_size=8, seed=3)
    (expected,) = language_batches(sample_of(rows_in("text"), seed=3)[:4], chat_tokenizer(), batch_size=8)
    assert sorted(map(sum, batch["input_ids"].tolist())) == sorted(map(sum, expected["input_ids"].tolist()))
    (first,) = language_batches(data.to_iterable_dataset(), chat_tokenizer(), examples=3)
    for ids, row in zip(first["input_ids"], rows_in("text"), strict=False):
        assert ids[ids > 0].tolist() == chat_tokenizer()(row["text"] + " <eos>")["input_ids"]
    prepared = [{"input_ids": [9, 10, 11], "labels": [-100, 10, 11]}] * 2
    (batch,) = language_batches(prepared, chat_tokenizer())
    assert batch["labels"].tolist() == [[-100, 10, 11]] * 2


def test_rows_without_label_tokens_are_left_out(caplog):
    from trl import SFTConfig

    long, short = {"prompt": "w1 " * 30, "completion": " w2"}, {"prompt": "w1", "completion": " w2"}
    arguments = SFTConfig(output_dir="x", max_length=8, use_cpu=True, bf16=False, report_to="none")
    (batch,) = language_batches([long, short], chat_tokenizer(), arguments)
    assert batch["input_ids"].tolist() == [[9, 10, 1]]
    with pytest.raises(PeftLinearError, match="no label token is left in any of the examples: with max_length=8"):
        language_batches([long, long], chat_tokenizer(), arguments)


def test_everything_is_left_as_it_was(tmp_path):
    tokenizer, rows = chat_tokenizer(pad_token=None), rows_in("turns")
    arguments = sft_arguments(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    accelerator = Accelerator(cpu=True)
    before = dict(arguments.to_dict()), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    state = dict(accelerator.state.__dict__)
    bars = are_progress_bars_disabled()
    language_batches(rows, tokenizer, arguments)
    language_batches(rows, tokenizer)
    assert arguments.to_dict() == before[0] and rows == rows_in("turns") and tokenizer.pad_token is None
    assert torch.equal(torch.get_rng_state(), before[1]) and random.getstate() == before[2]
    assert np.array_equal(np.random.get_state()[1], before[3])
    assert are_progress_bars_disabled() == bars
    assert accelerator.state.__dict__ == state and accelerator.device.type == "cpu"


@pytest.mark.parametrize(
    ("data", "tokenizer", "options", "message"),
    [
        (rows_in("text"), None, {}, "`tokenizer` must be the model's tokenizer, got NoneType"),
        ("rows.jsonl", chat_tokenizer(), {}, "expected a dataset .*, got str; load it with datasets.load_dataset"),
        (3, chat_tokenizer(), {}, "expected a dataset .*, got int"),
        (None, chat_tokenizer(), {}, "expected a dataset .*, got NoneType"),
        (
            DatasetDict(train=Dataset.from_list(rows_in("text"))),
            chat_tokenizer(),
            {},
            "got DatasetDict with the splits train; pass one of them",
        ),
        (["a"], chat_tokenizer(), {}, "the dataset holds a str, expected rows in one of the five formats"),
        ([{"input_ids": torch.ones(2, 3)}], chat_tokenizer(), {}, "holds a batch of tensors, expected rows"),
        ([], chat_tokenizer(), {}, "the dataset has no rows"),
        (rows_in("text"), chat_tokenizer(), {"examples": 0}, "examples must be at least 1, got 0"),
        (rows_in("text"), chat_tokenizer(), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            rows_in("text"),
            chat_tokenizer(),
            {"args": 3},
            "`args` must be a trl.SFTConfig or a dict of its fields, got int",
        ),
        (rows_in("messages"), chat_tokenizer(None), {}, "the rows are chats, and the tokenizer has no chat template"),
        (rows_in("text"), chat_tokenizer(eos_token=None), {}, "the tokenizer has no eos_token"),
        (
            rows_in("messages"),
            chat_tokenizer("{{ raise_exception('roles must alternate') }}"),
            {},
            "TRL's SFTTrainer cannot prepare these rows: TemplateError: roles must alternate",
        ),
        ([{"id": 3, "body": "a"}], chat_tokenizer(), {}, "the columns id, body are in none of the five formats"),
    ],
)
def test_what_is_refused(data, tokenizer, options, message):
    with pytest.raises(PeftLinearError, match=message):
        language_batches(data, tokenizer, **options)


def test_without_trl(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(
        PeftLinearError, match=r"TRL, which is not installed; install it with pip install 'peft-linear\[trl\]'"
    ):
        language_batches(rows_in("text"), chat_tokenizer())


def test_a_trainer_that_is_made_in_another_way(monkeypatch):
    import trl

    class Other(trl.SFTTrainer.__mro__[1]):
        def __init__(self, **others):
            pass

    monkeypatch.setattr(trl, "SFTTrainer", Other)
    with pytest.raises(PeftLinearError, match="prepares? .*; pass the batches of trainer.get_train_dataloader"):
        language_batches([{"messages": [turn("user", "w1")]}], chat_tokenizer())
