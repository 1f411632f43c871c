# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The paper's experiments: what is trained and what is computed of the model before; on a tiny model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig, GPT2Config, RobertaConfig

from examples.paper import predictors, strength, tasks, training
from peft_linear import linearize
from peft_linear.functional.regression import simulate_training
from tests.helpers.paper_data import as_on_the_hub


@pytest.fixture(scope="module")
def task(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    as_on_the_hub("sst2").save_to_disk(folder / "sst2")
    return tasks.load_paper_task(tiny, "sst2", str(folder / "sst2"), max_length=8)


@pytest.fixture(scope="module")
def layers(task):
    return training.projections_by_layer(task.new_model(0))


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (BertConfig(num_attention_heads=2, intermediate_size=8), "bert.encoder.layer.0.attention.self.query"),
        (RobertaConfig(num_attention_heads=2, intermediate_size=8), "roberta.encoder.layer.0.attention.self.query"),
        (DistilBertConfig(n_heads=2, hidden_dim=8, dim=8), "distilbert.transformer.layer.0.attention.q_lin"),
        (GPT2Config(n_head=2, n_embd=8), "transformer.h.0.attn.c_attn"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "vocab_size") else "",
)
def test_projections_are_found_by_layer(config, first):
    config.vocab_size, config.hidden_size, config.num_hidden_layers = 16, 8, 3
    found = training.projections_by_layer(AutoModelForSequenceClassification.from_config(config))
    assert list(found) == [0, 1, 2] and found[0][0] == first
    assert {len(names) for names in found.values()} == {1 if isinstance(config, GPT2Config) else 3}
    with pytest.raises(SystemExit, match="has no layers with modules called"):
        training.projections_by_layer(torch.nn.Linear(2, 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.data())
def test_choices_of_layers_differ_and_balance_sizes(count, data):
    wanted = data.draw(st.integers(1, min(2**count - 1, 60)))
    choices = predictors.layer_choices(range(count), wanted)
    assert len(set(choices)) == wanted == len(choices)
    assert all(choice == tuple(sorted(set(choice))) and set(choice) <= set(range(count)) for choice in choices)
    of_size = [sum(len(choice) == size for choice in choices) for size in range(1, count + 1)]
    exhausted = [n == math.comb(count, size) for size, n in enumerate(of_size, start=1)]
    assert all(n >= max(of_size) - 1 or full for n, full in zip(of_size, exhausted, strict=True))
    assert choices == predictors.layer_choices(range(count), wanted)


def test_too_many_choices_are_refused():
    assert len(predictors.layer_choices([0, 1, 2], 7)) == 7
    with pytest.raises(SystemExit, match="3 layers have 7 non-empty sets; cannot choose 8"):
        predictors.layer_choices([0, 1, 2], 8)


def test_the_pull_on_factors_is_that_of_proximal_lora(task, layers):
    """Two ways to one run: the adapter type's hooks, and the pull that the linear model and the head get."""
    protocol = training.Protocol(epochs=2, rank=2)
    names = [name for of_layer in layers.values() for name in of_layer]
    ends = []
    for pull in (30.0, None):
        model = training.adapted(task.new_model(0), names, protocol, pull)
        optimizer = training.make_optimizer(training.trained_parameters(model), "adamw", 4e-3)
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if pull is None:
            anchors = {name: p.detach().clone() for name, p in own.items()}
            term = strength.attach(optimizer, own, anchors, "factors", 30.0)
        training.fit(model, task, 0, protocol, optimizer, "cross_entropy")
        ends.append({name: p.detach().clone() for name, p in own.items()})
    for name, end in ends[0].items():
        torch.testing.assert_close(ends[1][name], end, rtol=1e-5, atol=1e-8)
    assert term.steps == protocol.steps(task) and 0 < term.firing_rate < 1


@pytest.mark.parametrize("pulled", ["always", "everything", "factors", "nothing"])
def test_near_the_start_both_models_are_trained_alike(task, layers, pulled):
    """To first order the linear model's run is the real one's: same batches, rates, optimizer and proximal term."""
    protocol = training.Protocol(epochs=2, rank=2, learning_rate=1e-7)
    names = [name for of_layer in layers.values() for name in of_layer]
    pull = 0.0 if pulled == "nothing" else 3e6  # ηλ up to 0.3
    model = training.adapted(task.new_model(0).double(), names, protocol, pull if pulled == "factors" else None)
    model.double()
    linearized = linearize(model)
    anchors = linearized.anchor_state_dict()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = training.make_optimizer(list(own.values()), "adamw", protocol.learning_rate)
    if pulled in ("always", "everything"):
        strength.attach(optimizer, own, anchors, pulled, pull)
    training.fit(model, task, 0, protocol, optimizer, "cross_entropy")
    strength.fit_linear(linearized, task, 0, protocol, pulled, pull)
    moved, compared = linearized.displacement(), 0
    for name, parameter in own.items():
        real = parameter.detach() - anchors[name]
        if "lora_A" in name:
            assert not moved[name].any()  # B = 0: f does not depend on A to first order
        elif float(real.norm()) > 0:
            assert float((moved[name] - real).norm()) < 0.02 * float(real.norm()), name
            compared += 1
    assert compared >= 8  # B of two layers' q, k, v, and the head's weight and bias


def test_a_strong_pull_holds_what_is_pulled_and_no_more(task, layers):
    protocol = training.Protocol(epochs=3, rank=2)
    kinds = ("nothing", "always", "everything", "factors")
    runs = {
        kind: strength.run(task, layers[0], kind, 0.0 if kind == "nothing" else 1e9, 0, protocol) for kind in kinds
    }
    for field in ("distance", "linear_distance"):
        factors = {kind: run[field]["factors"] for kind, run in runs.items()}
        head = {
            kind: math.sqrt(run[field]["everything"] ** 2 - run[field]["factors"] ** 2) for kind, run in runs.items()
        }
        assert factors["always"] < 1e-6 and head["always"] < 1e-6
        assert factors["everything"] < 0.6 * factors["nothing"] and head["everything"] < 0.6 * head["nothing"]
        assert factors["factors"] < 0.85 * factors["nothing"] and head["factors"] > 0.9 * head["nothing"]
    assert runs["always"]["firing_rate"] == runs["always"]["linear_firing_rate"] == 1.0
    assert all(0 < runs[kind]["firing_rate"] < 1 for kind in ("everything", "factors"))
    assert runs["nothing"]["firing_rate"] is None is runs["nothing"]["linear_firing_rate"]


def test_a_head_trained_first_leaves_the_rest_as_it_was(task):
    protocol = training.Protocol(epochs=1)
    plain, trained = (training.with_trained_head(task, 0, protocol, epochs) for epochs in (0, 3))
    changed = [
        name for name, p in trained.named_parameters() if not torch.equal(p, dict(plain.named_parameters())[name])
    ]
    assert set(changed) == {"classifier.weight", "classifier.bias"}
    losses = [training.score(model, task, task.train, "cross_entropy").loss for model in (plain, trained)]
    assert losses[1] < losses[0]


def test_squared_loss_and_cross_entropy_are_means():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
    assert float(training.loss_of(logits, labels, "squared")) == pytest.approx((0.5 * 1 + 0.5 * 10) / 2)
    expected = -(logits.log_softmax(1)[:, 0]).mean()
    assert float(training.loss_of(logits, labels, "cross_entropy")) == pytest.approx(float(expected))


def test_micro_batches_change_nothing(task, layers):
    ends = []
    for micro in (16, 5):
        protocol = training.Protocol(epochs=1, rank=2, micro_batch=micro)
        model = training.adapted(task.new_model(0).double(), layers[1], protocol).double()
        optimizer = training.make_optimizer(training.trained_parameters(model), "sgd", 0.5)
        training.fit(model, task, 0, protocol, optimizer, "squared")
        ends.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_run_that_diverges_is_scored_as_the_worst(task, layers):
    protocol = training.Protocol(epochs=2, rank=2)
    model = training.adapted(task.new_model(0), layers[0], protocol)
    optimizer = training.make_optimizer(training.trained_parameters(model), "sgd", 1e30)
    training.fit(model, task, 0, protocol, optimizer, "squared")
    assert training.score(model, task, task.train, "squared").loss == float("inf")


@pytest.fixture(scope="module")
def start(task, layers):
    protocol = training.Protocol(rank=2, lora_alpha=6)
    return predictors.kernels_at_start(task, layers, 0, protocol, 12), protocol


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_the_kernel_is_of_the_adapters_that_are_trained(task, layers, start, loss):
    """Gradient energy, from the kernel, is the squared gradient of the loss in what a run on these layers trains."""
    at_start, protocol = start
    model = training.adapted(task.new_model(0), layers[1], protocol)
    model = training.start_from(model, at_start.matrices).double().eval()
    (batch,) = task.calibration(12, seed=0)
    labels = batch.pop("labels")
    training.loss_of(model(**batch).logits, labels, loss).backward()
    energy = sum(float(p.grad.square().sum()) for p in model.parameters() if p.requires_grad)
    assert predictors.predictors(at_start, layers[1], loss)["gradient_energy"] == pytest.approx(energy, rel=1e-9)
    matrices = [(name, p) for name, p in model.named_parameters() if "lora_A" in name]
    assert len(matrices) == 3 and all(torch.equal(p.float(), at_start.matrices[name]) for name, p in matrices)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_the_rate_of_sgd_never_raises_the_linear_models_loss(layers, start, loss):
    kernels = start[0].kernels
    rate = predictors.stable_rate(kernels, loss)
    for names in (layers[0], kernels.names):
        gram = kernels.subset(names)
        curve = simulate_training(gram, kernels.outputs, kernels.labels, learning_rate=rate, steps=30, loss=loss)
        assert bool((curve.train_loss.diff() <= 1e-12).all()) and curve.train_loss[-1] < curve.train_loss[0]
