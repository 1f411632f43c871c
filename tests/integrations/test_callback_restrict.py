# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The callback with action="restrict": what trains, what is saved and what the config says agree."""

import json
import math

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model

from peft_linear.errors import BudgetError, CriterionError, PeftLinearError, TargetError
from peft_linear.integrations.recommendation_callback import NtkRecommendationCallback
from peft_linear.integrations.restrict import adapted_modules, checkpoint_modules, restrict_adapter
from peft_linear.selection.request import recommend_modules
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from tests.helpers.callback_runs import BATCHES, base_model, callback, lora_parameters, peft_bert, trainer_for


@pytest.mark.parametrize("config_class", [ProximalLoraConfig, LoraConfig])
def test_restrict_makes_training_optimizer_checkpoint_and_config_agree(config_class, tmp_path):
    model = peft_bert(config_class)
    all_modules = set(adapted_modules(model, "default"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = callback()
    trainer = trainer_for(model, tmp_path, [ours])
    chosen = set(ours.modules)
    assert len(chosen) == 3 < len(all_modules)
    assert set(adapted_modules(model, "default")) == chosen == set(model.peft_config["default"].target_modules)
    assert set(model.base_model.targeted_module_names) == chosen
    for name, parameter in model.named_parameters():
        plain = {key.replace(".base_layer", ""): value for key, value in before.items()}
        assert torch.equal(parameter, plain[name.replace(".base_layer", "")]), "restricting changed a weight"
    trainer.train()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    assert len(lora_parameters(model)) == 2 * 3
    saved = tmp_path / "checkpoint-2"
    config = json.loads((saved / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == chosen
    loaded = PeftModel.from_pretrained(base_model(), saved)
    assert set(adapted_modules(loaded, "default")) == chosen
    batch = {k: v for k, v in BATCHES[0].items() if k != "labels"}
    model.eval()
    loaded.eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_the_choice_is_the_best_by_the_kernels(tmp_path):
    model = peft_bert()
    expected = recommend_modules(
        model,
        BATCHES,
        3,
        "gradient_energy",
        targets=list(adapted_modules(model, "default")),
        rank=2,
        lora_alpha=4,
        progress=False,
    )
    ours = callback()
    trainer_for(model, tmp_path, [ours])
    assert ours.recommendation.modules == expected.modules
    worst = {row.name for row in expected.scores[-3:]}
    assert not worst & set(adapted_modules(model, "default"))


def test_added_later(tmp_path):
    model = peft_bert()
    trainer = trainer_for(model, tmp_path)
    trainer.add_callback(callback())
    with pytest.raises(PeftLinearError, match=r"was added after the Trainer was made.*callbacks=\[\.\.\.\]"):
        trainer.train()
    late = callback("report")
    trainer = trainer_for(model, tmp_path, max_steps=1)
    trainer.add_callback(late)
    trainer.train()
    assert len(late.modules) == 3 and trainer.state.log_history[0]["ntk_modules"] == 3


def test_model_init_is_refused_when_training_begins(tmp_path):
    trainer = trainer_for(None, tmp_path, [callback()], model_init=lambda: peft_bert())
    with pytest.raises(PeftLinearError, match=r"on 13 modules, but 3 were chosen.*model_init does"):
        trainer.train()


def test_an_optimizer_that_exists_is_refused(tmp_path):
    model = peft_bert()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(PeftLinearError, match="an optimizer was passed to the Trainer"):
        trainer_for(model, tmp_path, [callback()], optimizers=(optimizer, None))
    assert len(adapted_modules(model, "default")) == 13


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 0}, BudgetError, "a budget of 0 modules"),
        ({"budget": 14}, BudgetError, "a budget of 14 modules, but there are 1 to 13"),
        ({"criterion": "best"}, CriterionError, "unknown criterion 'best'"),
        ({"adapter_name": "other"}, TargetError, "there is no adapter 'other'; there are: default"),
        ({"colour": "red"}, PeftLinearError, "unknown arguments colour; compute_ntk takes: targets, space"),
    ],
)
def test_bad_requests_end_when_the_trainer_is_made_and_leave_the_model_alone(arguments, error, message, tmp_path):
    model = peft_bert()
    with pytest.raises(error, match=message):
        trainer_for(model, tmp_path, [callback(**arguments)])
    assert len(adapted_modules(model, "default")) == 13


