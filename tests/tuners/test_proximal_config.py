# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Registration and configuration of the adapter type."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import json
import pickle
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel

import peft_linear
from peft_linear.errors import PeftLinearError
from peft_linear.tuners.proximal_lora import PROXIMAL_LORA, ProximalLoraConfig, ProximalLoraModel
from peft_linear.tuners.proximal_lora.strength import Strengths


ROOT = Path(__file__).parents[2]
HUGE = {"no float": 10**400, "not printed": 10**5000, "negative": -(10**400), "fraction": Fraction(10**400, 3)}


def test_the_type_is_a_real_member_of_pefts_enum():
    assert PeftType.PROXIMAL_LORA is PeftType("PROXIMAL_LORA") is PeftType["PROXIMAL_LORA"] is PROXIMAL_LORA
    assert PROXIMAL_LORA in list(PeftType) and list(PeftType).count(PROXIMAL_LORA) == 1
    assert isinstance(PROXIMAL_LORA, PeftType) and PROXIMAL_LORA in PeftType
    assert pickle.loads(pickle.dumps(PROXIMAL_LORA)) is PROXIMAL_LORA
    assert copy.deepcopy(PROXIMAL_LORA) is PROXIMAL_LORA
    assert PROXIMAL_LORA == "PROXIMAL_LORA" == PROXIMAL_LORA.value == PROXIMAL_LORA.name
    assert json.dumps(PROXIMAL_LORA) == '"PROXIMAL_LORA"'
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PROXIMAL_LORA] is ProximalLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PROXIMAL_LORA] is ProximalLoraModel
    assert issubclass(ProximalLoraModel, LoraModel)


