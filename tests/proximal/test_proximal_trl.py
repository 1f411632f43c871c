# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The term under TRL's SFTTrainer and DPOTrainer, against plain LoRA with the term done by hand after each step."""

from __future__ import annotations

import math
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, TrainerCallback

from peft_linear import ProximalCallback, ProximalLoraConfig, proximal_distance
from peft_linear.proximal import proximal_firing_rate
from peft_linear.tuners.proximal_lora import set_proximal_reference
from tests.helpers import small_models
from tests.helpers.function_space import metric, statistics
from tests.helpers.reference_callback import ByHand
from tests.helpers.reference_proximal import lora_parameters


pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


OPTIONS = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LAMBDA = 3.0
WORDS = [f"w{number}" for number in range(small_models.VOCABULARY - 3)]
VARIANTS = [
    {},
    {"selective": True},
    {"space": "delta"},
    {"mode": "coupled"},
]


@pytest.fixture
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(first, count=5):
    return " ".join(WORDS[(first * 7 + step * step) % len(WORDS)] for step in range(count))


def sentences(count=16):
    return Dataset.from_list([{"text": text(row, 4 + row % 3)} for row in range(count)])


def completions(count=16):
    return Dataset.from_list([{"prompt": text(row), "completion": " " + text(row + 3)} for row in range(count)])


def preferences(count=16):
    return Dataset.from_list(
        [
            {"prompt": text(row), "chosen": " " + text(row + 3, 3 + row % 2), "rejected": " " + text(2 * row + 1, 4)}
            for row in range(count)
        ]
    )


def base_model(dtype=torch.float64):
    return small_models.seeded(small_models.llama, causal=True, dtype=dtype)


def plain_config():
    return LoraConfig(**OPTIONS)


def proximal_config(variant=None, strength=LAMBDA):
    fields = {f"proximal_{name}": value for name, value in (variant or {}).items()}
    return ProximalLoraConfig(**OPTIONS, proximal_lambda=strength, **fields)


def adapted(config, seed=1, dtype=torch.float64):
    torch.manual_seed(seed)
    return get_peft_model(base_model(dtype), config)


def fit(
    trainer_class,
    folder,
    tokenizer,
    dataset,
    *,
    model=None,
    config=None,
    callbacks=(),
    resume=None,
    prepare=None,
    **settings,
):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.02,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 32,
        "seed": 5,
    }
    config_class = SFTConfig if trainer_class is SFTTrainer else DPOConfig
    arguments = config_class(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **defaults | settings
    )
    torch.manual_seed(7)  # older versions of TRL do not seed before they make the adapter
    trainer = trainer_class(
        model=base_model() if model is None else model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=list(callbacks),
    )
    if prepare is not None:
        prepare(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(model, other, tolerance=1e-12):
    ours, theirs = lora_parameters(model), lora_parameters(other)
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_one_application_a_step(model, by_hand, steps):
    assert len(by_hand.fired) == steps and any(by_hand.fired)
    assert proximal_firing_rate(model) == pytest.approx(sum(by_hand.fired) / steps)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: str(variant or "default"))
def test_supervised_fine_tuning_equals_the_reference(tmp_path, tokenizer, variant, accumulation):
    by_hand = ByHand(lam=LAMBDA, scaling=2.0, **variant)
    settings = {"gradient_accumulation_steps": accumulation}
    run = (SFTTrainer, tmp_path, tokenizer, sentences())
    plain = fit(*run, config=plain_config(), callbacks=[by_hand], **settings)
    trainer = fit(*run, config=proximal_config(variant), **settings)
    assert_same(trainer.model, plain.model)
    assert_one_application_a_step(trainer.model, by_hand, steps=4)
    untouched = fit(*run, config=plain_config(), **settings)
    with pytest.raises(AssertionError):  # otherwise the term would make no difference here
        assert_same(trainer.model, untouched.model, tolerance=1e-6)


