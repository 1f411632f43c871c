# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_linear.capture.linearize import linearize
from tests.helpers.small_models import bert, causal_batches, llama, seeded, text_batches


def adapted(factory=bert, **kwargs):
    model = seeded(factory, dtype=torch.float32, **kwargs)
    heads = ["classifier"] if factory is bert else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, modules_to_save=heads))


def rows(batches):
    return [
        {key: value[i] for key, value in batch.items()} | {"text": "a column that no model takes"}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]


def trainer(model, data, tmp_path, **kwargs):
    arguments = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    } | kwargs
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **arguments),
        train_dataset=data,
        eval_dataset=data,
        data_collator=default_data_collator,
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_the_trainer_trains_evaluates_and_saves_it(tmp_path):
    model = adapted()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    linearized = linearize(model)
    run = trainer(linearized, rows(text_batches((8,))), tmp_path, num_train_epochs=6, max_steps=-1)
    before = run.evaluate()
    assert before["eval_loss"] == pytest.approx(trainer(model, run.eval_dataset, tmp_path).evaluate()["eval_loss"])
    run.train()
    assert run.evaluate()["eval_loss"] < before["eval_loss"] - 0.05
    assert linearized.distance() > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name])
    run.save_model()
    assert any(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_the_first_step_is_that_of_ordinary_training(tmp_path):
    model = adapted(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    linearized = linearize(model)
    data = rows(text_batches((4,)))
    trainer(linearized, data, tmp_path, max_steps=1, per_device_train_batch_size=4).train()
    trainer(model, data, tmp_path, max_steps=1, per_device_train_batch_size=4).train()
    real = dict(model.named_parameters())
    for name, value in linearized.adapter_state_dict().items():
        assert_close(value, real[name].detach(), rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_count_tokens_as_the_model_does(tmp_path):
    batch = causal_batches(sizes=(4,))[0]
    data = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    whole, parts, real = (adapted(llama, causal=True) for _ in range(3))
    models = [linearize(whole), linearize(parts), real]
    sizes = [(4, 1), (1, 4), (1, 4)]
    first = []
    for model, (size, accumulation) in zip(models, sizes, strict=True):
        run = trainer(
            model,
            data,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        run.train()
        first.append(losses(run)[0])
    assert first[0] == pytest.approx(first[1], rel=1e-4) == pytest.approx(first[2], rel=1e-4)
    one, other = (model.adapter_state_dict() for model in models[:2])
    for name in one:
        assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"bf16": True}, {"optim": "adamw_torch"}])
def test_the_trainers_options_work(tmp_path, options):
    linearized = linearize(adapted())
    run = trainer(linearized, rows(text_batches((4,))), tmp_path, learning_rate=0.01, max_steps=8, **options)
    run.train()
    values = losses(run)
    assert sum(values[-2:]) < sum(values[:2])
    assert all(parameter.isfinite().all() for parameter in linearized.parameters())


def test_it_describes_itself_to_the_trainer_as_its_model_does():
    model = linearize(adapted(llama, causal=True))
    assert model.accepts_loss_kwargs is True
    assert model.loss_type == "ForCausalLM"