def test_unknown_action():
    with pytest.raises(PeftLinearError, match="unknown action 'prune'; there are: report, restrict"):
        NtkRecommendationCallback(BATCHES, 3, "prune")


def test_restricting_one_of_two_adapters_leaves_the_other():
    model = peft_bert()
    model.add_adapter("second", ProximalLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    names = list(adapted_modules(model, "default"))
    keep = [names[-1]]
    removed = restrict_adapter(model, keep, "default")
    assert set(removed) == set(names) - set(keep)
    assert list(adapted_modules(model, "default")) == keep
    assert all(name.endswith("query") for name in adapted_modules(model, "second"))
    assert len(adapted_modules(model, "second")) == 2
    assert all(layer.active_adapters == [] for layer in adapted_modules(model, "second").values())
    model.set_adapter("second")
    with pytest.raises(TargetError, match="cannot keep nothing: adapter 'second' is on"):
        restrict_adapter(model, [])
    with pytest.raises(TargetError, match="cannot keep x, y: adapter 'second' is on"):
        restrict_adapter(model, ["x", "y"])


def test_restricting_keeps_adapted_embeddings_and_drops_layer_patterns(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["query", "word_embeddings"], layers_to_transform=[0, 1], task_type="SEQ_CLS"
    )
    config.target_modules = {"query", "value"}
    model = get_peft_model(base_model(), config)
    keep = "bert.encoder.layer.1.attention.self.value"
    restrict_adapter(model, [keep])
    assert model.peft_config["default"].target_modules == {keep}
    assert model.peft_config["default"].layers_to_transform is None
    model.save_pretrained(tmp_path)
    assert checkpoint_modules(model, tmp_path) == (keep,)

    embedded = get_peft_model(base_model(), LoraConfig(r=2, target_modules=["query", "word_embeddings"]))
    query = "bert.encoder.layer.0.attention.self.query"
    restrict_adapter(embedded, [query])
    assert embedded.peft_config["default"].target_modules == {query, "bert.embeddings.word_embeddings"}


def test_exact_names_where_names_end_alike(tmp_path):
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})

    model = get_peft_model(Outer(), LoraConfig(r=2, target_modules=["proj"]))
    assert restrict_adapter(model, ["proj"]) == ("inner.proj",)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Outer(), tmp_path)
    assert list(adapted_modules(loaded, "default")) == ["proj"]


def test_two_active_adapters_need_a_name():
    model = get_peft_model(base_model(), LoraConfig(r=2, target_modules=["key"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(TargetError, match=r"2 adapters are active \(default, second\); say which with adapter_name"):
        restrict_adapter(model, ["x"])


@pytest.mark.parametrize("action", ["report", "restrict"])
def test_adapters_that_are_not_lora_are_refused(action, tmp_path):
    model = get_peft_model(base_model(), LoHaConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(TargetError, match=r"adapter 'default' \(.*LOHA\) is not LoRA on any linear layer"):
        trainer_for(model, tmp_path, [callback(action)])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_kernels_are_those_of_the_adapter_that_is_there(use_rslora, tmp_path):
    """With use_rslora the scaling is α/√r."""
    ours = callback()
    model = peft_bert(LoraConfig, use_rslora=use_rslora)
    scaling = {layer.scaling["default"] for layer in adapted_modules(model, "default").values()}
    trainer_for(model, tmp_path, [ours])
    settings = ours.recommendation.settings
    assert [pytest.approx(settings.lora_alpha / settings.rank)] == list(scaling)
    assert settings.lora_alpha == pytest.approx(4 * math.sqrt(2) if use_rslora else 4)
