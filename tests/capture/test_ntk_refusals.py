# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What compute_ntk refuses, and that it leaves models as they were found; what it counts as the task head."""

from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

from peft_linear.errors import OutputError, PeftLinearError, TargetError
from tests import reference
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk


EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Snapshot:
    """Everything of a model (and of the process) that the computation must not change."""

    def __init__(self, model):
        self.model = model
        self.values = self.take()

    def take(self):
        modules = list(self.model.named_modules())
        return {
            "modes": [(name, module.training) for name, module in modules],
            "trainable": [
                (name, p.requires_grad, p.dtype, p.grad is None) for name, p in self.model.named_parameters()
            ],
            "hooks": [
                (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for name, m in modules
            ],
            "types": [type(module) for _, module in modules],
            "state": {key: value.clone() for key, value in self.model.state_dict().items()},
            "random": torch.get_rng_state(),
        }

    def check(self):
        now = self.take()
        for key in ("modes", "trainable", "hooks", "types"):
            assert now[key] == self.values[key], key
        assert torch.equal(now["random"], self.values["random"])
        for key, value in self.values["state"].items():
            assert torch.equal(now["state"][key], value), key


def test_the_model_is_left_as_it_was_found():
    model = small.seeded(small.roberta, dtype=torch.float32)
    model.train()
    model.roberta.encoder.layer[0].eval()
    model.roberta.embeddings.requires_grad_(False)
    snapshot = Snapshot(model)
    ntk(model, small.text_batches())
    snapshot.check()
    peft_model = get_peft_model(
        model, LoraConfig(target_modules=["query"], lora_dropout=0.5, modules_to_save=["classifier"])
    )
    peft_model.train()
    snapshot = Snapshot(peft_model)
    ntk(peft_model, small.text_batches())
    snapshot.check()


def test_the_model_is_left_as_it_was_found_after_an_error():
    model = small.seeded(small.bert, dtype=torch.float32).train()
    batches = small.text_batches()
    batches[1]["inputs_embeds"] = torch.full((2, 8, 16), torch.nan)
    del batches[1]["input_ids"]
    snapshot = Snapshot(model)
    with pytest.raises(OutputError, match="example 0 in batch 1 are NaN or inf"):
        ntk(model, batches)
    snapshot.check()


def test_head_parameters_outside_linear_layers_count():
    model = small.seeded(small.bert)
    model.classifier = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 3)).double()
    batches = small.text_batches()
    kernels = ntk(model, batches, targets=["query"])
    expected = reference.kernel(model, list(model.classifier.parameters()), batches, reference.logits)
    assert_close(kernels.base, expected, **EXACT)


def test_modules_to_save_are_the_base_of_a_peft_model():
    model, batches = small.seeded(small.bert), small.text_batches()
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    peft_model = get_peft_model(model, config)
    kernels = ntk(peft_model, batches, targets=["query", "value"])
    head = list(peft_model.base_model.model.classifier.modules_to_save["default"].parameters())
    assert_close(kernels.base, reference.kernel(peft_model, head, batches, reference.logits), **EXACT)
    assert isinstance(peft_model, PeftModel)


def test_always_trained_can_be_chosen():
    model, batches = small.seeded(small.bert), small.text_batches()
    assert not ntk(model, batches, always_trained=()).base.any()
    both = ntk(model, batches, targets=["query"], always_trained=["classifier", "pooler"])
    parameters = [*model.classifier.parameters(), *model.bert.pooler.parameters()]
    assert_close(both.base, reference.kernel(model, parameters, batches, reference.logits), **EXACT)


BAD_ARGUMENTS = [
    ({"rank": 0}, PeftLinearError, "rank must be a positive integer, got 0"),
    ({"lora_alpha": 0}, PeftLinearError, "lora_alpha must be a positive number"),
    ({"draws": 0}, PeftLinearError, "draws must be a positive integer"),
    ({"draws": 2, "space": "weight"}, PeftLinearError, "draws=2 are draws of LoRA's A"),
    ({"space": "loraa"}, PeftLinearError, "space must be one of"),
    ({"outputs": "logit"}, PeftLinearError, "outputs must be one of"),
    ({"outputs": 3}, PeftLinearError, "outputs must be one of .*, got 3"),
    ({"rank": (4, 8)}, PeftLinearError, r"got \(4, 8\); several ranks .*compute_ntk_at_ranks.model, batches, ranks="),
    (
        {"targets": ["querry", "value", "kee"]},
        TargetError,
        "'querry' .did you mean 'query'.*'kee' .did you mean 'key'",
    ),
    ({"targets": "query"}, TargetError, "regular expression"),
    ({"targets": []}, TargetError, "`targets` is empty"),
    ({"targets": ["word_embeddings"]}, TargetError, "not a linear layer.*word_embeddings .Embedding"),
    ({"targets": ["classifier"]}, TargetError, "always trained in full, so not a candidate.*classifier"),
    ({"always_trained": ["clasifier"]}, TargetError, "always_trained.*did you mean 'classifier'"),
    ({"rank": 17, "space": "rows"}, TargetError, "has 16 rows, fewer than rank=17"),
]


@pytest.mark.parametrize("arguments, error, message", BAD_ARGUMENTS)
def test_bad_arguments_stop_before_any_forward_pass(arguments, error, message):
    model = small.seeded(small.bert)
    model.forward = None  # a forward pass would fail otherwise
    with pytest.raises(error, match=message):
        ntk(model, small.text_batches(), **arguments)


