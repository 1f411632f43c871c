# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Runs of a Trainer with the callback on a tiny random BERT whose data show their class, shared by tests."""

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_linear.integrations.recommendation_callback import NtkRecommendationCallback
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from tests.helpers.small_models import bert, seeded, text_batches


def rows(count=24, seed=0):
    """Features whose class shows in their tokens."""
    generator = torch.Generator().manual_seed(seed)
    labels = [i % 3 for i in range(count)]
    ids = [torch.randint(2 + 15 * c, 17 + 15 * c, (6,), generator=generator).tolist() for c in labels]
    return [{"input_ids": i, "attention_mask": [1] * 6, "labels": c} for i, c in zip(ids, labels, strict=True)]


BATCHES = text_batches(sizes=(4, 4, 4))


def base_model():
    return seeded(bert, dtype=torch.float32)


def peft_bert(config_class=ProximalLoraConfig, seed=0, **kwargs):
    torch.manual_seed(seed)
    config = config_class(r=2, lora_alpha=4, target_modules="all-linear", task_type="SEQ_CLS", **kwargs)
    return get_peft_model(base_model(), config)


def trainer_for(model, folder, callbacks=(), **kwargs):
    arguments = {
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "lr_scheduler_type": "constant",
    }
    others = {key: kwargs.pop(key) for key in ("optimizers", "model_init") if key in kwargs}
    if "model_init" not in others:
        others["model"] = model
    return Trainer(
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **kwargs}),
        train_dataset=rows(),
        callbacks=list(callbacks),
        **others,
    )


def callback(action="restrict", budget=3, **kwargs):
    return NtkRecommendationCallback(
        BATCHES, budget, action, **{"criterion": "gradient_energy", "progress": False, **kwargs}
    )


def lora_parameters(model):
    return {name for name, p in model.named_parameters() if "lora_" in name and p.requires_grad}