def test_importing_again_in_a_fresh_process_registers_once():
    code = """
import sys, peft, importlib
from torch.optim import optimizer as torch_optimizer
before = [type(m) for m in peft.PeftType]
import peft_linear
import peft_linear.tuners.proximal_lora as package
members = list(peft.PeftType)
importlib.reload(package)
for name in [n for n in sys.modules if n.split(".")[0] == "peft_linear"]:
    del sys.modules[name]
import peft_linear
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
assert list(peft.PeftType) == members and len(members) == len(before) + 1
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as mapping
assert mapping[peft.PeftType.PROXIMAL_LORA] is ProximalLoraConfig
assert not hasattr(peft.PeftModel.load_adapter._peft_linear_original, "_peft_linear_original")

import torch
from peft_linear.proximal import proximal_distance
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)),
                            ProximalLoraConfig(target_modules=["0"], proximal_lambda=2.0, proximal_selective=False))
parameters = [p for p in model.parameters() if p.requires_grad]
for p in parameters:
    p.data.add_(1.0)
    p.grad = torch.zeros_like(p)
before = proximal_distance(model)
torch.optim.SGD(parameters, lr=0.5).step()
assert abs(proximal_distance(model) / before - 0.5) < 1e-6, "the term must act once, also after importing twice"
print("fine")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "fine", result.stderr


def test_reloading_the_package_keeps_the_enum_member():
    importlib.reload(peft_linear)
    assert PeftType("PROXIMAL_LORA") is PROXIMAL_LORA


def test_the_configuration_is_lora_with_seven_more_fields(tmp_path):
    extra = {f.name for f in dataclasses.fields(ProximalLoraConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}
    kinds = ("lambda", "space", "mode", "selective", "lambda_pattern", "schedule", "schedule_steps")
    assert extra == {f"proximal_{kind}" for kind in kinds}
    config = ProximalLoraConfig(
        r=5,
        target_modules=["q"],
        proximal_lambda=3,
        proximal_space="delta",
        proximal_mode="coupled",
        proximal_selective=True,
        proximal_lambda_pattern={"q": 7, r"k\d": 0},
        proximal_schedule="linear",
        proximal_schedule_steps=9,
    )
    assert config.peft_type is PROXIMAL_LORA and config.proximal_lambda == 3.0 and config.proximal_selective
    config.save_pretrained(tmp_path)
    for cls in (PeftConfig, LoraConfig, ProximalLoraConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is ProximalLoraConfig and loaded == config
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "PROXIMAL_LORA"
    assert get_peft_config(written).proximal_space == "delta"
    assert written["proximal_lambda_pattern"] == {"q": 7.0, r"k\d": 0.0} and written["proximal_schedule_steps"] == 9
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert dataclasses.replace(config, r=2).r == 2


DEFAULTS = {
    "proximal_lambda": "auto",
    "proximal_space": "factors",
    "proximal_mode": "decoupled",
    "proximal_selective": False,
    "proximal_lambda_pattern": {},
    "proximal_schedule": "constant",
    "proximal_schedule_steps": None,
}


def stated(pattern, text):
    """The defaults stated in a text: groups 1 and 2 of every match are a field and its value in Python."""
    return {match[1]: ast.literal_eval(match[2]) for match in re.finditer(pattern, text, re.MULTILINE)}


def test_docstring_and_guide_state_the_defaults():
    config = ProximalLoraConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert stated(r"^ +(proximal_\w+) \(.*, defaults to `(.+?)`\):$", ProximalLoraConfig.__doc__) == DEFAULTS
    guide = (ROOT / "docs" / "reference" / "proximal_lora.md").read_text(encoding="utf-8")
    assert stated(r"^\| `(proximal_\w+)` \| `(.+?)` \|", guide) == DEFAULTS


def test_a_numpy_strength_becomes_a_float():
    value = ProximalLoraConfig(proximal_lambda=np.float32(0.5)).proximal_lambda
    assert type(value) is float and value == 0.5


@pytest.mark.parametrize("selective", [True, False])
def test_projection_does_not_change_the_selective_field(selective):
    config = ProximalLoraConfig(proximal_mode="projection", proximal_selective=selective)
    assert config.proximal_selective is selective


@pytest.mark.parametrize(
    "value",
    [
        *[-0.1, float("nan"), float("inf"), "0.1", "AUTO", None, True],
        *[pytest.param(v, id=n) for n, v in HUGE.items()],
    ],
)
def test_a_lambda_that_is_not_a_finite_number_from_zero_on_is_refused(value):
    with pytest.raises(PeftLinearError, match=r"proximal_lambda must be a finite number >= 0 .* or 'auto', got"):
        ProximalLoraConfig(proximal_lambda=value)


def test_auto_is_saved_and_loaded_and_is_one_where_lambda_has_no_unit(tmp_path):
    ProximalLoraConfig(target_modules=["q"]).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).proximal_lambda == "auto"
    assert ProximalLoraConfig(proximal_mode="projection").proximal_lambda == 1.0


@pytest.mark.parametrize("value", HUGE.values(), ids=list(HUGE))
def test_a_lambda_that_no_float_holds_is_refused_in_a_pattern_and_after_the_config_was_made(value):
    with pytest.raises(PeftLinearError, match=r"proximal_lambda_pattern\['q'\] must be a finite number >= 0"):
        ProximalLoraConfig(proximal_lambda_pattern={"q": value})
    config = ProximalLoraConfig()
    config.proximal_lambda = value
    with pytest.raises(PeftLinearError, match=r"proximal_lambda must be a finite number >= 0 .* got .{,70} of type"):
        Strengths(config, {}).active()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"proximal_space": "weights"}, "proximal_space must be one of 'factors', 'delta', 'function', got 'weights'"),
        ({"proximal_mode": None}, "proximal_mode must be one of 'decoupled', 'coupled', 'projection', got None"),
        ({"proximal_mode": "projection", "proximal_space": "delta"}, "use proximal_space='factors', got 'delta'"),
        ({"proximal_mode": "coupled"}, "set proximal_lambda to a number .*, or use proximal_mode='decoupled'"),
        ({"proximal_selective": "yes"}, "proximal_selective must be True or False, got 'yes'"),
        ({"proximal_lambda_pattern": ["q"]}, "proximal_lambda_pattern must be a dict"),
        ({"proximal_lambda_pattern": {"q": -1}}, r"proximal_lambda_pattern\['q'\] must be a finite number >= 0"),
        ({"proximal_lambda_pattern": {"q(": 1}}, r"the key 'q\(' of proximal_lambda_pattern is not a regular"),
        ({"proximal_lambda_pattern": {3: 1}}, "the key 3 of proximal_lambda_pattern is not a regular"),
        ({"proximal_schedule": "step"}, "proximal_schedule must be one of 'constant', 'linear', 'cosine', 'warmup'"),
        ({"proximal_schedule": "linear"}, "needs proximal_schedule_steps, a positive number .* got None"),
        ({"proximal_schedule": "cosine", "proximal_schedule_steps": 0}, "needs proximal_schedule_steps, .* got 0"),
        ({"proximal_schedule_steps": 5}, "proximal_schedule_steps=5 is the length of a schedule, but"),
        ({"r": 0}, "the rank r must be a positive integer, got 0"),
        ({"r": -4}, "the rank r must be a positive integer, got -4"),
        ({"r": 2.5}, "the rank r must be a positive integer, got 2.5"),
        ({"r": True}, "the rank r must be a positive integer, got True"),
        ({"rank_pattern": {"q": 0, "k": 3}}, r"the ranks in rank_pattern must be positive integers, got \{'q': 0\}"),
        ({"proximal_space": "delta", "use_dora": True}, "adds s·B·A to the weight; this one has use_dora"),
    ],
)
def test_invalid_fields_are_refused(fields, message):
    with pytest.raises(PeftLinearError, match=message):
        ProximalLoraConfig(**fields)
