# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The anchors of adapters of every kind, and that the term pulls toward them."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_linear.errors import PeftLinearError
from peft_linear.proximal import proximal_distance
from peft_linear.tuners.proximal_lora import reset_proximal_anchor
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.proximal_at_rest import SGD, config, displaced, mlp, proximal, step_at_rest
from tests.helpers.reference_proximal import lora_parameters


def test_the_anchor_can_be_set_to_the_present_factors():
    model = displaced(proximal())
    reset_proximal_anchor(model)
    assert proximal_distance(model) == 0
    step_at_rest(displaced(model))
    assert proximal_distance(model) > 0


def test_the_anchor_of_an_unknown_adapter_cannot_be_set():
    with pytest.raises(PeftLinearError, match="no ProximalLoRA adapter 'unknown'"):
        reset_proximal_anchor(proximal(), "unknown")


def test_a_changed_rank_is_refused_until_the_anchor_is_reset():
    model = proximal()
    layer = model.base_model.model[0]
    layer.lora_A["default"], layer.lora_B["default"] = nn.Linear(5, 3, bias=False), nn.Linear(3, 7, bias=False)
    with pytest.raises(
        PeftLinearError, match=r"lora_A of '0' \(adapter 'default'\) has shape \(3, 5\), its anchor \(2, 5\)"
    ):
        step_at_rest(model)
    reset_proximal_anchor(model)
    step_at_rest(model)


@pytest.mark.parametrize("space", ["factors", "delta", "function"])
@pytest.mark.parametrize("scheme", ["pissa", "olora", "orthogonal", "gaussian", "mica"])
def test_initialisation_schemes_are_pulled_toward_their_initial_factors(scheme, space):
    if not hasattr(LoraLayer, f"{scheme}_init") and scheme != "gaussian":
        pytest.skip(f"this version of peft has no {scheme}")
    model = proximal(init_lora_weights=scheme, proximal_space=space, lam=1e9)
    assert proximal_distance(model, space="factors") == 0 == proximal_distance(model, space="delta")
    anchors = find_adapters(model)[0].anchors()
    assert all((anchor.b is None) == (scheme == "gaussian") for anchor in anchors.values())
    assert all((anchor.a is None) == (scheme == "mica") for anchor in anchors.values())
    trained = lora_parameters(model)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.ones_like(p))
    before = proximal_distance(model, space=space)
    step_at_rest(model)
    # one sweep over A and B solves each block; with both near the anchor it leaves next to nothing
    assert proximal_distance(model, space=space) < 0.2 * before
    for _ in range(30):
        step_at_rest(model)
    assert proximal_distance(model, space=space) < 0.02 * before


def test_the_anchor_of_eva_is_the_a_it_sets_after_the_adapter_is_made():
    from peft import EvaConfig

    model = proximal(init_lora_weights="eva", eva_config=EvaConfig(), lam=1e9)
    with torch.no_grad():
        for name, p in lora_parameters(model).items():
            if "lora_A" in name:
                p.normal_()
    assert proximal_distance(model) == 0
    kept = [p.detach().clone() for p in lora_parameters(model).values()]
    step_at_rest(model)
    for p, value in zip(lora_parameters(model).values(), kept, strict=True):
        assert torch.equal(p, value)
    displaced(model)
    assert proximal_distance(model) > 0  # from the first step on the anchor stays
    step_at_rest(model)
    assert proximal_distance(model) < 1e-6


@pytest.mark.parametrize("target", ["embedding", "linear"])
def test_the_anchor_of_an_untrained_adapter_is_its_factors_at_the_first_step(target):
    """As when DDP has copied the weights of rank 0."""
    model = get_peft_model(
        nn.Sequential(OrderedDict(embedding=nn.Embedding(6, 4), linear=nn.Linear(4, 3))),
        config(target_modules=[target]),
    )
    start = "lora_embedding_B" if target == "embedding" else "lora_A"
    with torch.no_grad():
        for name, p in lora_parameters(model).items():
            if start in name:
                p.normal_()
    kept = {name: p.detach().clone() for name, p in lora_parameters(model).items()}
    step_at_rest(model)
    assert proximal_distance(model) == 0
    for name, p in lora_parameters(model).items():
        assert torch.equal(p, kept[name])
    before = proximal_distance(displaced(model))
    step_at_rest(model)  # from now on the anchor stays
    assert proximal_distance(model) == pytest.approx(before / 2)


