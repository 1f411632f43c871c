# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""compute_ntk on language models, mixtures of experts, checkpointed and half-precision models."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from peft_linear.errors import OutputError, TargetError
from peft_linear.functional.outputs import RandomProjection
from tests import reference
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk


EXACT = {"rtol": 1e-10, "atol": 1e-12}


def check_weights(model, kernels, batches, output):
    parameters = dict(model.named_parameters())
    for name in kernels.names:
        expected = reference.kernel(model, [parameters[f"{name}.weight"]], batches, output)
        assert_close(kernels[name], expected, **EXACT)


def test_attention_of_a_mixture_of_experts_is_exact_and_its_experts_are_refused_by_name():
    model, batches = small.seeded(small.mixtral), small.causal_batches()
    if any("experts.0." in name for name, _ in model.named_modules()):
        pytest.skip("the experts of this version of transformers are linear modules, and targets")
    kernels = ntk(model, batches, space="weight", outputs="log_likelihood")
    assert all("self_attn" in name for name in kernels.names) and len(kernels) == 8
    check_weights(model, kernels, batches, reference.sequence_log_likelihood)
    with pytest.raises(TargetError, match=r"not a linear layer.*mlp\.experts .MixtralExperts"):
        ntk(model, batches, targets=["experts"], outputs="log_likelihood")


def t5_log_likelihood(model, batch):
    scores = model(**batch).logits[0]
    labels = batch["labels"][0]
    return sum(torch.log_softmax(scores[t], 0)[y] for t, y in enumerate(labels.tolist()) if y != -100).reshape(1)


def test_an_encoder_decoder_makes_its_decoder_inputs_from_the_labels():
    model = small.seeded(small.t5_generator)
    batches = small.t5_batches()
    for batch in batches:
        batch["labels"] = batch["input_ids"][:, :5].clone()
        batch["labels"][0, 3:] = -100
    kernels = ntk(model, batches, space="weight", outputs="log_likelihood")
    check_weights(model, kernels, batches, t5_log_likelihood)


def test_loss_is_the_mean_negative_log_likelihood_of_the_labelled_tokens():
    model, batches = small.seeded(small.llama, causal=True), small.causal_batches()
    options = {"space": "weight", "targets": ["layers.0.mlp.down_proj"]}
    total = ntk(model, batches, outputs="log_likelihood", **options)
    mean = ntk(model, batches, outputs="loss", **options)
    counts = torch.cat([(batch["labels"][:, 1:] != -100).sum(1) for batch in batches]).double()
    assert_close(mean.outputs[:, 0] * counts, -total.outputs[:, 0], **EXACT)
    (name,) = mean.names
    # Llama's norms compute in float32, so a cotangent of another scale is rounded differently
    assert_close(mean[name] * torch.outer(counts, counts), total[name], rtol=1e-5, atol=1e-8)


def test_random_projections_of_tokens_are_unbiased_for_the_sum_over_tokens_and_vocabulary():
    model = small.seeded(small.llama, causal=True, vocab_size=6, num_hidden_layers=1)
    batches = small.causal_batches(length=5)
    for batch in batches:
        batch["input_ids"] %= 6
        batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 6)
    (name,) = ("model.layers.0.mlp.down_proj",)
    k = 2000
    projected = ntk(model, batches, space="weight", targets=[name], outputs=RandomProjection(k))
    n = projected.num_examples
    estimate = projected[name].view(n, k, n, k).diagonal(dim1=1, dim2=3).sum(-1)

    weight = dict(model.named_parameters())[f"{name}.weight"]
    rows: list[dict] = []  # by example: {(number of the labelled token, vocabulary entry): gradient}
    for batch in batches:
        for one in reference.example_batches(batch):
            scores = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits[0]
            places = [t for t in range(len(scores) - 1) if one["labels"][0, t + 1] != -100]
            rows.append(
                {
                    (p, v): torch.autograd.grad(scores[t, v], weight, retain_graph=True)[0].reshape(-1)
                    for p, t in enumerate(places)
                    for v in range(6)
                }
            )
    exact = torch.tensor(
        [[float(sum(left[key] @ right[key] for key in left.keys() & right.keys())) for right in rows] for left in rows]
    ).double()
    assert float((estimate - exact).norm() / exact.norm()) < 0.15


def test_gradient_checkpointing_changes_nothing():
    model, batches = small.seeded(small.bert), small.text_batches()
    expected = ntk(model, batches)
    model.gradient_checkpointing_enable()
    model.train()
    got = ntk(model, batches)
    assert model.training
    for name in expected.names:
        assert_close(got[name], expected[name], **EXACT)


def test_inputs_that_require_gradients_of_their_own_change_nothing():
    model = small.seeded(small.llama)
    plain = small.text_batches(padding="left")
    embedded = []
    for batch in plain:
        inputs = model.get_input_embeddings()(batch["input_ids"]).detach()
        embedded.append({"inputs_embeds": inputs, "attention_mask": batch["attention_mask"]})
    expected = [ntk(model, [batch], always_trained=()).subset() for batch in embedded]
    for batch, kernel in zip(embedded, expected, strict=True):
        leaf = batch["inputs_embeds"].requires_grad_(True)
        assert_close(ntk(model, [batch], always_trained=()).subset(), kernel, **EXACT)
        assert leaf.requires_grad and leaf.grad is None


def test_half_precision_is_summed_wider_and_the_noise_floor_says_so():
    batches = small.text_batches()
    exact = ntk(small.seeded(small.bert), batches)
    half = ntk(small.seeded(small.bert, dtype=torch.float16), batches)
    assert half.provenance["dtype"] == "torch.float16"
    assert float((half.subset() - exact.subset()).norm() / exact.subset().norm()) < 0.02
    floors = [float(kernels.spectrum().noise_floor) for kernels in (exact, half)]
    assert floors[1] > 1e6 * floors[0]


UNLABELLED = [
    (lambda labels: labels.index_fill(0, torch.tensor([1]), -100), "example 1 of a batch has no labelled token"),
    (lambda labels: labels[:, 0], "needs a label for every token"),
]


@pytest.mark.parametrize("change, message", UNLABELLED)
def test_a_language_model_example_without_labelled_tokens_is_an_error(change, message):
    model, batches = small.seeded(small.llama, causal=True), small.causal_batches()
    batches[0]["labels"] = change(batches[0]["labels"])
    with pytest.raises(OutputError, match=message):
        ntk(model, batches, outputs="log_likelihood")


def test_a_model_without_logits_is_an_error():
    model = small.seeded(small.bert).bert
    with pytest.raises(OutputError, match="returned no logits .it returned: last_hidden_state"):
        ntk(model, small.text_batches())
