# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The reference of function space: what is collected, how it travels with an adapter, the KL that it stands for."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from peft_linear import ProximalLoraConfig, ProximalReference, collect_reference, set_proximal_reference
from peft_linear.errors import FileError, OutputError, PeftLinearError
from peft_linear.proximal import proximal_distance, proximal_summary
from peft_linear.tuners.proximal_lora.reference import REFERENCE_NAME
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers import small_models
from tests.helpers.language import chat_tokenizer
from tests.helpers.proximal_bert import base, logits, proximal, train
from tests.helpers.quantised import quantised
from tests.helpers.reference_proximal import lora_parameters
from tests.reference import reference_statistics


def collect(model, batches, **kwargs):
    return collect_reference(model, batches, **{"progress": False, "rank": 64} | kwargs)


def dense(moment):
    return torch.diag(moment.diagonal) + moment.factors.T @ moment.factors


def llama():
    return small_models.seeded(small_models.llama, True)


def generator_batches():
    """Answers of different tokens: keys that are equal would leave the gradients of queries to rounding."""
    batches = small_models.text_batches(length=30)
    for batch in batches:
        size, length = batch["input_ids"].shape
        batch["labels"] = torch.stack([torch.randperm(40)[:length] + 2 for _ in range(size)])
    return batches


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (llama, partial(small_models.causal_batches, length=30)),
        (lambda: small_models.seeded(small_models.gpt2, True), small_models.causal_batches),
        (lambda: small_models.seeded(small_models.bert), small_models.text_batches),
        (lambda: small_models.seeded(small_models.t5_generator), generator_batches),
    ],
    ids=["llama", "gpt2", "bert", "t5"],
)
def test_the_statistics_are_those_of_autograd(make, batches):
    """C and g of every module from per-token gradients, with the labels that were sampled."""
    model, data = make(), batches()
    reference = collect(model, data)
    moments, scales = reference_statistics(model, data, reference.names, seed=0)
    for name in reference.names:
        expected = moments[reference.inputs[name]]
        assert torch.allclose(dense(reference.moment(name)), expected, rtol=1e-9, atol=1e-9), name
        assert reference.scales[name] == pytest.approx(scales[name], rel=1e-9), name


@pytest.mark.parametrize(("kind", "difference"), [("int8", 0.1), ("nf4", 0.5)])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_over_a_quantised_base_the_statistics_are_its_own_and_the_pull_acts(kind, difference):
    batches = small_models.text_batches()
    found = collect(quantised(kind), batches, targets=["query", "value"])
    expected = collect(small_models.seeded(small_models.bert, hidden_size=64, intermediate_size=128), batches)
    for name in found.names:
        own, near = dense(found.moment(name)), dense(expected.moment(name))
        assert 0 < float((own - near).norm() / near.norm()) < difference
    ends = []
    for strength in (0.0, 30.0):
        options = {"target_modules": ["query", "value"], "r": 2, "task_type": "SEQ_CLS"}
        config = ProximalLoraConfig(proximal_lambda=strength, proximal_space="function", **options)
        model = get_peft_model(quantised(kind), config)
        set_proximal_reference(model, found)
        ends.append(proximal_distance(train(model), space="function"))
    assert 0 < ends[1] < 0.5 * ends[0]


def test_modules_with_one_input_share_its_moment():
    """Queries of a last layer have no influence at positions without a label, so here every token has one."""
    batches = small_models.text_batches(length=30)
    reference = collect(llama(), [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches])
    layer = "model.layers.0"
    assert reference.inputs[f"{layer}.self_attn.k_proj"] == reference.inputs[f"{layer}.self_attn.v_proj"]
    assert reference.inputs[f"{layer}.mlp.up_proj"] == reference.inputs[f"{layer}.mlp.gate_proj"]
    assert len(reference.moments) == 8  # of 14 modules
    assert reference.moment(f"{layer}.self_attn.q_proj") is reference.moment(f"{layer}.self_attn.v_proj")


