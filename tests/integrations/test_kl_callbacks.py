# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A budget of KL in a Trainer and in TRL, and KL as a term of the loss, whatever the loss and its accumulation."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_linear import (
    KlToBaseCallback,
    PeftLinearError,
    ProximalCallback,
    ProximalLoraConfig,
    kl_to_base,
    kl_to_base_loss,
    proximal_distance,
)
from tests.helpers.language import chat_tokenizer, language_model, words
from tests.helpers.reference_proximal import lora_parameters


OPTIONS = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
TEXTS = [words(i, 8) for i in range(12)]


def adapted(dtype=torch.float32, plain=False, **options):
    base = language_model(dtype=dtype)
    torch.manual_seed(1)
    config = LoraConfig(**OPTIONS) if plain else ProximalLoraConfig(**OPTIONS, **options)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def rows(count=48, length=10):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 40, (count, length), generator=generator).sort(dim=1).values
    return [{"input_ids": row, "labels": row} for row in ids]


def fit(model, folder, callbacks=(), resume=None, cls=Trainer, **settings):
    defaults = {"max_steps": 40, "learning_rate": 0.02, "per_device_train_batch_size": 4, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, seed=5, disable_tqdm=True, logging_steps=2,
        **defaults | settings,
    )  # fmt: skip
    trainer = cls(
        model=model, args=arguments, train_dataset=rows(), processing_class=chat_tokenizer(), callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Tracker(TrainerCallback):
    """Stands before all callbacks that the user passes, as those of `report_to` do."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def held_out(model, texts):
    return kl_to_base(model, texts, tokenizer=chat_tokenizer())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("space", ["delta", "function"])
def test_a_trainer_ends_at_its_budget(tmp_path, space, accumulation):
    free = adapted(proximal_lambda=0.0)
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    fit(free, tmp_path, **settings)
    texts = TEXTS if space == "delta" else TEXTS[1::2]
    target = 0.3 * held_out(free, texts)
    model, tracker = adapted(proximal_space=space), Tracker()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the run ends at")
        trainer = fit(model, tmp_path, [tracker, ProximalCallback(TEXTS, target)], **settings)
    assert held_out(model, texts) == pytest.approx(target, rel=0.2)
    logged = [entry for entry in trainer.state.log_history if "kl_to_base" in entry]
    assert [entry["step"] for entry in logged] == [*range(3, 40, 3), 40]
    assert logged[-1]["kl_to_base"] == pytest.approx(held_out(model, texts), rel=1e-6)
    assert [entry["kl_to_base"] for entry in tracker.seen if "kl_to_base" in entry] == [
        entry["kl_to_base"] for entry in logged
    ]
    assert all("proximal_lambda" in entry for entry in tracker.seen if "loss" in entry)
    if space == "function":
        assert proximal_distance(model, space="function") > 0


def test_a_run_that_stops_early_is_measured_and_says_if_it_missed(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8

    model = adapted(proximal_space="delta")
    with pytest.warns(UserWarning, match="the run ends at a KL of"):
        trainer = fit(model, tmp_path, [ProximalCallback(TEXTS, 100.0), Stop()])
    last = [entry for entry in trainer.state.log_history if "kl_to_base" in entry][-1]
    assert last["step"] == 8
    assert last["kl_to_base"] == pytest.approx(held_out(model, TEXTS), rel=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 10, "max_steps": 30}
    whole = adapted(proximal_space="function")
    fit(whole, tmp_path, [ProximalCallback(TEXTS, 0.05)], **settings)
    resumed = adapted(proximal_space="function")
    fit(resumed, tmp_path / "other", [ProximalCallback(TEXTS, 0.05)], tmp_path / "checkpoint-10", **settings)
    for name, parameter in lora_parameters(whole).items():
        assert torch.equal(parameter, lora_parameters(resumed)[name])


def test_a_reference_alone_is_measured_and_changes_nothing(tmp_path):
    quiet, watched = adapted(proximal_lambda=1.0), adapted(proximal_lambda=1.0)
    fit(quiet, tmp_path)
    trainer = fit(watched, tmp_path, [ProximalCallback(reference=TEXTS)])
    for name, parameter in lora_parameters(quiet).items():
        assert torch.equal(parameter, lora_parameters(watched)[name])
    last = [entry for entry in trainer.state.log_history if "kl_to_base" in entry][-1]
    assert last["step"] == 40
    assert last["kl_to_base"] == pytest.approx(held_out(watched, TEXTS), rel=1e-6)


def test_what_the_callback_cannot_do_is_refused(tmp_path):
    with pytest.raises(PeftLinearError, match="target_kl needs reference="):
        ProximalCallback(target_kl=0.05)
    with pytest.raises(PeftLinearError, match="target_kl must be a finite number of nats"):
        ProximalCallback(TEXTS, target_kl=-1)
    with pytest.raises(PeftLinearError, match="the reference is one text"):
        ProximalCallback("a text")
    with pytest.raises(PeftLinearError, match="the reference is empty"):
        ProximalCallback([])
    with pytest.raises(PeftLinearError, match="needs a reference of at least two texts"):
        fit(adapted(proximal_space="function"), tmp_path, [ProximalCallback(TEXTS[:1])])
    with pytest.raises(PeftLinearError, match="ProximalLoRA"):
        fit(adapted(plain=True), tmp_path, [ProximalCallback(TEXTS)])


# --- KL as a term of the loss -------------------------------------------------------------------------------------


def by_hand(model, batches, reference, weight, rate, steps):
    """AdamW on loss + weight·KL, the order of the reference batches as the callback's."""
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    for step in range(steps):
        passes, place = divmod(step, len(reference))
        order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(passes))
        loss = model(**batches[step]).loss + weight * kl_to_base_loss(model, reference[int(order[place])])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("plain", [True, False])