BAD_BATCHES = [
    ([], "`batches` is empty"),
    (iter([]), "`batches` is empty"),
    (["text"], "batch 0 is a str, expected a dict of tensors"),
    ([{"text": ["a"]}], "batch 0 has no tensor that BertForSequenceClassification takes"),
    ([{"input_ids": torch.zeros(0, 3, dtype=torch.long)}], "batch 0 is empty"),
]


@pytest.mark.parametrize("batches, message", BAD_BATCHES)
def test_bad_batches_are_refused_by_number(batches, message):
    with pytest.raises(PeftLinearError, match=message):
        ntk(small.seeded(small.bert), batches)


OUT_OF_RANGE = [
    ("logits", "num_labels=6"),
    *[(kind, r"labels must lie in \[0, 3\)") for kind in ("label_logit", "margin", "loss")],
]


@pytest.mark.parametrize("kind, message", OUT_OF_RANGE)
def test_labels_that_are_out_of_range_are_refused(kind, message):
    batches = [batch | {"labels": batch["labels"] + 3} for batch in small.text_batches()]
    with pytest.raises(OutputError, match=message):
        ntk(small.seeded(small.bert), batches, outputs=kind)


def test_a_batch_without_the_labels_that_outputs_need_is_refused():
    batches = small.text_batches()
    del batches[1]["labels"]
    with pytest.raises(OutputError, match="batch 1 has no labels, which outputs='margin' needs"):
        ntk(small.seeded(small.bert), batches, outputs="margin")


def test_logits_need_no_labels():
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in small.text_batches()]
    assert ntk(small.seeded(small.bert), unlabelled).labels is None


def test_logits_of_a_language_model_are_refused_with_the_alternatives():
    model = small.seeded(small.llama, causal=True)
    with pytest.raises(OutputError, match="log_likelihood.*random_projection"):
        ntk(model, small.causal_batches())


def test_candidates_without_gradient_are_an_error():
    model = small.seeded(small.Recurrent)
    with pytest.raises(TargetError, match="no target takes a gradient"):
        ntk(model, small.text_batches(), targets=["unused"])


class Mixing(torch.nn.Module):
    """Centres over the batch: example 0 depends on example 1."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        y = self.linear(x)
        return (y - y.mean(0)).pow(3)


class Transposed(torch.nn.Module):
    """Flattens tokens before examples, so rows of one example do not lie together."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x.transpose(0, 1).reshape(-1, 4)).view(x.shape[1], x.shape[0], 3).pow(2).sum(0)


@pytest.mark.parametrize("factory, shape", [(Mixing, (3, 4)), (Transposed, (3, 5, 4))])
def test_examples_that_cannot_be_told_apart_are_refused(factory, shape):
    model = factory().double()
    with pytest.raises(TargetError, match="mixes the examples"):
        ntk(model, [{"x": torch.randn(*shape, dtype=torch.float64)}], targets=["linear"])


def dora():
    return get_peft_model(small.seeded(small.bert), LoraConfig(target_modules=["query"], use_dora=True))


def several_active():
    model = get_peft_model(small.seeded(small.bert), LoraConfig(target_modules=["query"]))
    model.add_adapter("second", LoraConfig(target_modules=["query"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged():
    model = get_peft_model(small.seeded(small.bert), LoraConfig(target_modules=["query"]))
    model.merge_adapter()
    return model


def not_lora():
    return get_peft_model(small.seeded(small.bert), LoHaConfig(target_modules=["query"]))


@pytest.mark.parametrize(
    "factory, message",
    [
        (dora, "LoRA variant"),
        (several_active, "several adapters are active"),
        (merged, "is merged"),
        (not_lora, 'already carries a .*, not LoRA; use space="weight"'),
    ],
)
def test_adapters_that_are_not_one_plain_lora_are_refused(factory, message):
    with pytest.raises(TargetError, match=message):
        ntk(factory(), small.text_batches())


def test_what_is_no_module_is_an_error():
    with pytest.raises(TargetError, match="the model is a function, not a torch.nn.Module; pass the module itself"):
        ntk(lambda input_ids: input_ids, small.text_batches())


def test_tensors_without_values_are_an_error():
    model, batches = small.seeded(small.bert), small.text_batches()
    batches[1]["attention_mask"] = batches[1]["attention_mask"].to("meta")
    with pytest.raises(PeftLinearError, match="'attention_mask' of batch 1 has no values .it is on the meta device"):
        ntk(model, batches)
    model.bert.embeddings.token_type_ids = model.bert.embeddings.token_type_ids.to("meta")
    with pytest.raises(TargetError, match="bert.embeddings.token_type_ids of .* has no values"):
        ntk(model, small.text_batches())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_adapters_that_train_biases_are_refused(bias):
    config = LoraConfig(target_modules=["query"], bias=bias)
    model = get_peft_model(small.seeded(small.bert), config).double()
    with pytest.raises(TargetError, match=f"adapter 'default' trains biases .bias='{bias}'.*use bias='none'"):
        ntk(model, small.text_batches())
    assert len(ntk(model, small.text_batches(), targets=["query"], always_trained=["classifier"])) == 2