def test_supervised_fine_tuning_in_function_space_equals_the_reference(tmp_path, tokenizer):
    reference = statistics(adapted(proximal_config()))
    by_hand = ByHand(lam=LAMBDA, scaling=2.0, space="function", metric=metric(reference))
    run, settings = (SFTTrainer, tmp_path, tokenizer, sentences()), {"gradient_accumulation_steps": 2}
    plain = fit(*run, config=plain_config(), callbacks=[by_hand], **settings)
    config = proximal_config({"space": "function"})
    trainer = fit(*run, config=config, prepare=lambda model: set_proximal_reference(model, reference), **settings)
    assert_same(trainer.model, plain.model)
    assert_one_application_a_step(trainer.model, by_hand, steps=4)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"dataset": completions(), "completion_only_loss": True, "gradient_accumulation_steps": 2},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 8, "max_steps": 3},
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 4},
    ],
    ids=["checkpointing", "completions", "packing", "label-smoothing"],
)
def test_options_of_supervised_fine_tuning_equal_the_reference(tmp_path, tokenizer, settings):
    settings = dict(settings)
    dataset = settings.pop("dataset", None) or sentences()
    by_hand = ByHand(lam=LAMBDA, scaling=2.0, selective=False)
    plain = fit(SFTTrainer, tmp_path, tokenizer, dataset, config=plain_config(), callbacks=[by_hand], **settings)
    config = proximal_config({"selective": False})
    trainer = fit(SFTTrainer, tmp_path, tokenizer, dataset, config=config, **settings)
    assert_same(trainer.model, plain.model)
    assert_one_application_a_step(trainer.model, by_hand, settings.get("max_steps", 4))


def test_bfloat16_and_checkpointing_equal_the_reference(tmp_path, tokenizer):
    settings = {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    by_hand = ByHand(lam=LAMBDA, scaling=2.0, selective=False)
    trained = []
    for config, callbacks in ((plain_config(), [by_hand]), (proximal_config({"selective": False}), [])):
        model = base_model(torch.float32)
        run = {"model": model, "config": config, "callbacks": callbacks, **settings}
        trained.append(fit(SFTTrainer, tmp_path, tokenizer, sentences(), **run).model)
    assert_same(trained[1], trained[0], tolerance=1e-5)
    assert_one_application_a_step(trained[1], by_hand, steps=4)


def test_lambda_zero_is_lora_bit_for_bit(tmp_path, tokenizer):
    for trainer_class, dataset in ((SFTTrainer, sentences()), (DPOTrainer, preferences())):
        plain = fit(trainer_class, tmp_path, tokenizer, dataset, config=plain_config(), max_steps=3)
        zero = fit(trainer_class, tmp_path, tokenizer, dataset, config=proximal_config(strength=0.0), max_steps=3)
        for name, value in lora_parameters(plain.model).items():
            assert torch.equal(value, lora_parameters(zero.model)[name])


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: str(variant or "default"))
def test_preference_optimisation_equals_the_reference(tmp_path, tokenizer, variant, accumulation):
    by_hand = ByHand(lam=LAMBDA, scaling=2.0, **variant)
    run = (DPOTrainer, tmp_path, tokenizer, preferences())
    settings = {"gradient_accumulation_steps": accumulation}
    plain = fit(*run, config=plain_config(), callbacks=[by_hand], **settings)
    trainer = fit(*run, config=proximal_config(variant), **settings)
    assert_same(trainer.model, plain.model)
    assert_one_application_a_step(trainer.model, by_hand, steps=4)


class Reference(TrainerCallback):
    """Logits with the adapter disabled, before training and after every step."""

    def __init__(self):
        self.logits = []

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        mode = model.training
        with model.eval().disable_adapter():
            self.logits.append(model(input_ids=torch.arange(2, 12)[None]).logits)
        model.train(mode)

    on_step_end = on_train_begin


