# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Kinds of layer: a kind is one class, and everything that computes kernels or features then works with it.

Two kinds are registered for the tests alone: nn.Conv2d, whose positions are unfolded windows, and a layer with its
features in the second dimension and its weight stored transposed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from peft_linear.capture import layers
from peft_linear.capture.adapter_spaces import initial_lora_a
from peft_linear.capture.features import jacobian_features
from peft_linear.capture.layers import Conv1D, Layer, Linear, layer_kind, layer_of, register_layer
from peft_linear.capture.request import KernelRequest
from peft_linear.errors import TargetError
from tests import reference
from tests.helpers.kernels import ntk, sign_kernel


EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Convolution(Layer):
    """nn.Conv2d: one position a window."""

    described = "nn.Conv2d"

    @classmethod
    def accepts(cls, module):
        return type(module) is nn.Conv2d and module.groups == 1

    @property
    def shape(self):
        d_out = self.base.weight.shape[0]
        return self.base.weight.numel() // d_out, d_out

    @property
    def layout(self):
        return "windows", self.base.kernel_size, self.base.dilation, self.base.padding, self.base.stride

    def inputs(self, tensor, batch_size):
        _, kernel_size, dilation, padding, stride = self.layout
        return F.unfold(tensor, kernel_size, dilation, padding, stride).mT

    def cotangents(self, tensor, batch_size):
        return tensor.flatten(2).mT


class ChannelsFirst(nn.Module):
    """y[b, :, t] = Wᵀ x[b, :, t] + bias, W (d_in, d_out)."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5)
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        return torch.einsum("bit,io->bot", x, self.weight) + self.bias[:, None]


class Second(Layer):
    """`ChannelsFirst`."""

    described = "ChannelsFirst"
    output_first = False
    layout = "features second"

    @classmethod
    def accepts(cls, module):
        return isinstance(module, ChannelsFirst)

    @property
    def shape(self):
        return tuple(self.base.weight.shape)

    def inputs(self, tensor, batch_size):
        return tensor.mT

    def cotangents(self, tensor, batch_size):
        return tensor.mT


class Images(nn.Module):
    """Two convolutions of one image, another on their sum."""

    def __init__(self, dilation=(1, 2)):
        super().__init__()
        self.wide = nn.Conv2d(2, 4, 3, padding=1)
        self.narrow = nn.Conv2d(2, 4, 1, bias=False)
        self.deep = nn.Conv2d(4, 3, (3, 2), stride=2, dilation=dilation, padding=1)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        state = torch.tanh(self.wide(x)) + torch.sigmoid(self.narrow(x))
        return self.head(torch.tanh(self.deep(state)).mean((2, 3)))


class Sequences(nn.Module):
    """Linear layers of both layouts on one tensor."""

    def __init__(self):
        super().__init__()
        self.first = ChannelsFirst(5, 5)
        self.last = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head((torch.tanh(self.first(x)) * torch.sigmoid(self.last(x))).mean(2))


CASES = {
    "images": (Convolution, Images, (2, 4, 4), ["wide", "narrow", "deep"]),
    "sequences": (Second, Sequences, (5, 5), ["first", "last"]),
}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Kinds that a test registers go when it ends."""
    monkeypatch.setattr(layers, "LAYER_KINDS", list(layers.LAYER_KINDS))


