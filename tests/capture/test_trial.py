# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Trials: adapters as hooks do what peft's own LoRA does, and leave the model as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import T5Config, T5ForConditionalGeneration

from peft_linear.capture.adapter_spaces import initial_lora_a
from peft_linear.capture.request import KernelRequest
from peft_linear.capture.trial import Trial
from peft_linear.errors import OutputError, PeftLinearError
from tests.helpers import small_models as small


def t5():
    config = T5Config(
        vocab_size=small.VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


MAKERS = {"llama": lambda: small.llama(True), "gpt2": lambda: small.gpt2(True), "t5": t5}
RANK, ALPHA = 4, 16.0


def language_batches(examples: int = 4, count: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, small.VOCABULARY, (examples, 9), generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        labels[0, 5:] = -100
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def trial_of(model, batches, rank: int = RANK) -> Trial:
    return Trial.of(model, KernelRequest(rank=rank).layers(model), batches, rank, ALPHA)


def adapted(model, ranks):
    """peft's LoRA with the A of a trial, in the dtype of the model."""
    config = LoraConfig(r=1, rank_pattern=dict(ranks), lora_alpha=ALPHA, target_modules=list(ranks))
    wrapped = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).eval()
    for name, rank in ranks.items():
        layer = wrapped.get_base_model().get_submodule(name)
        a = layer.lora_A["default"].weight
        a.data = initial_lora_a(name, a.shape[1], RANK)[:rank].to(a)
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.to(a).zero_()
    return wrapped


@pytest.mark.parametrize("kind", MAKERS)
def test_losses_are_the_models_own(kind):
    model, batches = small.seeded(MAKERS[kind]), language_batches()
    trial = trial_of(model, batches)
    with trial.running() as run:
        losses = run.losses(trial.batches)
    with torch.no_grad():
        own = sum(float(model(**batch).loss) * count for batch, count in weighted(model, batches))
        expected = sum(float(loss_of(model, batch)) * count for batch, count in weighted(model, batches))
    assert losses.mean == pytest.approx(expected / float(losses.counts.sum()), rel=1e-10)
    assert losses.mean == pytest.approx(own / float(losses.counts.sum()), rel=1e-6)  # transformers' is in float32
    assert len(losses.sums) == 16


def shift_of(model) -> int:
    return 0 if model.config.is_encoder_decoder else 1


def weighted(model, batches):
    return [(batch, int((batch["labels"][:, shift_of(model) :] != -100).sum())) for batch in batches]


def loss_of(model, batch):
    """The model's mean loss of a batch in the precision of its logits."""
    logits = model(**batch).logits[:, : -1 if shift_of(model) else None]
    return cross_entropy(logits.flatten(0, 1), batch["labels"][:, shift_of(model) :].flatten())


@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_are_those_of_pefts_adapter_at_every_rank(kind):
    model, batches = small.seeded(MAKERS[kind]), language_batches()
    trial = trial_of(model, batches)
    with trial.running() as run:
        gradients = run.gradients(trial.batches)
    names = list(trial.layers)
    assert set(gradients) == set(names)
    ranks = {name: 1 + place % RANK for place, name in enumerate(names)}
    wrapped = adapted(model, ranks)
    total = sum(count for _, count in weighted(model, batches))
    sum(loss_of(wrapped, batch) * count / total for batch, count in weighted(model, batches)).backward()
    for name, rank in ranks.items():
        expected = wrapped.get_base_model().get_submodule(name).lora_B["default"].weight.grad
        assert torch.allclose(gradients[name][:, :rank] * ALPHA / rank, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_short_training_is_that_of_pefts_adapter(kind):
    model, batches = small.seeded(MAKERS[kind]), language_batches()
    trial = trial_of(model, batches)
    ranks = {name: 1 + place % 3 for place, name in enumerate(list(trial.layers)[::2])}
    learning, held_out = trial.batches[0::2], trial.batches[1::2]
    with trial.running() as run:
        run.train(ranks, learning, 0.02)
        found = run.losses(held_out).mean
        run.use({}, {})
        before = run.losses(held_out).mean
    wrapped = adapted(model, ranks)
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    for step, batch in enumerate(learning):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / len(learning))
        optimizer.zero_grad()
        loss_of(wrapped, {**batch.inputs, "labels": batch.labels}).backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with trial_of(wrapped, [{**batch.inputs, "labels": batch.labels} for batch in held_out]).running() as run:
        expected = run.losses(held_out).mean
    assert found == pytest.approx(expected, rel=1e-9)
    assert found != pytest.approx(before, rel=1e-3)


def test_the_model_is_left_as_it_was():
    model = small.seeded(MAKERS["llama"]).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    trial = trial_of(model, language_batches())
    state = torch.get_rng_state()
    with trial.running() as run:
        run.train(dict.fromkeys(trial.layers, 2), trial.batches, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.config.use_cache
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_diverged_loss_is_infinite_and_not_an_error():
    model = small.seeded(MAKERS["llama"])
    trial = trial_of(model, language_batches())
    with trial.running() as run:
        a = {name: trial.initial_a(name) for name in trial.layers}
        run.use(
            a,
            {
                name: torch.full((layer.shape[1], RANK), 1e200, dtype=torch.float64)
                for name, layer in trial.layers.items()
            },
        )
        assert run.losses(trial.batches).mean == math.inf


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda batches: [{k: v[:1] for k, v in batches[0].items()}], PeftLinearError, "at least 4 examples"),
        (lambda batches: [], PeftLinearError, "`batches` is empty"),
        (lambda batches: [{k: v for k, v in b.items() if k != "labels"} for b in batches], OutputError, "no labels"),
        (lambda batches: [b | {"labels": b["labels"][:, 0]} for b in batches], OutputError, "examples, tokens"),
        (lambda batches: [b | {"labels": b["labels"][:, :-1]} for b in batches], OutputError, "one label a token"),
        (
            lambda batches: [b | {"labels": torch.full_like(b["labels"], -100)} for b in batches],
            OutputError,
            "no label token",
        ),
    ],
)
def test_data_that_cannot_be_tried_on_is_refused(change, error, message):
    model = small.seeded(MAKERS["llama"])
    with pytest.raises(error, match=message), trial_of(model, change(language_batches())).running() as run:
        run.gradients(run.trial.batches)