def test_the_term_is_added_once_a_step(tmp_path, plain, accumulation):
    tokenizer = chat_tokenizer()
    reference = [
        dict(tokenizer(TEXTS[start : start + 3], padding=True, return_tensors="pt")) for start in range(0, 12, 3)
    ]
    made = {"dtype": torch.float64, "plain": plain} | ({} if plain else {"proximal_lambda": 0.0})
    expected = adapted(**made)
    data = rows()
    batches = [
        {key: torch.stack([row[key] for row in data[first : first + 4]]) for key in data[0]}
        for first in range(0, 24, 4)
    ]
    by_hand(expected, batches, reference, 2.0, 0.02, 6)
    model = adapted(**made)
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    settings |= {"max_steps": 6, "weight_decay": 0.0}
    trainer = fit(model, tmp_path, [KlToBaseCallback(TEXTS, 2.0, batch_size=3)], cls=InOrder, **settings)
    for name, parameter in lora_parameters(expected).items():
        torch.testing.assert_close(lora_parameters(model)[name], parameter, rtol=1e-10, atol=1e-12)
    logged = [entry["kl_to_base_loss"] for entry in trainer.state.log_history if "kl_to_base_loss" in entry]
    assert len(logged) == 3 and min(logged) > 0


def test_label_smoothing_leaves_the_term_as_it_is(tmp_path):
    """What smoothing changes is the same with and without the term, to first order in a step of gradient descent."""
    ends = {}
    for smoothing in (0.0, 0.1):
        for weight in (None, 1e4):
            model = adapted(torch.float64, plain=True)
            with torch.no_grad():
                for name, parameter in lora_parameters(model).items():
                    if "lora_B" in name:
                        parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
            callbacks = [] if weight is None else [KlToBaseCallback(TEXTS, weight, 12)]
            fit(
                model, tmp_path, callbacks, max_steps=1, optim="sgd", learning_rate=1e-6, max_grad_norm=0.0,
                label_smoothing_factor=smoothing, lr_scheduler_type="constant",
            )  # fmt: skip
            ends[smoothing, weight] = torch.cat([p.detach().flatten() for p in lora_parameters(model).values()])
    plain = ends[0.0, 1e4] - ends[0.0, None]
    smooth = ends[0.1, 1e4] - ends[0.1, None]
    assert plain.norm() > 0
    torch.testing.assert_close(smooth, plain, rtol=1e-8, atol=1e-14)


def test_it_holds_a_model_near_its_base_and_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    ends = []
    for callbacks in ([], [KlToBaseCallback(TEXTS, 50.0)]):
        model = adapted(plain=True)
        fit(model, tmp_path, callbacks, save_strategy="steps", save_steps=20)
        ends.append(held_out(model, TEXTS))
    assert ends[1] < 0.3 * ends[0]
    resumed = adapted(plain=True)
    fit(resumed, tmp_path / "other", [KlToBaseCallback(TEXTS, 50.0)], tmp_path / "checkpoint-20")
    for name, parameter in lora_parameters(model).items():
        assert torch.equal(parameter, lora_parameters(resumed)[name])


def test_what_the_term_cannot_do_is_refused(tmp_path):
    for arguments, message in (
        ({"weight": 0}, "weight must be a finite number > 0"),
        ({"weight": True}, "weight must be a finite number > 0"),
        ({"batch_size": 0}, "batch_size must be a positive number"),
    ):
        with pytest.raises(PeftLinearError, match=message):
            KlToBaseCallback(TEXTS, **arguments)
    with pytest.raises(PeftLinearError, match="the model has no adapter"):
        fit(language_model(), tmp_path, [KlToBaseCallback(TEXTS)])


def test_supervised_fine_tuning_with_trl(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")
    from datasets import Dataset

    data = Dataset.from_list([{"text": words(row, 6)} for row in range(32)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=40, bf16=False,
        learning_rate=0.02, per_device_train_batch_size=4, save_strategy="no", packing=True, max_length=16,
        packing_strategy="wrapped", gradient_checkpointing=False,
    )  # fmt: skip
    config = ProximalLoraConfig(**OPTIONS, proximal_space="function")
    callback = ProximalCallback(TEXTS, 0.02)
    trainer = trl.SFTTrainer(
        model=language_model(), args=arguments, train_dataset=data, processing_class=chat_tokenizer(),
        peft_config=config, callbacks=[callback, KlToBaseCallback(TEXTS[1::2], 0.1)],
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "kl_to_base" in entry]
    assert logged[-1]["kl_to_base"] == pytest.approx(held_out(trainer.model, TEXTS[1::2]), rel=1e-5)
    assert logged[-1]["kl_to_base"] <= 0.024
