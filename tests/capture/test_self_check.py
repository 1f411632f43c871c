# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The self-check: what is not the gradient that trains is an error that names the module; what is raises no alarm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_linear import Resources
from peft_linear.capture.adapter_spaces import ParameterMatrix
from peft_linear.capture.features import jacobian_features
from peft_linear.capture.layers import Linear
from peft_linear.errors import OutputError, PeftLinearError, TargetError
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk
from tests.helpers.odd_models import TwoLayers, numbers


@pytest.mark.parametrize("space", ["lora", "weight"])
def test_a_layer_kind_that_hands_out_wrong_cotangents_is_an_error_that_names_the_module(space, monkeypatch):
    monkeypatch.setattr(
        Linear, "cotangents", lambda self, tensor, size: 1.5 * tensor.reshape(size, -1, tensor.shape[-1])
    )
    with pytest.raises(TargetError, match=r"\ba \(Linear\) would get a wrong kernel: gradients are .* in batch 0"):
        ntk(TwoLayers(), numbers(), targets=["a"], space=space, always_trained=())


def test_a_wrong_space_is_an_error(monkeypatch):
    original = ParameterMatrix.__init__

    def scaled(self, inputs, cotangents, *args, **kwargs):
        original(self, inputs, lambda x: -cotangents(x), *args, **kwargs)

    monkeypatch.setattr(ParameterMatrix, "__init__", scaled)
    with pytest.raises(TargetError, match="a .Linear. would get a wrong kernel"):
        ntk(TwoLayers(), numbers(), targets=["a"], always_trained=())


def test_features_are_checked_too(monkeypatch):
    monkeypatch.setattr(Linear, "inputs", lambda self, tensor, size: 2 * tensor.reshape(size, -1, tensor.shape[-1]))
    with pytest.raises(TargetError, match="a .Linear. would get a wrong kernel"):
        jacobian_features(TwoLayers(), numbers(), targets=["a"], always_trained=(), progress=False)


def test_the_result_is_in_the_provenance_and_every_structure_is_tried_once():
    model = small.seeded(small.bert)
    batches = [*small.text_batches(sizes=(3, 2, 3, 1)), {"input_ids": torch.arange(2, 10).view(2, 4)}]
    for batch in batches:
        batch.pop("labels", None)
    for mode, tried in (("shapes", [0, 3, 4]), ("first", [0])):
        check = ntk(model, batches, check=mode).provenance["check"]
        assert check["mode"] == mode and check["batches"] == tried and check["unchecked"] == []
        assert 0 <= check["error"] < 1e-12
    assert ntk(model, batches, check="off").provenance["check"] == {"mode": "off"}


def test_another_check_is_an_error():
    with pytest.raises(PeftLinearError, match='check must be "shapes", "first" or "off", got \'always\''):
        Resources(check="always")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_alarm_in_lower_precision_and_small_gradients(dtype):
    model = small.seeded(small.bert, dtype=dtype, hidden_size=64, num_hidden_layers=4)
    check = ntk(model, small.text_batches(length=16), space="weight").provenance["check"]
    assert check["error"] < 0.05


class BatchStatistics(TwoLayers):
    def forward(self, x):
        state = self.a(x)
        return self.b(torch.tanh((state - state.mean(0)) / (state.std(0) + 0.1)))


class Centred(TwoLayers):
    def forward(self, x):
        state = torch.tanh(self.a(x))
        return self.b(state - state.mean(0) / 2)


@pytest.mark.parametrize(
    "factory, advice", [(Centred, "pass batches of one"), (BatchStatistics, "running statistics")]
)
def test_models_that_mix_examples_are_refused(factory, advice):
    with pytest.raises(TargetError, match=f"mixes the examples of a batch at a.*{advice}"):
        ntk(factory(), numbers(), targets=["a"], always_trained=())


def test_dropout_that_ignores_eval_mode_is_an_error():
    class Dropping(TwoLayers):
        def forward(self, x):
            return self.b(F.dropout(torch.tanh(self.a(x)), 0.1))

    with pytest.raises(OutputError, match=r"two passes over batch 0 gave outputs that differ by .*F\.dropout"):
        ntk(Dropping(), numbers(), targets=["a"])