def test_padding_does_not_count():
    """A batch padded further gives the same statistics."""
    model = llama()
    batches = small_models.text_batches(sizes=(3,))
    longer = [{key: F.pad(batch[key], (0, 4)) for key in ("input_ids", "attention_mask")} for batch in batches]
    plain = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
    first, second = collect(model, plain), collect(model, longer)
    assert first.tokens == second.tokens == int(plain[0]["attention_mask"][:, 1:].sum())
    for name in first.names:
        assert torch.allclose(dense(first.moment(name)), dense(second.moment(name)), rtol=1e-9, atol=1e-12)
        assert first.scales[name] == pytest.approx(second.scales[name], rel=1e-9)


def test_the_model_is_left_as_it_was_found_and_its_adapter_does_not_count():
    model = llama()
    expected = collect(model, small_models.causal_batches())
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)).double()
    wrapped.train()
    state = {name: value.clone() for name, value in wrapped.state_dict().items()}
    wants = [parameter.requires_grad for parameter in wrapped.parameters()]
    random = torch.get_rng_state()
    found = collect(wrapped, small_models.causal_batches())
    assert torch.equal(random, torch.get_rng_state())
    assert [parameter.requires_grad for parameter in wrapped.parameters()] == wants
    assert wrapped.training
    assert not wrapped.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters
    assert all(torch.equal(value, state[name]) for name, value in wrapped.state_dict().items())
    assert not any(module._forward_hooks for module in wrapped.modules())
    assert found.scales == expected.scales
    assert found.names == expected.names


def test_texts_are_tokenised_and_one_seed_gives_one_reference():
    model, tokenizer = llama(), chat_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    texts = [f"a sentence of the reference, number {number}" for number in range(10)]
    first = collect_reference(model, texts, tokenizer=tokenizer, progress=False)
    second = collect_reference(model, texts, tokenizer=tokenizer, progress=False)
    other = collect_reference(model, texts, tokenizer=tokenizer, seed=1, progress=False)
    assert first.scales == second.scales != other.scales
    assert first.tokens > 20


def test_bad_references_are_refused():
    model = llama()
    with pytest.raises(PeftLinearError, match="pass tokenizer="):
        collect(model, ["a text"])
    with pytest.raises(PeftLinearError, match="one text"):
        collect(model, "a text")
    with pytest.raises(PeftLinearError, match="empty"):
        collect(model, [])
    with pytest.raises(PeftLinearError, match="not empty, got ' '"):
        collect(model, ["a", " "], tokenizer=chat_tokenizer())
    with pytest.raises(PeftLinearError, match="rank must be"):
        collect(model, small_models.causal_batches(), rank=0)
    with pytest.raises(OutputError, match="no prediction of the reference counts"):
        collect(model, [{"input_ids": torch.ones(2, 1, dtype=torch.long)}])
    broken = llama()
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(OutputError, match="NaN or inf"):
        collect(broken, small_models.causal_batches())
    merged = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    merged.merge_adapter()
    with pytest.raises(PeftLinearError, match="unmerge_adapter"):
        collect(merged, small_models.causal_batches())


def test_a_large_reference_is_announced_and_unused_modules_too(monkeypatch):
    monkeypatch.setattr("peft_linear.proximal.collect.SMALL", 0)
    with pytest.warns(UserWarning, match="of the model, in memory and beside every saved adapter"):
        collect(llama(), small_models.causal_batches())
    model = small_models.seeded(small_models.bert)
    model.extra = nn.Linear(4, 4).double()
    model.extra.requires_grad_(False)
    with pytest.warns(UserWarning, match="no influence on a prediction of the reference"):
        collect(model, small_models.text_batches(), targets=["query", "extra"])


# --- with an adapter ----------------------------------------------------------------------------------------------


def bert_reference(**kwargs):
    return collect(base(), small_models.text_batches(), rank=8, **kwargs)


def functional(**kwargs):
    model = proximal(proximal_space="function", lam=20.0, **kwargs)
    set_proximal_reference(model, bert_reference())
    return model


