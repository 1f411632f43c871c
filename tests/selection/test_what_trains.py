# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""After `get_peft_model(model, recommendation.to_config())` exactly what was recommended and counted trains."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_linear import PeftLinearError, Recommendation, compute_ntk, recommend, recommend_modules
from peft_linear.capture.targets import resolve_always_trained
from peft_linear.errors import TargetError
from tests.helpers.architectures import CLASSIFIERS, LANGUAGE, Attending, batch_for, build


def trained(model):
    """(modules with an adapter, other parameters that train), by their names in the base model."""
    names = [name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad]
    adapters = {name.split(".lora_")[0] for name in names if ".lora_" in name}
    return adapters, {name.replace(".modules_to_save.default", "") for name in names if ".lora_" not in name}


def head_parameters(model):
    of_head = {id(p) for module in resolve_always_trained(model).values() for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in of_head}


def recommended(name, budget=3, **options):
    return recommend_modules(build(name), [batch_for(name)], budget, progress=False, draws=1, **options)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_chosen_adapters_and_the_head_that_was_counted_are_all_that_trains(name, tmp_path):
    rec = recommended(name)
    head = head_parameters(build(name))
    assert head
    rec.save(tmp_path)
    for source in (rec, Recommendation.load(tmp_path)):
        for options in ({}, {"task_type": "SEQ_CLS"}, {"task_type": "FEATURE_EXTRACTION"}):
            model = get_peft_model(build(name), source.to_config(**options))
            assert trained(model) == (set(rec.modules), head), options


def test_modules_to_save_that_are_passed_stay():
    rec = recommended("bart")
    assert rec.to_config(modules_to_save=None).modules_to_save is None
    assert rec.to_config(modules_to_save=["shared"]).modules_to_save == ["shared"]


def test_a_language_model_has_no_modules_to_save():
    assert recommended("bloom", 2).to_config(task_type="CAUSAL_LM").modules_to_save is None


@pytest.mark.parametrize("budget", [2, 1.0])
@pytest.mark.parametrize("name", LANGUAGE)
def test_peft_adapts_exactly_the_recommended_modules_of_a_language_model(name, budget):
    rec = recommended(name, budget)
    config = rec.to_config(task_type="CAUSAL_LM")
    model = get_peft_model(build(name), config)
    assert trained(model) == (set(rec.modules), set())
    assert not config.target_parameters


@pytest.mark.parametrize(
    ("name", "leaves"), [("mamba", "dt_proj"), ("falcon_mamba", "dt_proj"), ("jamba", "dt_proj"), ("bloom", "dense")]
)
def test_modules_that_are_never_called_are_no_candidates_and_a_note_names_them(name, leaves):
    rec = recommended(name, 1.0)
    assert not [module for module in rec.settings.candidates if module.endswith(f".{leaves}")]
    assert any("No candidates" in note and f".{leaves}" in note for note in rec.notes)


def test_out_proj_of_multihead_attention_is_no_candidate():
    torch.manual_seed(0)
    batch = {"input_ids": batch_for("bert")["input_ids"], "labels": torch.arange(4) % 3}
    model = Attending()
    rec = recommend_modules(model, [batch], 1.0, always_trained=["scores"], progress=False)
    assert set(rec.modules) == {"inner", "outer"}
    named = recommend_modules(
        model, [batch], 1.0, targets=["inner", "outer", "out_proj"], always_trained=["scores"], progress=False
    )
    assert set(named.modules) == {"inner", "outer"}
    assert any("attention.out_proj" in note for note in named.notes)


@pytest.mark.parametrize(("name", "target"), [("mamba", "out_proj"), ("qwen3_moe", "down_proj")])
def test_a_module_that_peft_refuses_or_takes_for_experts_is_not_recommended_by_name_either(name, target):
    with pytest.raises(TargetError, match=r"an adapter can train none of the .*: peft (refuses|takes this name)"):
        recommended(name, 1, targets=[target])
    kernels = compute_ntk(build(name), [batch_for(name)], targets=[target], outputs="log_likelihood")
    assert len(kernels)  # its kernel can still be looked at


def test_a_model_of_which_peft_adapts_no_layer_is_refused():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(TargetError, match="peft can adapt no linear layer of Module by its name"):
        recommend_modules(model, [batch_for("bert")], 1)


