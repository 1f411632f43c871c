# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""KL(pretrained ‖ tuned): against probabilities written out, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_linear import kl_to_base, kl_to_base_loss
from peft_linear.errors import OutputError, PeftLinearError
from peft_linear.proximal import kl as kl_module
from tests.helpers import small_models
from tests.helpers.language import chat_tokenizer, language_model, words


TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "value"]}


def tuned(base, kind="llama", dtype=torch.float64, **options):
    """An adapter that changes the outputs."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=TARGETS[kind], init_lora_weights=False, **options)
    return get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype)


def llama(**kwargs):
    return small_models.seeded(small_models.llama, True, **kwargs)


def by_hand(model, base, batches):
    """One row of logits at a time, full probabilities."""
    total, count = 0.0, 0
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            now, before = model(**inputs).logits, base(**inputs).logits
        for row in range(len(now)):
            for position in range(now.shape[1] - 1):
                if batch["labels"][row, position + 1] == -100:
                    continue
                p, q = before[row, position].softmax(-1), now[row, position].softmax(-1)
                total, count = total + float((p * (p / q).log()).sum()), count + 1
    return total / count


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("positions", [1, 3, 256])
def test_it_is_the_mean_over_predicted_labels(padding, positions, monkeypatch):
    monkeypatch.setattr(kl_module, "POSITIONS", positions)
    batches = small_models.causal_batches(length=12, padding=padding)
    base = llama()
    model = tuned(copy.deepcopy(base))
    expected = by_hand(model, base, batches)
    assert expected > 1e-3
    assert kl_to_base(model, batches) == pytest.approx(expected, rel=1e-10)


def test_an_adapter_that_changes_nothing_has_none():
    model = get_peft_model(llama(), LoraConfig(target_modules=TARGETS["llama"]), autocast_adapter_dtype=False)
    assert kl_to_base(model, small_models.causal_batches()) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_labels_all_but_padding_counts_and_padding_changes_nothing(side):
    model = tuned(llama())
    ids = torch.randint(2, 40, (1, 9), generator=torch.Generator().manual_seed(3))
    parts, mask = [ids, torch.zeros(1, 4, dtype=torch.long)], (torch.arange(13) < 9).long().unsqueeze(0)
    if side == "left":
        parts, mask = parts[::-1], mask.flip(1)
    padded = {"input_ids": torch.cat(parts, dim=1), "attention_mask": mask}
    padded["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    assert kl_to_base(model, [padded]) == pytest.approx(kl_to_base(model, [{"input_ids": ids}]), rel=1e-10)


def test_texts_are_tokenised():
    tokenizer, model = chat_tokenizer(), tuned(language_model(), dtype=torch.float32)
    texts = [words(i, 6) for i in range(5)]
    batches = [dict(tokenizer([text], return_tensors="pt")) for text in texts]
    assert kl_to_base(model, texts, tokenizer=tokenizer) == pytest.approx(kl_to_base(model, batches), rel=1e-5)


def test_a_classifier_counts_examples_and_a_trained_head_is_the_pretrained_one_in_the_base():
    base = small_models.seeded(small_models.bert)
    model = tuned(copy.deepcopy(base), "bert", task_type="SEQ_CLS")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3)
    batches = small_models.text_batches()
    values = []
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p, q = base(**inputs).logits.softmax(-1), model(**inputs).logits.softmax(-1)
        values.append((p * (p / q).log()).sum(-1))
    assert kl_to_base(model, batches) == pytest.approx(float(torch.cat(values).mean()), rel=1e-10)


def test_the_loss_has_the_gradient_of_autograd_through_full_probabilities():
    base = llama()
    model = tuned(copy.deepcopy(base))
    batch = small_models.causal_batches(length=12)[0]
    kl_to_base_loss(model, batch).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    p, q = base(**inputs).logits[:, :-1].softmax(-1).detach(), model(**inputs).logits[:, :-1].softmax(-1)
    counts = batch["labels"][:, 1:] != -100
    ((p * (p / q).log()).sum(-1)[counts].mean()).backward()
    assert found and all("lora" in name for name in found)
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-13)


def test_the_model_is_left_as_it_was_found():
    model = tuned(llama())
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    before = {name: p.clone() for name, p in model.named_parameters()}
    kl_to_base(model, small_models.causal_batches())
    kl_to_base_loss(model, small_models.causal_batches()[0])
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_is_off():
    base = language_model()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS["llama"], lora_dropout=0.5)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batches = [{"input_ids": torch.arange(2, 12).unsqueeze(0)}]
    assert kl_to_base(model, batches) == kl_to_base(model, batches) > 0


def test_what_cannot_be_measured_is_refused():
    batches = small_models.causal_batches()
    with pytest.raises(PeftLinearError, match="the model has no adapter"):
        kl_to_base(llama(), batches)
    model = tuned(llama())
    with pytest.raises(PeftLinearError, match="pass tokenizer="):
        kl_to_base(model, ["a text"])
    with pytest.raises(PeftLinearError, match="`batches` is empty"):
        kl_to_base(model, [])
    nothing = {"input_ids": torch.ones(2, 1, dtype=torch.long)}
    with pytest.raises(OutputError, match="the reference predicts nothing"):
        kl_to_base(model, [nothing])
    with pytest.raises(OutputError, match="the batch predicts nothing"):
        kl_to_base_loss(model, nothing)
    model.merge_adapter()
    with pytest.raises(PeftLinearError, match="an adapter is merged"):
        kl_to_base(model, batches)
    model.unmerge_adapter()
    nn.init.constant_(next(p for n, p in model.named_parameters() if "lora_B" in n), float("nan"))
    with pytest.raises(OutputError, match="NaN or inf"):
        kl_to_base(model, batches)