def test_a_step_without_a_reference_says_what_to_do():
    with pytest.raises(PeftLinearError, match="call set_proximal_reference"):
        train(proximal(proximal_space="function"))
    train(proximal(proximal_space="function", lam=0.0))  # plain LoRA needs none


def test_references_that_do_not_fit_are_refused():
    model = proximal(proximal_space="function")
    with pytest.raises(PeftLinearError, match="no statistics of 'bert.encoder.layer.0.attention.self.query'"):
        set_proximal_reference(model, bert_reference(targets=["value"]))
    wider = small_models.seeded(small_models.bert, hidden_size=32, dtype=torch.float32)
    with pytest.raises(PeftLinearError, match="inputs of width 32"):
        set_proximal_reference(model, collect(wider, small_models.text_batches()))
    with pytest.raises(PeftLinearError, match="must be a ProximalReference, got dict"):
        set_proximal_reference(model, {})
    with pytest.raises(PeftLinearError, match="has no ProximalLoRA adapter 'other'"):
        set_proximal_reference(model, bert_reference(), "other")
    embedding = get_peft_model(
        base(), ProximalLoraConfig(target_modules=["word_embeddings"], proximal_space="function")
    )
    with pytest.raises(PeftLinearError, match="defined for linear layers"):
        set_proximal_reference(embedding, bert_reference())


def test_the_file_is_equal_bit_for_bit_and_changes_are_noticed(tmp_path):
    reference = bert_reference()
    path = tmp_path / "reference.safetensors"
    reference.save(path)
    loaded = ProximalReference.load(path)
    assert (loaded.inputs, loaded.scales, loaded.shares) == (reference.inputs, reference.scales, reference.shares)
    assert (loaded.tokens, loaded.rank, str(loaded)) == (reference.tokens, reference.rank, str(reference))
    for key, moment in reference.moments.items():
        assert torch.equal(loaded.moments[key].factors, moment.factors)
        assert torch.equal(loaded.moments[key].diagonal, moment.diagonal)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(bytes(content))
    with pytest.raises(FileError, match="was changed after it was saved"):
        ProximalReference.load(tmp_path / "changed.safetensors")
    save_file(load_file(path), tmp_path / "other.safetensors")
    with pytest.raises(FileError, match="not a reference file"):
        ProximalReference.load(tmp_path / "other.safetensors")
    with pytest.raises(FileError, match="cannot be read"):
        ProximalReference.load(tmp_path / "none.safetensors")


def test_it_travels_with_the_adapter(tmp_path):
    """Saved beside it, found by a trainable load, and used: two more steps are those of the model that went on."""
    model = train(functional())
    model.save_pretrained(tmp_path)
    assert (tmp_path / REFERENCE_NAME).exists()
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    for each in (model, loaded):
        train(each, steps=2)
    assert torch.equal(logits(loaded), logits(model))
    assert proximal_distance(loaded) == proximal_distance(model) > 0
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / REFERENCE_NAME).exists()


def test_an_old_reference_is_not_left_beside_another_adapter(tmp_path):
    functional().save_pretrained(tmp_path)
    proximal().save_pretrained(tmp_path)
    assert not (tmp_path / REFERENCE_NAME).exists()


def test_copies_have_it_and_step_alike():
    model = functional()
    other = copy.deepcopy(model)
    for each in (model, other):
        train(each)
    assert torch.equal(logits(other), logits(model))


def test_it_pulls_and_a_stronger_pull_leaves_the_pretrained_outputs_nearer():
    distances = []
    for lam in (0.0, 20.0, 2000.0):
        model = proximal(proximal_space="function", lam=lam)
        set_proximal_reference(model, bert_reference())
        train(model)
        distances.append(proximal_distance(model, space="function"))
        assert proximal_summary(model)["proximal_distance_function"] == pytest.approx(distances[-1])
    assert distances[0] > distances[1] > 10 * distances[2] > 0