class OddLinear(nn.Module):
    """A class that peft has no LoRA layer for, though its name says Linear."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 8
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, hidden):
        return hidden @ self.weight.T


class WithOddLinear(Attending):
    def __init__(self):
        super().__init__()
        self.outer = OddLinear()


def test_a_class_that_peft_has_no_lora_layer_for_is_no_candidate():
    torch.manual_seed(0)
    batch = {"input_ids": batch_for("bert")["input_ids"], "labels": torch.arange(4) % 3}
    rec = recommend_modules(WithOddLinear(), [batch], 1, always_trained=["scores"], progress=False)
    assert rec.settings.candidates == ("inner",)


class Heads(nn.Module):
    """Two heads of a list, and another module whose name ends as one of them does."""

    def __init__(self, alike=False):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.inner = nn.Linear(8, 8)
        self.proj = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"proj": nn.Linear(8, 8)})
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        if alike:
            self.score = nn.Linear(8, 3)
            self.prescore = nn.Linear(8, 8)

    def forward(self, input_ids):
        hidden = self.block["proj"](self.proj(self.inner(self.embed(input_ids)).tanh()).tanh()).mean(1)
        if hasattr(self, "score"):
            return {"logits": self.score(self.prescore(hidden))}
        return {"logits": self.heads[0](hidden) + self.heads[1](hidden)}


def heads_recommendation(always_trained, alike=False, budget=1, **options):
    torch.manual_seed(0)
    batch = {"input_ids": batch_for("bert")["input_ids"], "labels": torch.arange(4) % 3}
    options = {"always_trained": always_trained, "progress": False, **options}
    return recommend_modules(Heads(alike), [batch], budget, **options)


def test_heads_in_a_list_are_saved_one_by_one_which_peft_asks_for():
    rec = heads_recommendation(["heads"])
    config = rec.to_config()
    assert config.modules_to_save == ["heads.0", "heads.1"]
    adapters, head = trained(get_peft_model(Heads(), config))
    assert adapters == set(rec.modules)
    assert head == {f"heads.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}


def test_a_head_whose_name_ends_another_modules_is_refused_until_modules_to_save_is_passed():
    rec = heads_recommendation(["score"], alike=True)
    with pytest.raises(PeftLinearError, match="would also train prescore"):
        rec.to_config()
    assert rec.to_config(modules_to_save=["score"]).modules_to_save == ["score"]


def test_a_name_that_ends_another_modules_adapts_itself_alone_also_where_that_is_no_candidate():
    rec = heads_recommendation(["heads"], targets=r"proj|inner", budget=2)
    config = rec.to_config()
    assert set(rec.modules) == {"proj", "inner"}
    assert trained(get_peft_model(Heads(), config))[0] == {"proj", "inner"}


def test_where_peft_rewrites_patterns_the_others_are_excluded_instead():
    rec = heads_recommendation(["heads"], targets=r"proj|inner", budget=2)
    facts = {**rec.settings.kernels["peft"], "rewrites_patterns": True}
    rec = replace(rec, settings=replace(rec.settings, kernels={**rec.settings.kernels, "peft": facts}))
    config = rec.to_config()
    assert (set(config.target_modules), config.exclude_modules) == ({"proj", "inner"}, r"block\.proj")
    assert trained(get_peft_model(Heads(), config))[0] == {"proj", "inner"}


@pytest.mark.parametrize(
    "options",
    [{"exclude_modules": ["inner", "proj"]}, {"modules_to_save": ["inner", "proj"]}, {"target_parameters": ["w"]}],
)
def test_fields_with_which_peft_would_adapt_something_else_are_refused(options):
    with pytest.raises(PeftLinearError, match=f"with .*{next(iter(options))}=.* peft would not adapt exactly"):
        heads_recommendation(["heads"], targets=["inner", "proj"], budget=1).to_config(**options)


def test_a_task_type_by_which_peft_would_train_a_chosen_module_in_full_is_refused():
    rec = heads_recommendation(["prescore"], alike=True, targets=["score"])
    with pytest.raises(PeftLinearError, match=r"task_type='SEQ_CLS' peft would not .*score \(chosen, left out\)"):
        rec.to_config(task_type="SEQ_CLS", modules_to_save=["embed"])
    assert rec.to_config(modules_to_save=["embed"]).target_modules == {"score"}


def test_a_module_that_peft_cannot_adapt_makes_no_config():
    rec = heads_recommendation(["heads"])
    facts = {**rec.settings.kernels["peft"], "refused": dict.fromkeys(rec.modules, "peft refuses it")}
    rec = replace(rec, settings=replace(rec.settings, kernels={**rec.settings.kernels, "peft": facts}))
    with pytest.raises(PeftLinearError, match="no config adapts .*: peft refuses it; recommend again without it"):
        rec.to_config()


def test_kernels_that_are_saved_and_loaded_keep_what_a_config_needs(tmp_path):
    kernels = compute_ntk(build("bart"), [batch_for("bart")], progress=False)
    kernels.save(tmp_path / "kernels.safetensors")
    loaded = type(kernels).load(tmp_path / "kernels.safetensors")
    assert recommend(loaded, 2).to_config().modules_to_save == ["classification_head"]