@pytest.mark.parametrize("trained", ["0", "2"])
def test_loading_weights_of_a_trained_adapter_leaves_the_anchor(trained):
    """As when a plain loop continues from its own checkpoint; one module whose B is not zero is enough."""
    model = proximal()
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.add_(0.5 * (p != 0))
        model.base_model.model.get_submodule(trained).lora_B["default"].weight.add_(0.5)
    before = proximal_distance(model)
    step_at_rest(model)
    assert proximal_distance(model) == pytest.approx(before / 2)


def test_the_anchor_of_a_loaded_untrained_adapter_is_that_of_its_file(tmp_path):
    proximal().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    assert proximal_distance(model) == 0
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.add_(0.5 * (p != 0))
    before = proximal_distance(model)
    step_at_rest(model)
    assert proximal_distance(model) == pytest.approx(before / 2) and before > 0


def test_an_embedding_is_anchored_at_its_initial_b_and_an_a_of_zero():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3))
    model = get_peft_model(base, config(target_modules=["0", "1"]))
    anchors = find_adapters(model)[0].anchors()
    assert anchors["0"].a is None and anchors["0"].b is not None
    assert anchors["1"].b is None and anchors["1"].a is not None
    assert proximal_distance(model) == 0
    displaced(model)
    embedding, linear = model.base_model.model
    weights = [
        embedding.get_delta_weight("default"),
        linear.get_delta_weight("default"),
    ]
    expected = torch.cat([w.ravel() for w in weights]).norm()
    assert proximal_distance(model, space="delta") == pytest.approx(float(expected), rel=1e-5)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, self.weight)


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_distance_and_pull_of_convolutions_and_expert_parameters(space, mode):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3)
            self.grouped = nn.Conv2d(6, 4, 3, groups=2)
            self.experts = Experts()

        def forward(self, x):
            return self.experts(self.grouped(self.conv(x)).mean((-2, -1)))

    torch.manual_seed(0)
    options = {"target_modules": ["conv", "grouped"], "target_parameters": ["experts.weight"]}
    made = config(proximal_space=space, proximal_mode=mode, lam=0.5, **options)
    model = displaced(get_peft_model(Net().double(), made, autocast_adapter_dtype=False), 0.3)
    network = model.base_model.model
    experts = network.experts.get_delta_weight("default")
    conv = network.conv.get_delta_weight("default")
    grouped = network.grouped
    with torch.no_grad():
        # what the adapter does to an input, as a dense matrix: the kernel of B after A
        probe = torch.eye(6 * 9).reshape(54, 6, 3, 3).double()
        dense = grouped.scaling["default"] * grouped.lora_B["default"](grouped.lora_A["default"](probe)).flatten(1)
    expected = torch.cat([experts.ravel(), conv.ravel(), dense.ravel()]).norm()
    assert proximal_distance(model, space="delta") == pytest.approx(float(expected), rel=1e-9)
    before = proximal_distance(model, space=space)
    step_at_rest(model, rate=0.01)
    assert 0 < proximal_distance(model, space=space) < before


def test_tied_factors_are_pulled_once():
    model = proximal(target_modules=["0"])
    layer = model.base_model.model[0]
    tied = nn.Parameter(layer.lora_B["default"].weight.data)
    layer.lora_A["default"].weight, kept = tied, layer.lora_A["default"].weight
    assert kept is not tied
    adapter = find_adapters(model)[0]
    adapter.capture()
    displaced_by = 0.5
    tied.data.add_(displaced_by)
    for p in (tied, layer.lora_B["default"].weight):
        p.grad = torch.zeros_like(p)
    SGD([tied, layer.lora_B["default"].weight], lr=0.5).step()
    anchor = adapter.anchors()["0"].a
    start = torch.zeros_like(tied) if anchor is None else anchor
    torch.testing.assert_close(tied.data, start + displaced_by / 2)
