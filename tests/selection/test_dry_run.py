# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a step and a recommendation would take, without computing either."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_linear import recommend_modules
from peft_linear.errors import BudgetError, PeftLinearError
from peft_linear.selection import estimate_cost
from tests.helpers.small_models import bert


def llama(**sizes):
    return LlamaForCausalLM(LlamaConfig(**sizes))


def test_a_model_of_seven_billion_parameters_without_weights():
    with torch.device("meta"):
        model = llama().to(torch.bfloat16)
    found = estimate_cost(model, (4, 512), examples=32)
    step, tokens = found.step, 4 * 512
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 6.7e9 < parameters < 6.8e9
    assert step.weights == pytest.approx(2 * parameters, rel=1e-3)
    forward = sum(work.flops for work in step.forward.values())
    assert forward == pytest.approx(2 * tokens * parameters, rel=0.05)
    ranks = step.all_linear(8)
    backward = step.work(ranks).flops - forward  # gradients of inputs alone: as much as forward
    assert len(ranks) == 7 * 32 and backward == pytest.approx(forward, rel=0.1)
    again = step.with_checkpointing()
    assert 1.3 < again.time(ranks) / step.time(ranks) < 1.6
    assert again.activations(ranks) < step.activations(ranks) / 5
    shares = [step.time_share(found.last_layers(share), 8) for share in (1.0, 0.75, 0.5, 0.25)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] > 0.5
    for words in ("LlamaForCausalLM, batch of 4 x 512, weights 13.5GB", "last 50% of the layers", "32 examples"):
        assert words in str(found)


def test_more_examples_take_more_and_heads_are_counted():
    few, many = (estimate_cost(bert(), (4, 16), examples=n) for n in (8, 16))
    assert many.kernels_time > 2 * few.kernels_time * 0.99 and many.kernels_memory > few.kernels_memory
    ids = torch.ones(4, 16, dtype=torch.long)
    batches = [{"input_ids": ids}, {"input_ids": ids}]
    assert estimate_cost(bert(), batches).kernels_time == few.kernels_time
    assert estimate_cost(bert(), (4, 16), examples=8, targets=["query"]).kernels_time < few.kernels_time


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ((4,), {}, r"a batch's shape is such as \(4, 512\)"),
        ((4, 0), {}, "a batch's shape"),
        ([], {}, "`batches` is empty"),
        ((4, 8), {"examples": 0}, "examples must be at least 1, got 0"),
        ((4, 8), {"ranks": 3}, "unknown arguments ranks"),
    ],
)
def test_refused(batches, options, message):
    with pytest.raises(PeftLinearError, match=message):
        estimate_cost(bert(), batches, **options)


def test_a_budget_that_cannot_be_kept_is_refused_before_any_kernel():
    ids = torch.ones(4, 16, dtype=torch.long)
    asked = []
    model = bert()
    model.register_forward_hook(lambda module, *_: asked.append(next(module.parameters()).device.type))
    with pytest.raises(BudgetError, match=r"'time:0.01' fits no module: .* alone takes 0\.\d\d of the time"):
        recommend_modules(model, [{"input_ids": ids, "labels": torch.arange(4) % 3}], "time:0.01", progress=False)
    assert not asked  # the model did not run; its operations were counted on a copy without its hooks