def test_low_precision_factors_are_pulled_as_float32_ones():
    """λ·η is below the last bit of bfloat16, so that a pull of the factors themselves would be rounded away."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = functional()
        with torch.no_grad():
            for name, parameter in lora_parameters(model).items():
                torch.manual_seed(len(name))
                parameter.copy_(torch.randn_like(parameter).bfloat16().float())
        for parameter in lora_parameters(model).values():
            parameter.data = parameter.data.to(dtype)
        optimizer = torch.optim.SGD(lora_parameters(model).values(), lr=2e-5)
        for _ in range(60):
            for parameter in lora_parameters(model).values():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        ends.append(proximal_distance(model))
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


def test_every_adapter_has_its_own():
    model = functional()
    options = {"target_modules": ["key"], "r": 2, "proximal_space": "function"}
    model.add_adapter("second", ProximalLoraConfig(proximal_lambda=1.0, **options))
    model.set_adapter("second")
    with pytest.raises(PeftLinearError, match="'second' has no reference"):
        train(model, steps=1)
    set_proximal_reference(model, bert_reference(), "second")
    train(model, steps=1)
    first, second = (find_adapters(model, name)[0].reference() for name in ("default", "second"))
    assert first is not second


# --- the KL that it stands for ------------------------------------------------------------------------------------


class Softmax(nn.Module):
    """One linear layer under a softmax; with a weight of zero the probabilities are those of the bias, everywhere."""

    def __init__(self, weight=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 5).double()
        with torch.no_grad():
            self.layer.weight.mul_(weight)
            self.layer.bias.copy_(torch.randn(5))

    def forward(self, features):
        return self.layer(features)


def kl(model, features, change):
    before = model(features).log_softmax(-1)
    after = (model(features) + features @ change.T).log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean().detach())


def half_distance(reference, change, name="layer"):
    return reference.scales[name] * float(torch.trace(change @ dense(reference.moment(name)) @ change.T)) / 2


def test_half_the_distance_is_the_kl_to_second_order_where_the_factors_hold():
    """One linear layer under a softmax, whose probabilities do not depend on the inputs, so that F = S ⊗ C.

    With S ≈ g·I the two agree summed over all directions of a basis, not one by one. g is sampled: within 1 % here.
    """
    torch.manual_seed(1)
    model, features = Softmax(), torch.randn(40000, 6, dtype=torch.float64)
    reference = collect(model, [{"features": features}], targets=["layer"])
    amount = 1e-4
    basis = [torch.zeros(5, 6, dtype=torch.float64) for _ in range(30)]
    for place, change in enumerate(basis):
        change.view(-1)[place] = amount
    measured = sum(kl(model, features, change) for change in basis)
    p = model(features)[0].softmax(-1)
    exact = float((1 - p.square().sum()) / 5)  # tr S / d_out, S = diag(p) − ppᵀ
    assert reference.scales["layer"] == pytest.approx(exact, rel=0.01)
    expected = sum(half_distance(reference, change) for change in basis) * exact / reference.scales["layer"]
    assert measured == pytest.approx(expected, rel=1e-3)


def test_elsewhere_it_is_of_the_right_size():
    """A trained-like decoder, random changes of one module each: the KL is within a factor of 4, on average of 1.6."""
    model, data = llama(), small_models.causal_batches(sizes=(8, 8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name:
                parameter.mul_(0.5)
    reference = collect(model, data)
    ratios = []
    for name in reference.names:
        module = model.get_submodule(name)
        torch.manual_seed(len(ratios))
        change = 1e-3 * torch.randn_like(module.weight)
        before = [model(**batch).logits.log_softmax(-1) for batch in data]
        with torch.no_grad():
            module.weight += change
        after = [model(**batch).logits.log_softmax(-1) for batch in data]
        with torch.no_grad():
            module.weight -= change
        total = count = 0.0
        for batch, one, other in zip(data, before, after, strict=True):
            counted = (batch["labels"] != -100)[:, 1:]
            total += float(((one.exp() * (one - other)).sum(-1)[:, :-1] * counted).sum())
            count += int(counted.sum())
        ratios.append(half_distance(reference, change, name) / (total / count))
    logs = torch.tensor(ratios).log()
    assert float(logs.abs().max()) < torch.tensor(4.0).log()
    assert float(logs.abs().mean()) < torch.tensor(1.6).log()
