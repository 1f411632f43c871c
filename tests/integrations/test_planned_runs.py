# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`proximal_lambda="auto"` under the Trainer without any callback: λ of the run, resumed, repeated, saved."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_linear import ProximalCallback, ProximalLoraConfig
from peft_linear.errors import PeftLinearError
from peft_linear.proximal import proximal_exponent, proximal_strength
from tests.helpers import small_models
from tests.helpers.reference_proximal import lora_parameters


OPTIONS = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"}
RATE = 0.02


def rows(count=24):
    torch.manual_seed(3)
    return [
        {"input_ids": torch.randint(1, small_models.VOCABULARY, (6,)), "labels": torch.randint(0, 3, ()).item()}
        for _ in range(count)
    ]


def adapted(config=None, seed=1, **fields):
    torch.manual_seed(0)
    base = small_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(seed)
    return get_peft_model(base, config or ProximalLoraConfig(**OPTIONS, **fields))


def fit(model, folder, callbacks=(), cls=Trainer, resume=None, optimizers=(None, None), **settings):
    arguments = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": RATE}
    arguments |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 5, "disable_tqdm": True}
    arguments |= {"logging_steps": 1, "output_dir": str(folder)}
    given = {"callbacks": list(callbacks), "optimizers": optimizers}
    trainer = cls(model=model, args=TrainingArguments(**arguments | settings), train_dataset=rows(), **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lambda_of(model):
    return proximal_strength(model)["default"]


class Rates(TrainerCallback):
    """The largest learning rate of every step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(max(group["lr"] for group in optimizer.param_groups))


class OwnScheduler(Trainer):
    """Overrides what makes the scheduler, without calling the original."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer or self.optimizer, 0.7)
        return self.lr_scheduler


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"lr_scheduler_type": "constant", "max_steps": 5},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4}, "warmup_steps": 2},
        {"gradient_accumulation_steps": 4, "num_train_epochs": 3},
        {"optim": "sgd", "learning_rate": 0.5},
        {"cls": OwnScheduler},
    ],
    ids=str,
)
def test_lambda_times_the_rates_of_the_run_is_one_without_a_callback(tmp_path, settings):
    model, seen = adapted(), Rates()
    fit(model, tmp_path, [seen], **settings)
    assert lambda_of(model) == pytest.approx(1 / sum(seen.rates))
    assert proximal_exponent(model) == pytest.approx(1.0)


def test_the_default_trains_what_its_number_trains(tmp_path):
    model = adapted()
    fit(model, tmp_path)
    other = adapted(proximal_lambda=lambda_of(model))
    fit(other, tmp_path)
    plain = adapted(LoraConfig(**OPTIONS))
    fit(plain, tmp_path)
    for a, b, c in zip(*(lora_parameters(each).values() for each in (model, other, plain)), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_an_optimizer_and_a_scheduler_of_ones_own_are_planned(tmp_path):
    model, seen = adapted(), Rates()
    factors = list(lora_parameters(model).values())
    optimizer = torch.optim.SGD([{"params": factors[::2], "lr": 0.1}, {"params": factors[1::2], "lr": 1.6}])
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8),
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])
    fit(model, tmp_path, [seen], optimizers=(optimizer, scheduler))
    assert lambda_of(model) == pytest.approx(1 / sum(seen.rates))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


@pytest.mark.parametrize("cls", [Trainer, OwnScheduler])
def test_a_resumed_run_has_the_lambda_of_the_whole_run_bit_for_bit(tmp_path, cls):
    whole, killed, again = adapted(), adapted(), adapted(seed=99)
    fit(whole, tmp_path / "whole", cls=cls)
    fit(killed, tmp_path / "killed", [Stop()], cls=cls, save_strategy="steps", save_steps=5)
    fit(again, tmp_path / "again", cls=cls, resume=str(tmp_path / "killed" / "checkpoint-5"))
    assert lambda_of(whole) == lambda_of(killed) == lambda_of(again)
    assert proximal_exponent(again) == proximal_exponent(whole) == pytest.approx(1.0)
    for a, b in zip(lora_parameters(again).values(), lora_parameters(whole).values(), strict=True):
        assert torch.equal(a, b)


def test_every_run_of_a_model_has_its_own_lambda(tmp_path):
    model = adapted()
    fit(model, tmp_path, lr_scheduler_type="constant", max_steps=4)
    assert lambda_of(model) == pytest.approx(1 / (4 * RATE))
    fit(model, tmp_path, lr_scheduler_type="constant", max_steps=10)
    assert lambda_of(model) == pytest.approx(1 / (10 * RATE))


def test_checkpoints_and_logs_have_the_number(tmp_path):
    model = adapted(proximal_space="delta")
    trainer = fit(model, tmp_path, [ProximalCallback()], save_strategy="steps", save_steps=6)
    saved = json.loads((tmp_path / "checkpoint-6" / "adapter_config.json").read_text())
    assert saved["proximal_lambda"] == lambda_of(model) == pytest.approx(0.5 / (RATE * 6.5))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["proximal_lambda"] == lambda_of(model) for entry in logged)
    assert logged[-1]["proximal_exponent"] == pytest.approx(0.5)


def test_rates_that_the_run_decides_are_said_once(tmp_path):
    model = adapted()
    optimizer = torch.optim.SGD(list(lora_parameters(model).values()), lr=0.1)
    given = (optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    evaluated = {"eval_strategy": "no", "max_steps": 6, "lr_scheduler_type": "reduce_lr_on_plateau"}
    with pytest.warns(UserWarning) as caught:
        fit(model, tmp_path, optimizers=given, **evaluated | {"lr_scheduler_type": "constant"})
    said = [str(each.message) for each in caught if "cannot be simulated" in str(each.message)]
    assert len(said) == 1 and "counts with constant learning rates" in said[0]
    assert lambda_of(model) == pytest.approx(1 / 0.6)


@pytest.mark.parametrize(("strength", "count"), [(0.1, 1), (1e4, 1), (5.0, 0)])
def test_a_number_that_is_far_off_is_warned_of_once_a_run(tmp_path, strength, count):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(adapted(proximal_lambda=strength), tmp_path, max_steps=3)
    assert sum("λ·Ση" in str(each.message) for each in caught) == count


def test_rates_that_add_up_to_nothing_are_no_plan(tmp_path):
    with pytest.raises(PeftLinearError, match="or they add up to 0"):
        fit(adapted(), tmp_path, learning_rate=0.0)


def test_importing_again_plans_once():
    code = """
import sys
import peft_linear
from transformers.trainer_callback import CallbackHandler
for name in [n for n in sys.modules if n.split(".")[0] == "peft_linear"]:
    del sys.modules[name]
import peft_linear
assert not hasattr(CallbackHandler.on_train_begin._peft_linear_original, "_peft_linear_original")
print("fine")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "fine", result.stderr
