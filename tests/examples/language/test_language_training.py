# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Batches and training: masks, the loss against the model's own, the base model untouched, the same run twice."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from examples.benchmarks.language import batches, training
from examples.benchmarks.language.arms import ArmRequest, budget_parameters, choose_ranks
from examples.benchmarks.language.tasks import Example


def test_labels_cover_the_completion_and_the_end_token(tokenizer):
    encoded = batches.encode(tokenizer, Example("What?", "Yes."))
    assert tokenizer.decode(encoded.tokens) == "What?\nYes.<end>"
    answer = [label for label in encoded.labels if label != batches.IGNORED]
    assert tokenizer.decode(answer) == "Yes.<end>"
    assert encoded.labels[: len("What?\n")] == [batches.IGNORED] * len("What?\n")


def test_plain_text_has_labels_everywhere(tokenizer):
    encoded = batches.encode(tokenizer, Example("", "Just a text."))
    assert encoded.labels == encoded.tokens


def test_a_long_prompt_loses_its_start_and_keeps_the_answer(tokenizer):
    encoded = batches.encode(tokenizer, Example("x" * 200 + " ham?", "spam"))
    assert len(encoded.tokens) == batches.MAX_TOKENS
    assert tokenizer.decode(encoded.tokens).endswith("xx ham?\nspam<end>")


def test_the_beginning_of_sequence_token_comes_first_and_has_no_label(tokenizer, monkeypatch):
    monkeypatch.setattr(batches, "starts_with_bos", lambda tokenizer: True)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<end>"
    encoded = batches.encode(tokenizer, Example("", "text"))
    assert encoded.tokens[0] == tokenizer.bos_token_id
    assert encoded.labels == [batches.IGNORED, *encoded.tokens[1:]]
    long = batches.encode(tokenizer, Example("x" * 200, "y" * 200))
    assert len(long.tokens) == batches.MAX_TOKENS
    assert long.tokens[0] == tokenizer.bos_token_id


def test_the_packed_loss_is_the_padded_batch_s_own_loss(model, tokens, tokenizer):
    batch = tokens["train"][:5]
    with torch.no_grad():
        own = model(**batches.pad(batch, tokenizer.pad_token_id)).loss
        packed = batches.token_losses(model, batches.pack(batch))
    labels = sum(label != batches.IGNORED for one in batch for label in one.labels[1:])
    assert len(packed) == labels
    assert_close(packed.mean(), own, rtol=1e-5, atol=1e-6)


def test_an_example_sees_nothing_of_its_neighbours(model, tokens):
    one, other, third = tokens["train"][:3]
    with torch.no_grad():
        alone = batches.token_losses(model, batches.pack([other]))
        between = batches.token_losses(model, batches.pack([one, other, third]))
    before = sum(label != batches.IGNORED for label in one.labels[1:])
    assert_close(between[before : before + len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_the_order_is_drawn_from_the_seed_and_takes_everyone_once_a_turn(tokens):
    examples = tokens["train"]
    order = batches.training_batches(examples, size=4, count=6, seed=3)
    flat = [id(example) for batch in order for example in batch]
    assert sorted(flat) == sorted(id(example) for example in examples)
    assert order == batches.training_batches(examples, size=4, count=6, seed=3)
    assert order != batches.training_batches(examples, size=4, count=6, seed=4)


@pytest.fixture
def ranks(model):
    return choose_ranks("all_linear", ArmRequest(model, budget_parameters(model, "1/2")))


def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(model, tokens, ranks):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    start = training.mean_loss(model, tokens["validation"])
    result = training.train(model, ranks, tokens, rate=1e-2, seed=0, steps=6)
    assert result["validation_loss"] < start - 0.1
    assert result["adapter_parameters"] == budget_parameters(model, "1/2")
    assert len(result["train_curve"]) == 2
    assert result["cpu_seconds_per_step"] > 0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_a_run_is_the_same_twice_and_another_with_another_seed(model, tokens, ranks):
    losses = [training.train(model, ranks, tokens, rate=1e-2, seed=seed, steps=2)["test_loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_the_base_comes_back_after_an_error_too(model, tokens, ranks):
    before = list(model.state_dict())
    with pytest.raises(RuntimeError, match="stop"), training.adapted(model, ranks, seed=0):
        raise RuntimeError("stop")
    assert list(model.state_dict()) == before


def test_every_module_is_scaled_by_alpha_over_its_own_rank(model):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    with training.adapted(model, {names[0]: 1, names[1]: 4}, seed=0):
        scalings = [model.get_submodule(name).scaling["default"] for name in names]
        adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert scalings == [16.0, 4.0]
    assert adapted == names


def test_a_diverged_run_stops_and_has_no_loss(model, tokens, ranks):
    result = training.train(model, ranks, tokens, rate=1e30, seed=0, steps=5)
    assert result["test_loss"] is None
    assert result["validation_loss"] is None


def test_the_rate_decays_to_zero_without_warm_up(model, tokens, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: (seen.append(self.param_groups[0]["lr"]), step(self, *args))[1]
    )
    with training.adapted(model, {"model.layers.0.self_attn.q_proj": 1}, seed=0):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        training.optimise(model, parameters, [tokens["train"][:2]] * 4, rate=1e-3)
    assert_close(torch.tensor(seen), torch.tensor([1e-3, 7.5e-4, 5e-4, 2.5e-4]))


def test_the_curve_is_the_mean_of_every_five_steps():
    assert training.curve([1.0, 2.0, 3.0, 4.0, 5.0, 7.0]) == [3.0, 7.0]
    assert training.curve([1.0, math.nan]) == [None]