def test_reentrant_checkpointing_is_an_error():
    class Checkpointed(TwoLayers):
        def forward(self, x):
            return self.b(checkpoint(lambda y: torch.tanh(y), self.a(x), use_reentrant=True))

    with pytest.raises(TargetError, match="use_reentrant=True.*pass use_reentrant=False"):
        ntk(Checkpointed(), numbers(), targets=["a"], always_trained=())


class Overflowing(nn.Module):
    """Finite outputs, with a gradient of 8e5 on the way."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x) * 1e-3 * 60) * 2e4 * 10


@pytest.mark.parametrize("check", ["shapes", "off"])
def test_gradients_that_overflow_in_half_precision_are_an_error(check):
    model = Overflowing().half()
    batches = [{"x": 1e-3 * torch.ones(2, 4, dtype=torch.float16)}]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e-3)
    with pytest.raises(OutputError, match="gradients of a are NaN or inf although .* load the model in bfloat16"):
        ntk(model, batches, targets=["a"], always_trained=(), check=check)


class MixingTheRest(TwoLayers):
    """The first three examples are as they are alone; the others are not."""

    def forward(self, x):
        state = torch.tanh(self.a(x))
        return self.b(torch.cat([state[:3], state[3:] + state[:1]]))


def test_examples_that_are_mixed_only_in_larger_batches_are_an_error():
    with pytest.raises(OutputError, match="3 examples of batch 0 differ by .* mixes the examples.*batches of one"):
        ntk(MixingTheRest(), numbers(), targets=["a"], always_trained=())
    assert len(ntk(MixingTheRest(), numbers((3, 2)), targets=["a"], always_trained=())) == 1


def test_random_numbers_in_the_rest_of_a_batch_are_an_error():
    class DroppingTheRest(TwoLayers):
        def forward(self, x):
            state = torch.tanh(self.a(x))
            return self.b(torch.cat([state[:3], F.dropout(state[3:], 0.5)]))

    with pytest.raises(OutputError, match=r"two passes over batch 0 gave outputs that differ by .*F\.dropout"):
        ntk(DroppingTheRest(), numbers((40,)), targets=["a"])


class UsedWithoutACall(TwoLayers):
    def forward(self, x):
        state = self.a(x)
        return self.b(torch.tanh(state @ self.c.weight.T))

    def __init__(self):
        super().__init__()
        self.c = nn.Linear(6, 6).double()


def test_a_weight_that_is_used_without_its_module_is_no_zero():
    with pytest.raises(TargetError, match="uses the weight of c without calling the module.*leave it out"):
        ntk(UsedWithoutACall(), numbers(), targets=["a", "c"], space="weight", always_trained=())
    assert not ntk(UsedWithoutACall(), numbers(), targets=["a", "c"], always_trained=())["c"].any()


def test_without_a_check_the_noise_floor_follows_autocast_too():
    model, batches = small.seeded(small.bert, dtype=torch.float32), small.text_batches()
    with torch.autocast("cpu", torch.bfloat16):
        assert ntk(model, batches, check="off").provenance["dtype"] == "torch.bfloat16"


@pytest.mark.parametrize(
    "register",
    [
        lambda model: model.a.register_full_backward_pre_hook(lambda module, gradients: (2 * gradients[0],)),
        lambda model: model.a.weight.register_hook(lambda gradient: 2 * gradient),
    ],
)
def test_hooks_of_the_backward_pass_that_change_gradients_are_named(register):
    exact = 0
    for space in ("lora", "weight"):
        model = TwoLayers()
        register(model)
        try:
            ntk(model, numbers(), targets=["a"], space=space, always_trained=())
            exact += 1
        except TargetError as error:
            assert "there are hooks of yours (1): remove them" in str(error)
    assert exact == 1  # a gradient of the weight is none of an adapter, and what comes before the layer is none of it
