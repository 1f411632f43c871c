# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Run by each of the two processes of test_proximal_fsdp: trains sharded adapters and saves the results."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from peft import PeftModel
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peft_linear.errors import PeftLinearError
from peft_linear.proximal import proximal_distance, proximal_firing_rate
from peft_linear.tuners.proximal_lora import reset_proximal_anchor
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers.proximal_loop import batches, groups, proximal, risk
from tests.helpers.reference_proximal import lora_parameters


VARIANTS = {
    "selective": {"proximal_selective": True},
    "always": {"proximal_selective": False, "proximal_schedule": "linear", "proximal_schedule_steps": 20},
    # an A of LoRA rank 1 has no row on the second process
    "coupled": {"proximal_mode": "coupled", "proximal_selective": True, "rank_pattern": {"0": 1}},
    "projection": {"proximal_mode": "projection", "rank_pattern": {"0": 1}},
    "delta": {"proximal_space": "delta", "proximal_selective": True, "proximal_lambda_pattern": {"0": 3.0}},
    "delta-coupled": {"proximal_space": "delta", "proximal_mode": "coupled", "proximal_selective": False},
    "function": {"proximal_space": "function", "rank_pattern": {"0": 1}},
    "function-coupled": {"proximal_space": "function", "proximal_mode": "coupled", "proximal_selective": True},
    "empty": {"proximal_selective": True, "rank_pattern": {"0": 1}},
    "elsewhere": {"proximal_space": "delta", "proximal_selective": False},  # neither factor starts at zero
}


def made(name):
    model = proximal(**VARIANTS[name])
    if name == "elsewhere":
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.add_(0.3 * torch.randn_like(parameter))
        reset_proximal_anchor(model)
    return model


def train(model, optimizer, share=slice(None), data=None):
    """The mean over processes of the gradients of the halves is the gradient of the whole batch."""
    for inputs, labels in data or batches():
        optimizer.zero_grad()
        risk(model, (inputs[share], labels[share])).backward()
        optimizer.step()


def facts(model):
    return {
        "rate": proximal_firing_rate(model),
        "factors": proximal_distance(model, space="factors"),
        "delta": proximal_distance(model, space="delta"),
    }


def in_bfloat16(space, mode="decoupled"):
    """Displaced and at rest; an A of rank 1 has no row on the second process."""
    model = proximal(lam=10.0, proximal_space=space, proximal_mode=mode, rank_pattern={"0": 1}).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.25)
    return model


def rest(model, optimizer, steps):
    for _ in range(steps):
        for parameter in lora_parameters(model).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def sharded(model):
    network = model.base_model.model
    mesh = init_device_mesh("cpu", (2,))
    for module in (network[0], network[2], model):
        fully_shard(module, mesh=mesh)
    return model


def whole(model):
    return {name: p.full_tensor().detach() for name, p in lora_parameters(model).items()}


def main(rank: int, folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    half = slice(0, 3) if rank == 0 else slice(3, 6)
    for name in VARIANTS:
        model = sharded(made(name))
        optimizer = torch.optim.AdamW(groups(model))
        train(model, optimizer, half)
        torch.save((whole(model), facts(model)), folder / f"{name}{rank}.pt")

    # the position in the schedule is part of the optimizer's state as torch.distributed.checkpoint saves it
    model = sharded(made("always"))
    optimizer = torch.optim.AdamW(groups(model))
    train(model, optimizer, half, batches()[:5])
    state = get_optimizer_state_dict(model, optimizer)
    weights = {name: value.clone() for name, value in get_model_state_dict(model).items()}
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "adapter", state_dict=full)
    resumed = sharded(made("always"))
    resumed.load_state_dict(weights)
    other = torch.optim.AdamW(groups(resumed))
    set_optimizer_state_dict(resumed, other, state)
    train(resumed, other, half, batches()[5:])
    torch.save((whole(resumed), facts(resumed)), folder / f"resumed{rank}.pt")
    if rank == 0:
        assert isinstance(resumed, PeftModel) and find_adapters(resumed)[0].statistics.position == 12

    reset_proximal_anchor(resumed)
    assert proximal_distance(resumed) == 0
    pull_in_bfloat16(rank, folder)
    train_with_unsupported_layout(rank, folder)
    distributed.destroy_process_group()


def pull_in_bfloat16(rank: int, folder: Path) -> None:
    """Half of the steps, saved and resumed, then the others; coupled steps are refused."""
    for space in ("factors", "delta", "function"):
        model = sharded(in_bfloat16(space))
        optimizer = torch.optim.SGD(lora_parameters(model).values(), lr=2e-4)
        rest(model, optimizer, 50)
        state, weights = get_optimizer_state_dict(model, optimizer), get_model_state_dict(model)
        resumed = sharded(in_bfloat16(space))
        resumed.load_state_dict({name: value.clone() for name, value in weights.items()})
        other = torch.optim.SGD(lora_parameters(resumed).values(), lr=2e-4)
        set_optimizer_state_dict(resumed, other, state)
        rest(resumed, other, 50)
        torch.save(whole(resumed), folder / f"bfloat16-{space}{rank}.pt")
    model = sharded(in_bfloat16("factors", "coupled"))
    try:
        rest(model, torch.optim.SGD(lora_parameters(model).values(), lr=2e-4), 1)
    except PeftLinearError as error:
        (folder / f"coupled{rank}.txt").write_text(str(error))


def train_with_unsupported_layout(rank: int, folder: Path) -> None:
    """A DTensor with a placement that is neither `Shard` nor `Replicate`."""
    from torch.distributed.tensor import DTensor, Partial

    model = proximal()
    layer = model.base_model.model[0].lora_A["default"]
    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh, [Partial()]))
    layer.weight = partial
    partial.grad = torch.zeros_like(partial)
    try:
        torch.optim.SGD([partial], lr=0.1).step()
    except PeftLinearError as error:
        (folder / f"refused{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(int(os.environ["RANK"]), Path(sys.argv[1]))