@pytest.fixture(params=CASES)
def case(request):
    """A model with layers of a kind that is registered for the test, its batches and the names of the layers."""
    kind, factory, shape, names = CASES[request.param]
    register_layer(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory().double().eval()
        batches = [{"x": torch.randn(size, *shape, dtype=torch.float64)} for size in (3, 4)]
    return model, batches, names


def output(model, batch):
    return model(**batch)[0]


def stored_matrix(model, name, rows):
    """Jacobian rows of a weight as (n, d_out, d_in)."""
    layer = layer_of(name, model.get_submodule(name))
    return torch.stack([layer.as_matrix(row.view_as(layer.weight)) for row in rows])


def weight_rows(model, name, batches):
    return reference.jacobian(model, [model.get_submodule(name).weight], batches, output)


@pytest.mark.parametrize("space", ["weight", "rows", "columns"])
def test_weight_kernels_of_a_registered_kind_are_exact(case, space):
    model, batches, names = case
    kernels = ntk(model, batches, targets=names, space=space, rank=2)
    assert kernels.names == tuple(names)
    for name in names:
        rows = stored_matrix(model, name, weight_rows(model, name, batches))
        assert kernels.shapes[name] == (rows.shape[2], rows.shape[1])
        rows = {"weight": rows, "rows": rows[:, :2], "columns": rows[:, :, :2]}[space].flatten(1)
        assert_close(kernels[name], rows @ rows.T, **EXACT)


def test_bias_kernels_of_a_registered_kind_are_exact(case):
    model, batches, names = case
    names = [name for name in names if model.get_submodule(name).bias is not None]
    kernels = ntk(model, batches, targets=names, space="bias")
    for name in names:
        expected = reference.kernel(model, [model.get_submodule(name).bias], batches, output)
        assert_close(kernels[name], expected, **EXACT)


def test_lora_kernels_of_a_registered_kind_are_the_sketch_of_the_weights(case):
    """∂f/∂B = s · ∂f/∂W Aᵀ, whatever the layout."""
    model, batches, names = case
    kernels = ntk(model, batches, targets=names, rank=2, lora_alpha=6, draws=2, seed=5)
    for name in names:
        rows = stored_matrix(model, name, weight_rows(model, name, batches))
        expected = 0
        for draw in (0, 1):
            projected = (3.0 * rows @ initial_lora_a(name, rows.shape[2], 2, 5, draw).T).flatten(1)
            expected = expected + projected @ projected.T / 2
        assert_close(kernels[name], expected, **EXACT)
        assert kernels.num_parameters[name] == 2 * (rows.shape[1] + rows.shape[2])
    assert dict(kernels.num_parameters) == KernelRequest(targets=names, rank=2).candidates(model)


def test_sign_kernels_of_a_registered_kind_are_exact(case):
    model, batches, names = case
    kernels = sign_kernel(model, batches, targets=names, space="weight")
    for name in names:
        rows = weight_rows(model, name, batches)
        assert_close(kernels[name], (rows @ rows.sign().T + rows.sign() @ rows.T) / 2, **EXACT)


def test_an_always_trained_layer_of_a_registered_kind_is_exact(case):
    model, batches, names = case
    kernels = ntk(model, batches, targets=names[:1], always_trained=names[1:])
    parameters = [parameter for name in names[1:] for parameter in model.get_submodule(name).parameters()]
    assert_close(kernels.base, reference.kernel(model, parameters, batches, output), **EXACT)
    assert kernels.base_parameters == sum(parameter.numel() for parameter in parameters)


def test_features_of_always_trained_layers_come_back_as_their_parameters(case):
    model, batches, names = case
    features = jacobian_features(model, batches, names[:1], always_trained=names[1:], progress=False)
    base = features.subset([])
    parameters = dict(model.named_parameters())
    expected = {key: reference.jacobian(model, [value], batches, output) for key, value in parameters.items()}
    for number, row in enumerate(base.rows):
        for key, value in base.unflatten(row).items():
            assert value.shape == parameters[key].shape
            assert_close(value.flatten(), expected[key][number], **EXACT)
    assert_close(base.flatten(model), base.start, rtol=0, atol=0)
    for key, value in base.unflatten(base.start).items():
        assert torch.equal(value, parameters[key])


@pytest.mark.parametrize("b_scale", [0.0, 0.3])
def test_adapters_of_peft_on_convolutions_are_exact(b_scale):
    register_layer(Convolution)
    torch.manual_seed(0)
    model = Images(dilation=1).double().eval()  # peft leaves a dilation out of A
    batches = [{"x": torch.randn(3, 2, 4, 4, dtype=torch.float64)}]
    names = ["wide", "deep"]
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=names))
    layers_by_name = dict(adapted.get_base_model().named_modules())
    for name in names:
        factor = layers_by_name[name].lora_B["default"].weight
        factor.data = torch.randn(factor.shape, dtype=factor.dtype) * b_scale
    adapted.double().eval()
    kernels = ntk(adapted, batches, targets=names)
    features = jacobian_features(adapted, batches, always_trained=(), progress=False)
    parameters = dict(adapted.named_parameters())
    for name in names:
        factors = [layers_by_name[name].lora_A["default"].weight, layers_by_name[name].lora_B["default"].weight]
        assert_close(kernels[name], reference.kernel(adapted, factors, batches, output), **EXACT)
        assert kernels.num_parameters[name] == sum(factor.numel() for factor in factors)
        assert_close(features.subset(name).gram(), kernels[name], **EXACT)
    for key, value in features.unflatten(features.start).items():
        assert torch.equal(value, parameters[key])


