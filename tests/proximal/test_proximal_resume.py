# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A Trainer's run killed after any step and resumed from its checkpoint is the uninterrupted run, bit for bit.

With dropout, gradient accumulation, momentum, schedules of the learning rate and of λ, and a λ by module. The model
that resumes was made with another random A, so its anchor can only come from the checkpoint.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer, TrainingArguments

from peft_linear.errors import FileError
from peft_linear.integrations.callbacks import ProximalCallback
from peft_linear.proximal import collect_reference, proximal_distance, proximal_firing_rate, proximal_summary
from peft_linear.tuners.proximal_lora import ProximalLoraConfig, set_proximal_reference
from peft_linear.tuners.proximal_lora.anchors import ANCHOR_NAME
from peft_linear.tuners.proximal_lora.counts import REMAINDERS_KEY
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers import small_models
from tests.helpers.reference_proximal import lora_parameters


STEPS = 6
VARIANTS = {
    "factors": {"proximal_selective": True, "proximal_schedule": "cosine", "proximal_schedule_steps": 8},
    "delta": {
        "proximal_space": "delta",
        "proximal_selective": True,
        "proximal_schedule": "linear",
        "proximal_schedule_steps": 4,
    },
    "function": {"proximal_space": "function", "proximal_selective": True},
    "coupled": {
        "proximal_mode": "coupled",
        "proximal_selective": True,
        "proximal_lambda_pattern": {"query": 0.0, "output.dense": 7.0},
    },
    "projection": {"proximal_mode": "projection", "proximal_schedule": "warmup", "proximal_schedule_steps": 4},
    "always": {"proximal_selective": False, "proximal_lambda_pattern": {r"layer\.1\.output\.dense": 9.0}},
}


def base():
    torch.manual_seed(0)
    return small_models.bert().double()


def proximal(variant, seed=1):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"}
    config = ProximalLoraConfig(proximal_lambda=3.0, **options, **VARIANTS[variant])
    model = base()
    torch.manual_seed(seed)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if variant == "function" and seed == 1:  # the model that resumes has it from the checkpoint
        set_proximal_reference(model, collect_reference(base(), small_models.text_batches(), progress=False))
    return model


def rows():
    torch.manual_seed(3)
    return [
        {"input_ids": torch.randint(1, small_models.VOCABULARY, (6,)), "labels": torch.randint(0, 3, ()).item()}
        for _ in range(4 * STEPS)
    ]


def fit(model, folder, resume=None, **kwargs):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    settings |= {"learning_rate": 0.02, "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no", "seed": 5}
    arguments = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **settings | kwargs
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[ProximalCallback()])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer):
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if "proximal" in key or key == "loss"} for entry in entries]


def assert_the_same_run(model, trainer, whole, uninterrupted):
    for (name, a), b in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert proximal_distance(model) == proximal_distance(whole)
    assert proximal_summary(model) == proximal_summary(whole)
    assert find_adapters(model)[0].statistics == find_adapters(whole)[0].statistics
    assert logged(trainer) == logged(uninterrupted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """variant -> the model, its trainer and the folder with a checkpoint of every step; made when first asked for."""
    made = {}

    def run(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            model = proximal(variant)
            made[variant] = (model, fit(model, folder, save_strategy="steps", save_steps=1), folder)
        return made[variant]

    return run


@pytest.mark.parametrize("killed_after", range(1, STEPS))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_run_killed_after_any_step_continues_bit_for_bit(uninterrupted, tmp_path, variant, killed_after):
    whole, trainer, folder = uninterrupted(variant)
    other = proximal(variant, seed=99)
    assert not torch.equal(*(next(iter(lora_parameters(m).values())) for m in (other, proximal(variant))))
    resumed = fit(other, tmp_path, resume=str(folder / f"checkpoint-{killed_after}"))
    assert_the_same_run(other, resumed, whole, trainer)
    assert find_adapters(other)[0].statistics.position == STEPS
    assert 0 < proximal_firing_rate(other) <= 1


def test_saving_changes_nothing(uninterrupted, tmp_path):
    whole, trainer, _ = uninterrupted("factors")
    model = proximal("factors")
    assert_the_same_run(model, fit(model, tmp_path), whole, trainer)


def test_a_model_loaded_from_the_checkpoint_resumes_bit_for_bit(uninterrupted, tmp_path):
    whole, trainer, folder = uninterrupted("delta")
    checkpoint = str(folder / "checkpoint-2")
    model = PeftModel.from_pretrained(base(), checkpoint, is_trainable=True, autocast_adapter_dtype=False)
    assert_the_same_run(model, fit(model, tmp_path, resume=checkpoint), whole, trainer)


def test_without_the_optimizers_state_the_schedule_restarts_and_the_anchor_stays(uninterrupted, tmp_path):
    _, _, folder = uninterrupted("factors")
    checkpoint = str(folder / "checkpoint-4")
    model = PeftModel.from_pretrained(base(), checkpoint, is_trainable=True, autocast_adapter_dtype=False)
    trainer = fit(model, tmp_path, max_steps=2)
    assert logged(trainer)[0]["proximal_lambda"] == 3.0
    assert find_adapters(model)[0].statistics.position == 2
    anchors, stored = find_adapters(model)[0].anchors(), find_adapters(proximal("factors"))[0].anchors()
    assert all(torch.equal(anchors[name].a, stored[name].a) for name in stored)


@pytest.mark.parametrize("variant", ["factors", "delta", "coupled"])
def test_a_run_of_a_bfloat16_adapter_goes_on_with_its_remainders(tmp_path, variant):
    """In float32: peft makes it that when the Trainer loads the checkpoint."""
    model = proximal(variant)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    fit(model, tmp_path / "whole", save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"][0]
    remainders = state[REMAINDERS_KEY]["default"]
    assert any(bool(tensor.any()) for tensor in remainders.values())
    stored = load_file(checkpoint / "adapter_model.safetensors")
    resumed = proximal(variant, seed=99)
    seen: dict[str, torch.Tensor] = {}

    def look(optimizer, *_):
        for name, parameter in lora_parameters(resumed).items():
            seen.setdefault(name, parameter.detach().clone())

    handle = register_optimizer_step_pre_hook(look)  # after the package's own
    try:
        fit(resumed, tmp_path / "resumed", resume=str(checkpoint))
    finally:
        handle.remove()
    for name, value in seen.items():
        file = name.replace(".default", "")
        factor = file.removeprefix("base_model.model.").replace(".lora_", ".").removesuffix(".weight")
        assert value.dtype != torch.bfloat16
        torch.testing.assert_close(
            value.double(), stored[file].double() + remainders.get(factor, torch.zeros(())).double()
        )


@pytest.fixture
def checkpoint(uninterrupted, tmp_path):
    """A copy of a checkpoint, which may be damaged."""
    _, _, folder = uninterrupted("factors")
    return shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")


def test_resuming_with_a_damaged_anchor_is_refused(checkpoint, tmp_path):
    (checkpoint / ANCHOR_NAME).write_bytes(b"damaged")
    with pytest.raises(FileError, match="cannot be read"):
        fit(proximal("factors"), tmp_path / "out", resume=str(checkpoint))


def test_resuming_without_the_anchor_warns(checkpoint, tmp_path):
    (checkpoint / ANCHOR_NAME).unlink()
    with pytest.warns(UserWarning, match=f"has no {ANCHOR_NAME}"):
        fit(proximal("factors"), tmp_path / "out", resume=str(checkpoint))
