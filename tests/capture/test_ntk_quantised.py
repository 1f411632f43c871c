# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""compute_ntk on models with quantised linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peft_linear.capture.adapter_spaces import initial_lora_a
from peft_linear.capture.ntk import compute_ntk
from peft_linear.errors import TargetError
from tests import reference
from tests.helpers import small_models as small
from tests.helpers.quantised import quantised


TARGETS = ["query", "output.dense"]


def slow_kernel(model: nn.Module, name: str, batches: list[dict]) -> torch.Tensor:
    """Gradients with respect to B of a LoRA adapter put beside the layer by hand, one example and output at a time."""
    layer = model.get_submodule(name)
    a = initial_lora_a(name, layer.in_features, 8)
    b = torch.zeros(layer.out_features, 8, dtype=torch.float64, requires_grad=True)

    def adapt(module, args, output):
        return output + 2 * (args[0] @ a.T.to(args[0]) @ b.T.to(args[0]))

    handle = layer.register_forward_hook(adapt)
    rows = reference.jacobian(model, [b], batches, reference.logits)
    handle.remove()
    return rows @ rows.T


@pytest.mark.parametrize(("kind", "tolerance"), [("ours", 1e-5), ("int8", 1e-3), ("nf4", 1e-3), ("fp4", 1e-3)])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_lora_kernels_over_quantised_linears(kind, tolerance):
    model, batches = quantised(kind), small.text_batches()
    kernels = compute_ntk(model, batches, targets=TARGETS, progress=False)
    assert len(kernels) == 6
    for name in kernels.names:
        expected = slow_kernel(quantised(kind), name, batches)
        assert float((kernels[name] - expected).norm() / expected.norm()) < tolerance


def test_a_quantised_linear_is_exact_in_float64():
    model, batches = quantised("ours", torch.float64), small.text_batches()
    kernels = compute_ntk(model, batches, targets=TARGETS, progress=False)
    for name in kernels.names:
        assert_close(kernels[name], slow_kernel(model, name, batches), rtol=1e-10, atol=1e-12)


def test_weights_are_not_packed_for_inference_while_we_look_and_packed_ones_are_refused():
    model, batches = quantised("ours"), small.text_batches()
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.support_avx512bf16_for_cpu = True
    layer.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(module.support_avx512bf16_for_cpu))
    compute_ntk(model, batches, targets=["query"], progress=False)
    assert not any(seen) and layer.support_avx512bf16_for_cpu
    layer.weight.quant_state = type("QuantState", (), {"packing_format_for_cpu": True})()
    with pytest.raises(TargetError, match="Int8Linear has 4-bit weights that bitsandbytes packed"):
        compute_ntk(model, batches, targets=["query"], progress=False)