def test_a_batch_is_the_sum_of_its_examples_for_a_registered_kind(case):
    model, batches, names = case
    together = ntk(model, batches, targets=names, space="weight")
    ones = [one for batch in batches for one in reference.example_batches(batch)]
    alone = ntk(model, ones, targets=names, space="weight")
    for name in names:
        assert_close(together[name], alone[name], **EXACT)


def test_a_registered_kind_is_a_target_by_name_and_not_of_all_linear(case):
    model, batches, names = case
    kinds = {name: layer_kind(model.get_submodule(name)) for name in names}
    expected = tuple(name for name in names if kinds[name] is Linear)
    assert ntk(model, batches, space="weight").names == (*expected, "head")


def test_a_module_of_no_kind_is_refused_with_those_that_there_are():
    with pytest.raises(TargetError, match=r"not a linear layer.*: wide \(Conv2d\).*supported are: .*nn.Linear and"):
        ntk(Images(), [{"x": torch.zeros(1, 2, 4, 4)}], targets=["wide"])
    with pytest.raises(TargetError, match=r"not a linear layer.*: x \(GELU\)"):
        layer_of("x", nn.GELU())


@pytest.mark.parametrize(
    "module, kind, shape",
    [
        (nn.Linear(3, 2), Linear, (3, 2)),
        (TransformersConv1D(2, 3), Conv1D, (3, 2)),
        (nn.LayerNorm(3), None, None),
        (nn.Embedding(3, 2), None, None),
        (nn.Conv2d(3, 2, 1), None, None),
    ],
)
def test_the_kind_of_a_module(module, kind, shape):
    assert layer_kind(module) is kind
    if kind is not None:
        layer = layer_of("x", module)
        assert type(layer) is kind and layer.shape == shape
        assert layer.as_matrix(layer.weight).shape == shape[::-1]


@pytest.mark.parametrize("module", [nn.Linear(3, 2), TransformersConv1D(2, 3)])
@pytest.mark.parametrize("shape, positions", [((4, 3), 1), ((4, 5, 3), 5), ((4, 5, 6, 3), 30), ((8, 3), 2)])
def test_positions_of_features_that_come_last(module, shape, positions):
    tensor = torch.randn(shape)
    inputs = layer_of("x", module).inputs(tensor, 4)
    assert inputs.shape == (4, positions, 3)
    assert torch.equal(inputs.flatten(), tensor.flatten())


@pytest.mark.parametrize("shape", [(3,), (5, 3)])
def test_examples_that_cannot_be_told_apart_are_refused_by_name(shape):
    with pytest.raises(TargetError, match=r"gate works on a tensor of shape .*2 examples of the batch cannot be told"):
        layer_of("gate", nn.Linear(3, 2)).cotangents(torch.zeros(shape), 2)
