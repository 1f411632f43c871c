# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The term under the Hugging Face Trainer and accelerate, against callbacks that do it by hand on plain LoRA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_linear.errors import PeftLinearError
from peft_linear.integrations.callbacks import ProximalCallback
from peft_linear.proximal import attach_proximal, proximal_distance, proximal_firing_rate
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from tests.helpers import small_models
from tests.helpers.function_space import metric, statistics, with_reference
from tests.helpers.reference_callback import ByHand
from tests.helpers.reference_proximal import ReferenceProximal, lora_parameters


OPTIONS = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"}
LAMBDA = 3.0


def rows(count=24):
    torch.manual_seed(3)
    return [
        {"input_ids": torch.randint(1, small_models.VOCABULARY, (6,)), "labels": torch.randint(0, 3, ()).item()}
        for _ in range(count)
    ]


def adapted(config, seed=1):
    torch.manual_seed(0)
    base = small_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    torch.manual_seed(seed)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def proximal(seed=1, **kwargs):
    return with_reference(adapted(ProximalLoraConfig(proximal_lambda=LAMBDA, **OPTIONS, **kwargs), seed))


class OwnLoss(Trainer):
    """A loss that is computed outside the model and is not `outputs.loss`."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        return (model(**inputs).logits.square().mean(-1) * (1 + labels)).mean()


def fit(model, folder, callbacks=(), cls=Trainer, resume=None, **kwargs):
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 0.02, "max_grad_norm": 0.5}
    settings["save_strategy"] = "no"
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        seed=5,
        disable_tqdm=True,
        logging_steps=1,
        **settings | kwargs,
    )
    trainer = cls(model=model, args=arguments, train_dataset=rows(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(model, other):
    for (name, a), b in zip(lora_parameters(model).items(), lora_parameters(other).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 4, "label_smoothing_factor": 0.2},
        {"max_grad_norm": 0.01},
        {"optim": "sgd", "learning_rate": 0.5},
        {"cls": OwnLoss, "gradient_accumulation_steps": 4},
    ],
    ids=lambda settings: "-".join(map(str, settings)) or "plain",
)
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"selective": True},
        {"space": "delta"},
        {"mode": "coupled"},
        {"space": "delta", "mode": "coupled", "selective": True},
        {"space": "function"},
        {"space": "function", "mode": "coupled", "selective": True},
    ],
    ids=lambda variant: str(variant or "default"),
)
def test_the_trainer_trains_what_the_reference_trains(tmp_path, settings, variant):
    plain = adapted(LoraConfig(**OPTIONS))
    model = proximal(**{f"proximal_{key}": value for key, value in variant.items()})
    by_hand = ByHand(lam=LAMBDA, scaling=2.0, metric=metric(statistics(model)), **variant)
    fit(plain, tmp_path, [by_hand], **settings)
    fit(model, tmp_path, **settings)
    assert_same(model, plain)
    fired = by_hand.fired
    assert len(fired) == 12 // settings.get("gradient_accumulation_steps", 1)
    assert proximal_firing_rate(model) == pytest.approx(sum(fired) / len(fired))


def test_the_callback_adds_to_the_logs_and_lambda_zero_logs_nothing_removed(tmp_path):
    model = proximal(proximal_selective=False)
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = fit(model, tmp_path, [ProximalCallback(), Tracker()])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 12
    for entry, tracked in zip(logged, seen, strict=False):
        keys = {"proximal_distance", "proximal_distance_delta", "proximal_exponent", "proximal_removed_share"}
        assert keys <= set(entry) and keys <= set(tracked)
        assert all(isinstance(entry[key], float) and math.isfinite(entry[key]) for key in keys)
        assert "proximal_firing_rate" not in entry  # which says nothing where the term always acts
        assert entry["proximal_removed_share"] == pytest.approx(1 - math.exp(-entry["proximal_exponent"]))
    rates = [0.02 * (1 - step / 12) for step in range(12)]
    assert [entry["proximal_exponent"] for entry in logged] == pytest.approx(LAMBDA * np.cumsum(rates))
    assert logged[-1]["proximal_distance"] == pytest.approx(proximal_distance(model, space="factors"))
    assert logged[-1]["proximal_distance_delta"] == pytest.approx(proximal_distance(model, space="delta"))
    assert logged[-1]["proximal_distance"] > logged[0]["proximal_distance"] > 0

    off = adapted(ProximalLoraConfig(proximal_lambda=0.0, **OPTIONS))
    trainer = fit(off, tmp_path, [ProximalCallback()], max_steps=2)
    assert "proximal_distance" in trainer.state.log_history[0]
    assert "proximal_exponent" not in trainer.state.log_history[0]


def test_the_callback_omits_the_weight_distance_where_it_is_not_defined(tmp_path):
    trainer = fit(proximal(use_dora=True), tmp_path, [ProximalCallback()], max_steps=1)
    assert "proximal_distance" in trainer.state.log_history[0]
    assert "proximal_distance_delta" not in trainer.state.log_history[0]


def test_the_callback_refuses_plain_lora_before_the_first_step(tmp_path):
    with pytest.raises(PeftLinearError, match="has no active ProximalLoRA adapter"):
        fit(adapted(LoraConfig(**OPTIONS)), tmp_path, [ProximalCallback()])


def test_resuming_in_another_process_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    """The model that resumes was made with another random A, so the anchor must come from the checkpoint."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    whole, killed = proximal(proximal_selective=False), proximal(proximal_selective=False)
    fit(whole, tmp_path / "whole", gradient_accumulation_steps=2)
    saving = {"save_strategy": "steps", "save_steps": 3}
    fit(killed, tmp_path / "run", [Stop()], gradient_accumulation_steps=2, **saving)
    other = proximal(seed=99, proximal_selective=False)
    assert not torch.equal(*(next(iter(lora_parameters(m).values())) for m in (other, killed)))
    fit(other, tmp_path / "again", gradient_accumulation_steps=2, resume=str(tmp_path / "run" / "checkpoint-3"))
    for a, b in zip(lora_parameters(other).values(), lora_parameters(whole).values(), strict=True):
        assert torch.equal(a, b)
    assert proximal_distance(other) == proximal_distance(whole)


@pytest.mark.parametrize("selective", [True, False])
def test_accelerate_with_accumulation_and_clipping_trains_what_the_reference_trains(selective):
    plain, model = adapted(LoraConfig(**OPTIONS)), proximal(proximal_selective=selective)
    reference = ReferenceProximal(plain, lam=LAMBDA, scaling=2.0, selective=selective)
    for each, by_hand in ((plain, reference), (model, None)):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.02)
        loader = torch.utils.data.DataLoader(rows(), batch_size=2)
        wrapped, optimizer, loader = accelerator.prepare(each, optimizer, loader)
        if by_hand is None:
            attach_proximal(each, optimizer)  # not needed, and without effect
        for batch in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(each.parameters(), 0.3)
                    if by_hand:
                        by_hand.before_step()
                optimizer.step()
                if accelerator.sync_gradients and by_hand:
                    by_hand.after_step(by_hand.rates(optimizer))
                optimizer.zero_grad()
    assert_same(model, plain)


def test_continued_training_pulls_toward_the_pretrained_model(tmp_path):
    model = proximal(proximal_selective=False)
    fit(model, tmp_path / "first")
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    base = small_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=False)
    assert proximal_distance(loaded) == proximal_distance(model)
    loaded.peft_config["default"].proximal_lambda = 1e12
    fit(loaded, tmp_path / "second", max_steps=1)
    assert proximal_distance(loaded) < 1e-8
