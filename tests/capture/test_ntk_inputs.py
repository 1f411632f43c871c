# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What modules share, inputs that models change in place afterwards, and the precision of products."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peft_linear import Resources
from peft_linear.capture.shared_inputs import SharedInputs
from peft_linear.errors import PeftLinearError
from tests import reference
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk


EXACT = {"rtol": 1e-10, "atol": 1e-12}


class InPlace(nn.Module):
    """Changes the input of `first`, which autograd has no reason to keep, after `first` has used it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = x * 1.0
        y = self.first(x)
        x += torch.tanh(y)
        return {"logits": self.head(torch.tanh(self.second(x))).sum(1)}


def test_an_input_that_is_changed_in_place_afterwards_is_kept_as_the_module_got_it():
    torch.manual_seed(0)
    model = InPlace().double()
    batches = [{"x": torch.randn(3, 4, 5, dtype=torch.float64)}]

    def output(model, batch):
        return model(**batch)["logits"][0]

    kernels = ntk(model, batches, targets=["first", "second"], space="weight", always_trained=())
    for name in kernels.names:
        # by finite differences: autograd itself refuses the weight gradient of such a layer
        weight, rows, step = model.get_submodule(name).weight, [], 1e-6
        with torch.no_grad():
            for place in range(weight.numel()):
                values = []
                for sign in (1, -1):
                    weight.view(-1)[place] += sign * step
                    values.append(output_of_all(model, batches[0]))
                    weight.view(-1)[place] -= sign * step
                rows.append((values[0] - values[1]) / (2 * step))
        jacobian = torch.stack(rows, 1)
        assert_close(kernels[name], jacobian @ jacobian.T, rtol=1e-7, atol=1e-7)


def output_of_all(model, batch):
    return model(**batch)["logits"].flatten()


def test_queries_keys_and_values_share_one_product(monkeypatch):
    products = []
    original = SharedInputs._stack

    def count(self, places, like):
        products.append(sorted(name.rpartition(".")[2] for name, _, _ in places))
        return original(self, places, like)

    monkeypatch.setattr(SharedInputs, "_stack", count)
    model, batches = small.seeded(small.bert), small.text_batches(sizes=(3,))
    ntk(model, batches, targets=["query", "key", "value", "intermediate.dense"], check="off")
    assert products == [["dense"], ["key", "query", "value"]] * 2


@pytest.mark.parametrize("space", ["lora", "weight"])
def test_products_in_float32_are_close_and_the_noise_floor_covers_the_difference(space):
    batches = small.text_batches()
    model = small.seeded(small.bert, dtype=torch.float32)
    quick = ntk(model, batches, space=space)
    wide = ntk(model, batches, space=space, precision=torch.float64)
    assert quick.provenance["product_dtype"] == "torch.float32"
    assert wide.provenance["product_dtype"] == "torch.float64"
    difference = torch.linalg.matrix_norm(quick.subset() - wide.subset(), 2)
    assert 0 < float(difference) <= quick.spectrum().noise_floor
    assert wide.spectrum().noise_floor < 1e-3 * quick.spectrum().noise_floor
    exact = ntk(small.seeded(small.bert), batches, space=space)
    assert_close(quick.subset(), exact.subset(), rtol=1e-4, atol=1e-5)
    assert exact.provenance["product_dtype"] == "torch.float64"


def test_another_precision_is_an_error():
    with pytest.raises(PeftLinearError, match=r"precision must be None, torch.float32 or torch.float64, got torch"):
        Resources(precision=torch.bfloat16)


def test_modules_of_one_input_are_exact_each():
    model, batches = small.seeded(small.llama), small.text_batches(padding="left")
    kernels = ntk(model, batches, targets=["q_proj", "k_proj", "v_proj"], rank=4)
    adapted = reference.with_lora(small.seeded(small.llama), kernels.names, 4, 16.0)
    for name in kernels.names:
        expected = reference.kernel(adapted, reference.lora_parameters(adapted, name)[1:], batches, reference.logits)
        assert_close(kernels[name], expected, **EXACT)