def test_the_reference_model_of_dpo_is_the_pretrained_model_throughout(tmp_path, tokenizer):
    reference = Reference()
    run = {"config": proximal_config({"selective": False}), "callbacks": [reference], "gradient_accumulation_steps": 2}
    trainer = fit(DPOTrainer, tmp_path, tokenizer, preferences(), **run)
    assert trainer.ref_model is None  # TRL disables the adapter instead
    base = base_model()
    with torch.no_grad():
        expected = base(input_ids=torch.arange(2, 12)[None]).logits
        trained = trainer.model.eval()(input_ids=torch.arange(2, 12)[None]).logits
    assert len(reference.logits) == 5 and all(torch.equal(each, expected) for each in reference.logits)
    assert not torch.allclose(trained, expected)
    before = base.state_dict()
    for name, value in trainer.model.unload().state_dict().items():
        assert torch.equal(value, before[name]), name
    first = trainer.state.log_history[0]  # policy and reference are one model at the first step
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("trainer_class", [SFTTrainer, DPOTrainer])
def test_the_callback_logs_through_trl(tmp_path, tokenizer, trainer_class):
    dataset = sentences() if trainer_class is SFTTrainer else preferences()
    config = proximal_config({"selective": False})
    trainer = fit(trainer_class, tmp_path, tokenizer, dataset, config=config, callbacks=[ProximalCallback()])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    distances = [entry["proximal_distance"] for entry in logged]
    assert distances == sorted(distances) and distances[0] > 0
    assert distances[-1] == pytest.approx(proximal_distance(trainer.model, space="factors"))
    assert logged[-1]["proximal_distance_delta"] == pytest.approx(proximal_distance(trainer.model, space="delta"))
    removed = [entry["proximal_removed_share"] for entry in logged]
    assert removed[0] > 0 and removed == sorted(removed)


def test_a_resumed_run_equals_the_uninterrupted_run_bit_for_bit(tmp_path, tokenizer):
    """The trainer gets a PeftModel; the one that resumes was made with another A, so the anchor is the file's."""
    config = proximal_config({"selective": False})
    whole = fit(SFTTrainer, tmp_path / "a", tokenizer, sentences(), model=adapted(config), save_steps=2)
    saving = {"save_strategy": "steps", "save_steps": 2}
    fit(SFTTrainer, tmp_path / "b", tokenizer, sentences(), model=adapted(config), **saving)
    checkpoint = str(tmp_path / "b" / "checkpoint-2")
    again = fit(SFTTrainer, tmp_path / "c", tokenizer, sentences(), model=adapted(config, seed=99), resume=checkpoint)
    for name, value in lora_parameters(whole.model).items():
        assert torch.equal(value, lora_parameters(again.model)[name])
    assert proximal_distance(again.model) == proximal_distance(whole.model)


class Start(TrainerCallback):
    """θ0: the adapter's parameters before the first step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.parameters = {name: value.detach().clone() for name, value in lora_parameters(model).items()}


def test_dpo_after_sft_keeps_the_pretrained_model_as_anchor(tmp_path, tokenizer):
    """For a loaded adapter TRL's reference is a copy of it ("ref"), while the anchor is the pretrained model."""
    start, config = Start(), proximal_config({"selective": False})
    first = fit(SFTTrainer, tmp_path / "sft", tokenizer, sentences(), config=config, callbacks=[start]).model
    first.save_pretrained(tmp_path / "adapter")
    loaded, plain = (
        PeftModel.from_pretrained(base_model(), tmp_path / "adapter", is_trainable=True) for _ in range(2)
    )
    assert proximal_distance(loaded) == pytest.approx(proximal_distance(first)) and proximal_distance(first) > 0

    by_hand = ByHand(lam=LAMBDA, scaling=2.0, selective=False, start=start.parameters)
    plain.peft_config["default"].proximal_lambda = 0.0
    run = (DPOTrainer, tmp_path / "dpo", tokenizer, preferences())
    fit(*run, model=plain, callbacks=[by_hand], gradient_accumulation_steps=2)
    fit(*run, model=loaded, callbacks=[ProximalCallback()], gradient_accumulation_steps=2)
    assert_same(loaded, plain)
    assert_one_application_a_step(loaded, by_hand, steps=4)
    copied = "ref" in loaded.peft_config
    assert copied or Version(version("trl")) < Version("1.0")  # where the reference is the pretrained model
    for name, value in first.named_parameters():
        if copied and ".default." in name:
            assert torch.equal(loaded.get_parameter(name.replace(".default.", ".ref.")), value), name
