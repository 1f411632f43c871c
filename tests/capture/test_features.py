# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Features against the dense Jacobian, and training on them against the linear model and a real adapter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from peft_linear import ProximalLoraConfig, Resources
from peft_linear.capture.features import jacobian_features
from peft_linear.capture.linearize import linearize
from peft_linear.capture.ntk import compute_ntk
from peft_linear.errors import PeftLinearError, TargetError
from peft_linear.functional.proximal import factor_proximal_step_
from tests.helpers.linear_models import assert_same, dense_jacobian, plain, snapshot, with_adapter
from tests.helpers.small_models import Recurrent, bert, gpt2, llama, seeded, text_batches


EXACT = {"rtol": 1e-9, "atol": 1e-11}
FAMILIES = {"bert": (bert, {}), "gpt2": (gpt2, {}), "custom": (Recurrent, {})}


def fresh(factory=bert, **kwargs):
    """An adapter on some modules as peft makes it, B = 0, with the task head trained."""
    model = seeded(factory)
    config = {"target_modules": ["query", "output.dense"], "r": 2, "modules_to_save": ["classifier"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(**(config | kwargs))).double().eval()


def features_of(model, batches, **kwargs):
    return jacobian_features(model, batches, progress=False, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_dense_jacobian_column_by_column(family):
    factory, kwargs = FAMILIES[family]
    model = with_adapter(factory, **kwargs)
    batches = text_batches() if family != "custom" else plain(text_batches())
    features = features_of(model, batches)
    linearized = linearize(model)
    dense = torch.cat([dense_jacobian(model, linearized, batch) for batch in plain(batches)])
    split = dict(zip(linearized.names, dense.split([p.numel() for p in linearized.parameters()], 1), strict=True))
    values = dict(model.named_parameters())
    seen = set()
    for number in range(len(dense)):
        for name, value in features.unflatten(features.rows[number]).items():
            assert_close(value.reshape(-1), split[name][number], rtol=1e-7, atol=1e-9)
            seen.add(name)
    assert seen == {name for name, columns in split.items() if columns.any()}
    for name, value in features.unflatten(features.start).items():
        assert_close(value, values[name].detach(), rtol=0, atol=0)
    assert_close(features.flatten(model), features.start, rtol=0, atol=0)
    if family == "custom":
        assert features.pulled == features.rows.shape[1] and features.labels is None
    else:
        assert 0 < features.pulled < features.rows.shape[1] == sum(features.num_parameters.values())


@settings(max_examples=8, deadline=None)
@given(st.sets(st.integers(0, 3), min_size=0, max_size=4))
def test_the_gram_matrix_of_any_subset_is_that_of_compute_ntk(chosen):
    model, batches = seeded(bert), text_batches()
    targets = [f"bert.encoder.layer.{layer}.attention.self.{kind}" for layer in (0, 1) for kind in ("query", "value")]
    features = features_of(model, batches, targets=targets, rank=3, seed=5)
    kernels = compute_ntk(model, batches, targets, rank=3, seed=5, progress=False)
    names = [targets[number] for number in sorted(chosen)]
    part = features.subset(names)
    assert part.names == tuple(name for name in kernels.names if name in names)
    assert_close(part.gram(), kernels.subset(names), **EXACT)
    assert_close(features.outputs, kernels.outputs)
    first, last = features.select_examples([0, 3]), features.select_examples([4, 1, 2])
    rows = [9 + 3, 9 + 4, 9 + 5, 3, 4, 5, 6, 7, 8]
    assert_close(last.gram(first), features.gram()[rows][:, [0, 1, 2, 9, 10, 11]], **EXACT)
    assert last.labels.tolist() == kernels.labels[[4, 1, 2]].tolist()


def test_parameters_of_a_head_outside_linear_layers_have_columns():
    model, batches = seeded(Recurrent), plain(text_batches())
    head = features_of(model, batches, targets=["step"], always_trained=["embed", "head"])
    kernels = compute_ntk(model, batches, ["step"], always_trained=["embed", "head"], progress=False)
    assert kernels.base.any()
    assert_close(head.gram(), kernels.subset(), **EXACT)
    embedding = [c for c in head.columns if c.parameter == "embed.weight"]
    assert len(embedding) == 1 and embedding[0].module == "base"


@pytest.mark.parametrize("start", ["fresh", "trained"])
@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_adamw_on_features_is_adamw_in_the_linear_model(start, mode):
    model = fresh() if start == "fresh" else with_adapter(bert)
    data = text_batches(sizes=(6,))[0]
    features = features_of(model, [data])
    linearized = linearize(model)
    steps, ridge, rates = 8, 3.0, [0.02 / (1 + step) for step in range(8)]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randperm(6, generator=generator)[:3] for _ in range(steps)]
    curve = features.train(
        learning_rate=rates, steps=steps, batches=batches, ridge=ridge, proximal_mode=mode, held_out=features,
        optimizer_arguments={"weight_decay": 0.1, "betas": (0.8, 0.9)},
    )  # fmt: skip

    optimizer = torch.optim.AdamW(linearized.parameters(), lr=1.0, weight_decay=0.1, betas=(0.8, 0.9))
    factors = [(linearized._at(linearized.theta, n), linearized._at(linearized.theta0, n)) for n in linearized.names
               if "lora_" in n]  # fmt: skip
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.zero_grad()
        loss = linearized(**{key: value[batch] for key, value in data.items()}).loss
        if mode == "coupled":
            loss = loss + 0.5 * ridge * sum((now - anchor).square().sum() for now, anchor in factors)
        loss.backward()
        optimizer.step()
        if mode == "decoupled":
            with torch.no_grad():
                factor_proximal_step_([f[0] for f in factors], [f[1] for f in factors], rates[step] * ridge)
    trained = linearized.adapter_state_dict()
    for name, value in features.unflatten(features.start + curve.displacement).items():
        assert_close(value, trained[name], rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        logits = linearized(**plain([data])[0]).logits
    assert_close(curve.outputs, logits, rtol=1e-8, atol=1e-9)
    assert_close(curve.held_out_loss, curve.train_loss, **EXACT)
    assert curve.train_loss[-1] < curve.train_loss[0]


class OneLayer(nn.Module):
    """Affine in the B of an adapter whose A is frozen, so that it is its own linear model."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(5, 4)

    def forward(self, inputs):
        return self.map(inputs)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_real_adapter_on_a_linear_model_trains_exactly_as_predicted(mode, selective, optimizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ProximalLoraConfig(
            r=2, target_modules=["map"], proximal_lambda=2.0, proximal_mode=mode, proximal_selective=selective
        )
        model = get_peft_model(OneLayer(), config).double()
        inputs, labels = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 4
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    features = features_of(model, [{"inputs": inputs, "labels": labels}])
    batches = [torch.tensor([step % 7, (step + 3) % 7]) for step in range(12)]
    curve = features.train(
        learning_rate=lambda step: 0.1 / (1 + step), steps=12, batches=batches, ridge=2.0, proximal_mode=mode,
        selective=selective, optimizer=optimizer, optimizer_arguments={"weight_decay": 0.0},
    )  # fmt: skip
    stepper = optimizer([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.0)
    losses = []
    for step, batch in enumerate([*batches, None]):
        losses.append(nn.functional.cross_entropy(model(inputs=inputs), labels).item())
        if batch is not None:
            stepper.param_groups[0]["lr"] = 0.1 / (1 + step)
            stepper.zero_grad()
            nn.functional.cross_entropy(model(inputs=inputs[batch]), labels[batch]).backward()
            stepper.step()
    assert_close(curve.train_loss, torch.tensor(losses, dtype=torch.float64), **EXACT)
    assert_close(features.flatten(model) - features.start, curve.displacement, **EXACT)


def test_only_the_modules_that_carry_an_adapter_are_taken_of_a_peft_model():
    features = features_of(fresh(), text_batches())
    assert len(features.names) == 6 and all(n.endswith(("query", "output.dense")) for n in features.names)
    assert len(features_of(seeded(bert), text_batches()).names) > 6
    assert "6 modules, 5 examples, 15 rows of" in repr(features)
    on_meta = features.to("meta")
    assert on_meta.rows.device.type == "meta" and on_meta.labels.device.type == "meta"


def test_the_model_is_left_as_it_was_found_and_float32_stays_float32():
    model = fresh().train()
    before = snapshot(model)
    features_of(model, text_batches())
    assert_same(before, snapshot(model))
    good, bad = text_batches()
    bad["input_ids"][0, 0] = 10_000  # no such token
    with pytest.raises(IndexError):
        features_of(model, [good, bad])
    assert_same(before, snapshot(model))
    assert features_of(fresh().float(), text_batches()).rows.dtype == torch.float32


def test_rows_that_need_more_memory_than_there_may_be_are_refused():
    with pytest.raises(
        PeftLinearError, match=r"15 rows of [0-9,]+ numbers take .* more than max_memory=1KB; take fewer"
    ):
        features_of(fresh(), text_batches(), resources=Resources(max_memory="1KB"))


def of_another_adapter(features):
    return features.subset(features.names[:1])


BAD_CALLS = [
    (lambda f: f.subset("nothing"), "no features of 'nothing'; there are: bert"),
    (lambda f: f.gram(of_another_adapter(f)), "different parameters; take the same subset of both"),
    (
        lambda f: f.train(learning_rate=0.1, steps=1, held_out=of_another_adapter(f)),
        "different parameters; take the same subset of both",
    ),
    (lambda f: f.flatten(seeded(bert)), "no parameter 'base_model.*lora_B.default.weight' there"),
    (
        lambda f: f.flatten({column.parameter: torch.zeros(3, 3) for column in f.columns}),
        "has shape .* which does not belong to the features",
    ),
]


@pytest.mark.parametrize("call, message", BAD_CALLS)
def test_a_call_with_other_parameters_is_refused_by_name(call, message):
    features = features_of(fresh(), text_batches())
    with pytest.raises(TargetError, match=message):
        call(features)


def test_features_without_labels_are_not_trained_on():
    with pytest.raises(PeftLinearError, match="no labels to train on"):
        features_of(fresh(), plain(text_batches())).train(learning_rate=0.1, steps=1)


def test_columns_of_adapters_that_no_model_carries_have_no_names():
    with pytest.raises(TargetError, match="carried no adapter when its features were taken"):
        features_of(seeded(llama), text_batches()).unflatten(torch.zeros(100_000))
