# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The counts of a training step: by hand on a toy, and against what autograd keeps in real steps."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_linear import compute_ntk, recommend
from peft_linear.capture.batches import Batch
from peft_linear.capture.meta_copy import meta_copy
from peft_linear.capture.resources import Resources
from peft_linear.capture.step_cost import counted_step, step_record
from peft_linear.errors import BudgetError, PeftLinearError
from peft_linear.recommendation.cost import StepCost
from tests.helpers import small_models as small
from tests.helpers.small_models import bert


N, D, H = 5, 3, 7  # examples, width, hidden width


class Toy(nn.Module):
    """Two linear layers with a ReLU between them and a frozen one above."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, H), nn.Linear(H, D), nn.Linear(D, 1)])

    def forward(self, x):
        first, second, third = self.layers
        return third(second(torch.relu(first(x))))


def toy_cost():
    return StepCost.from_record(step_record(Toy(), {"x": torch.zeros(N, D)}))


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes))


def text(examples=2, tokens=9):
    ids = torch.arange(examples * tokens).reshape(examples, tokens) % 60
    return {"input_ids": ids, "labels": ids}


def kept_bytes(model, names, rank, inputs):
    """Of the different storages that autograd saves in a forward pass of peft's LoRA."""
    config = LoraConfig(r=rank, target_modules=list(names), task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(model), config).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    del loss
    return sum(size for pointer, size in found.items() if pointer not in own)


def test_a_toy_is_counted_as_by_hand():
    cost = toy_cost()
    assert [(m.name, m.d_in, m.d_out, m.positions) for m in cost.modules] == [
        ("layers.0", D, H, N),
        ("layers.1", H, D, N),
        ("layers.2", D, 1, N),
    ]
    assert sum(work.flops for work in cost.forward.values()) == 2 * N * (D * H + H * D + D)
    adapter = {0: 2 * N * (2 * D + 3 * H), 1: 2 * N * (2 * H + 3 * D), 2: 2 * N * (2 * D + 3)}
    forward = 2 * N * (D * H + H * D + D)
    assert cost.work({"layers.2": 1}).flops == forward + adapter[2]  # nothing frozen above
    assert cost.work({"layers.1": 1}).flops == forward + adapter[1] + 2 * N * D  # through the third
    assert cost.work({"layers.0": 1}).flops == forward + adapter[0] + 2 * N * (D + H * D)
    both = cost.work({"layers.0": 1, "layers.1": 1}).flops  # the adapter of the second passes its gradient on
    assert both == forward + adapter[0] + adapter[1] + 2 * N * (D + H * D) + 2 * N * H
    assert cost.activations({}) == 0
    assert cost.activations({"layers.1": 2}) == 4 * N * (H + 2)  # its input and A x
    assert cost.activations({"layers.0": 2}) == 4 * N * (D + 2) + 4 * N * H  # and the result of the ReLU
    # The result of the ReLU is the input of the second layer: kept once for both.
    assert cost.activations({"layers.0": 2, "layers.1": 2}) == 4 * N * (D + 2) + 4 * N * (H + 2)
    weights = 4 * (D * H + H + H * D + D + D + 1)
    assert cost.memory({"layers.1": 2}) == weights + 4 * N * (H + 2) + 16 * 2 * (H + D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wanted",
    [
        lambda name: True,
        lambda name: "mlp" in name,
        lambda name: name.endswith(("q_proj", "v_proj")),
        lambda name: name.endswith("down_proj"),
        lambda name: ".2." in name,
        lambda name: ".1.self_attn.o_proj" in name,
    ],
    ids=["all", "mlp", "qv", "down", "last layer", "one"],
)
def test_kept_bytes_are_those_that_autograd_keeps(wanted, dtype):
    model, inputs = llama().to(dtype), text()
    cost = StepCost.from_record(step_record(model, inputs))
    ranks = {module.name: 4 for module in cost.modules if wanted(module.name)}
    assert cost.activations(ranks) == pytest.approx(kept_bytes(model, ranks, 4, inputs), rel=0.001)


def test_modules_come_in_the_order_of_the_pass_and_share_inputs():
    cost = StepCost.from_record(step_record(llama(), text()))
    leaves = [module.name.rpartition(".")[2] for module in cost.modules[:7]]
    assert leaves == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inputs = [module.input for module in cost.modules[:7]]
    assert inputs[0] == inputs[1] == inputs[2] and inputs[4] == inputs[5] and len(set(inputs)) == 4
    assert cost.modules[0].below == 0 and cost.modules[3].below == 0b1110
    assert (cost.modules[8].layer, cost.modules[8].kind, cost.modules[8].block) == (1, "self_attn.k_proj", 1)


def test_a_model_without_weights_has_the_same_counts_and_a_real_one_is_left_as_it_is():
    model = llama().train()
    before = copy.deepcopy(model.state_dict())
    config = copy.deepcopy(model.config.to_dict())
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    real = step_record(model, text())
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.device("meta"):
        empty = llama()
    assert {**step_record(empty, text()), "device": "cpu"} == real
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert all(module.training and not module._forward_hooks for module in model.modules())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.0.self_attn.q_proj.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adapters_of_a_peft_model_are_not_counted():
    plain = step_record(llama(), text())
    adapted = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    found = step_record(adapted, text())
    parameters = ("weights",)  # what lies in memory is counted
    assert {k: v for k, v in found.items() if k not in parameters} == {
        k: v for k, v in plain.items() if k not in parameters
    }


def test_a_task_head_is_trained_with_every_set():
    ids = torch.ones(4, 6, dtype=torch.long)
    cost = StepCost.from_record(step_record(bert(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    assert cost.trained == 16 * 3 + 3
    assert cost.work({}).flops > sum(work.flops for work in cost.forward.values())  # the gradient of its weight
    assert "classifier" not in cost.index


class Asks(Toy):
    def forward(self, x):
        return super().forward(x) * float(x.sum().item() + 2)


def test_a_model_that_asks_for_numbers_is_refused_and_its_kernels_say_why():
    with pytest.raises(PeftLinearError, match=r"of Asks cannot be counted: its code does not run on the meta device"):
        step_record(Asks(), {"x": torch.zeros(N, D)})
    torch.manual_seed(0)
    unchecked = Resources(check="off", progress=False)  # what it asks for is of all examples together
    kernels = compute_ntk(Asks(), [{"x": torch.randn(N, D)}], rank=1, resources=unchecked)
    with pytest.raises(BudgetError, match=r"a budget of time or memory cannot be kept: the operations of .* Asks"):
        recommend(kernels, "time:0.9", "trace")
    assert recommend(kernels, 1, "trace").step_time is None


def test_a_users_hooks_are_not_called_by_counting():
    model, called = small.seeded(small.bert), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: called.append(1))
        module.register_forward_pre_hook(lambda *_: called.append(1))
    meta = meta_copy(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in meta.modules())
    assert all(module._forward_hooks and module._forward_pre_hooks for module in model.modules())
    batch = small.text_batches()[0]
    counted_step(model, Batch({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]), [], None)
    assert not called
