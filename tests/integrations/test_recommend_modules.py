# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`recommend_modules` of a Trainer, of rows with a tokenizer, and of batches: the same kernels, models left alone."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig

from peft_linear import PeftLinearError, Training, language_batches, recommend_modules
from peft_linear.errors import BudgetError
from tests.helpers.callback_runs import peft_bert, rows, trainer_for
from tests.helpers.language import chat_tokenizer, language_model, rows_in, sft_arguments
from tests.helpers.small_models import bert, seeded, t5_generator


pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")
from trl import SFTTrainer


QUICK = {"draws": 1, "progress": False}


def sft_trainer(folder, kind="turns", model=None, adapter=True, data=None, **settings):
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(7)  # early versions of TRL do not seed before they make the adapter
    return SFTTrainer(
        model=model or language_model(),
        args=sft_arguments(folder, **settings),
        train_dataset=data or Dataset.from_list(rows_in(kind)),
        processing_class=chat_tokenizer(),
        peft_config=lora if adapter else None,
    )


def snapshot(model):
    hooks = [(len(m._forward_hooks), len(m._backward_hooks), m.training) for m in model.modules()]
    return {name: p.clone() for name, p in model.named_parameters()}, hooks, model.config.to_dict()


def assert_left_alone(model, before):
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_a_dataset_with_its_tokenizer(kind):
    model, tokenizer = language_model(kind), chat_tokenizer()
    before = snapshot(model)
    found = recommend_modules(model, Dataset.from_list(rows_in("alpaca")), tokenizer=tokenizer, budget=0.125, **QUICK)
    batches = language_batches(rows_in("alpaca"), chat_tokenizer())
    assert found.scores == recommend_modules(model, batches, 0.125, **QUICK).scores
    assert found.settings.output_kind == "log_likelihood" and found.settings.examples == len(rows_in("alpaca"))
    assert_left_alone(model, before)


def test_the_masks_make_a_difference(tmp_path):
    scores = [
        recommend_modules(
            language_model(),
            rows_in("plain"),
            tokenizer=chat_tokenizer(),
            args=sft_arguments(tmp_path, completion_only_loss=only),
            budget=3,
            **QUICK,
        ).scores
        for only in (True, False)
    ]
    assert scores[0] != scores[1]


@pytest.mark.parametrize("adapter", [True, False])
def test_a_trainer_of_trl(adapter, tmp_path):
    settings = {"gradient_accumulation_steps": 3, "learning_rate": 0.01, "max_steps": 7}
    batches = language_batches(rows_in("turns"), chat_tokenizer(), sft_arguments(tmp_path))
    trainer = sft_trainer(tmp_path, adapter=adapter, **settings)
    model = trainer.model
    before = snapshot(model)
    found = recommend_modules(trainer, budget=3, **QUICK)
    plan = Training(batch_size=15, steps=7)  # the rate is recommended, not taken from the Trainer
    lora = {"targets": ["q_proj", "up_proj"], "rank": 2, "lora_alpha": 4} if adapter else {}
    expected = recommend_modules(model, batches, 3, training=plan, **QUICK, **lora)
    assert found.modules == expected.modules and found.settings.rank == (2 if adapter else 8)
    assert [row.score for row in found.scores] == pytest.approx([row.score for row in expected.scores], rel=1e-5)
    assert found.settings.learning_rate == pytest.approx(expected.settings.learning_rate, rel=1e-3)
    assert found.settings.steps == 7
    assert found.settings.train_batch_size == 15 and found.settings.optimizer == "adamw"
    assert_left_alone(model, before)
    trainer.train()


@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 40}, {"padding_free": True, "max_length": None}])
def test_packed_sequences_are_the_examples(settings, tmp_path):
    plain = recommend_modules(sft_trainer(tmp_path / "a"), budget=3, **QUICK)
    packed = recommend_modules(sft_trainer(tmp_path / "b", **settings), budget=3, **QUICK)
    assert packed.settings.examples == plain.settings.examples == len(rows_in("turns"))
    assert packed.modules == plain.modules
    few = recommend_modules(sft_trainer(tmp_path / "b", **settings), budget=3, examples=4, **QUICK)
    assert few.settings.examples == 4


def test_a_stream_and_a_trainer_that_has_trained(tmp_path):
    stream = Dataset.from_list(rows_in("messages")).to_iterable_dataset()
    trainer = sft_trainer(tmp_path, data=stream, max_steps=3)
    before = recommend_modules(trainer, budget=3, examples=6, **QUICK)
    assert before.settings.examples == 6 and before.settings.steps == 3
    trainer.train()
    after = recommend_modules(trainer, budget=3, examples=6, **QUICK)
    assert [row.score for row in after.scores] != [row.score for row in before.scores]


def test_another_trainer(tmp_path):
    trainer = trainer_for(peft_bert(), tmp_path, max_steps=-1, num_train_epochs=5, optim="sgd", learning_rate=0.1)
    found = recommend_modules(trainer, budget=3, examples=12, progress=False)
    assert found.settings.optimizer == "sgd" and found.settings.learning_rate == 0.1
    assert found.settings.steps == 5 * len(rows()) // 4 and found.settings.examples == 12
    given = recommend_modules(trainer, budget=3, examples=12, training=Training(steps=9), progress=False)
    assert given.settings.steps == 9


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None,), {}, BudgetError, "there is no budget; pass one"),
        ((None, 8), {}, PeftLinearError, "there are no data: pass a Trainer, or a model with batches, or"),
        ((rows_in("text"), 8), {}, PeftLinearError, "rows need the model's tokenizer: recommend_modules"),
        ((Dataset.from_list(rows_in("text")), 8), {}, PeftLinearError, "rows need the model's tokenizer"),
        (
            (DatasetDict(a=Dataset.from_list(rows_in("text"))), 8),
            {},
            PeftLinearError,
            "rows need the model's tokenizer",
        ),
        (([{"input_ids": [1, 2]}], 8), {}, PeftLinearError, "batch 0 has no tensor that LlamaForCausalLM takes"),
        ((rows_in("text"), chat_tokenizer(), 8), {}, PeftLinearError, "pass the tokenizer by name"),
        ((rows_in("text"), 8), {"tokenizer": "gpt2"}, PeftLinearError, "must be the model's tokenizer, got str"),
        (
            ([{"input_ids": torch.ones(2, 3)}], 8),
            {"examples": 3},
            PeftLinearError,
            "args, examples and batch_size are for rows with a tokenizer",
        ),
    ],
)
def test_calls_that_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        recommend_modules(language_model(), *arguments, **options)


def test_models_that_rows_are_not_for():
    for model in (seeded(bert), seeded(t5_generator)):
        with pytest.raises(
            PeftLinearError, match=f"{type(model).__name__} is no causal language model, for which rows"
        ):
            recommend_modules(model, rows_in("text"), 8, tokenizer=chat_tokenizer())
    model = language_model()
    model.resize_token_embeddings(20)
    with pytest.raises(PeftLinearError, match=r"gives the token id \d+, and LlamaForCausalLM has 20 embeddings"):
        recommend_modules(model, rows_in("text"), 8, tokenizer=chat_tokenizer())


def test_a_trainer_brings_its_own(tmp_path):
    trainer = sft_trainer(tmp_path)
    for extra in ({"batches": rows_in("text")}, {"tokenizer": chat_tokenizer()}, {"args": trainer.args}):
        with pytest.raises(PeftLinearError, match="a Trainer brings its data, tokenizer and arguments"):
            recommend_modules(trainer, budget=3, **extra)
