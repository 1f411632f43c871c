# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Two processes under DDP and accelerate train what one trains, also where they do not draw the same random A.

accelerate uses its FSDP plugin on accelerators only: on a CPU it trains with DDP without a warning. What it does with
the plugin needs no accelerator, so the tests set the state that it would have there.
"""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import get_peft_model
from torch import distributed, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from peft_linear.integrations.callbacks import ProximalCallback
from peft_linear.integrations.kl_callback import KlToBaseCallback
from peft_linear.proximal import proximal_distance, proximal_firing_rate
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from peft_linear.tuners.proximal_lora.state import find_adapters
from tests.helpers import small_models
from tests.helpers.ports import free_port
from tests.helpers.proximal_loop import batches, groups, proximal, risk
from tests.helpers.reference_proximal import lora_parameters


pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
FSDP2 = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP2 on a CPU")
VARIANTS = {
    "default": {},
    "selective": {"proximal_selective": True},
    "projection": {"proximal_mode": "projection"},
    "delta": {"proximal_space": "delta"},
    "delta-coupled": {"proximal_space": "delta", "proximal_mode": "coupled", "proximal_selective": True},
    "function": {"proximal_space": "function"},
}
CLIP = 0.05


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- how two processes prepare a model and its optimizer ----------------------------------------------------------


class Plain:
    """The methods of `Accelerator` that are used here, for one process or plain DDP."""

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, limit):
        nn.utils.clip_grad_norm_(parameters, limit)


def ddp(model, optimizer):
    return Plain(), nn.parallel.DistributedDataParallel(model), optimizer


def accelerate_ddp(model, optimizer):
    accelerator = Accelerator(cpu=True)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    return accelerator, *accelerator.prepare(model, optimizer)


def accelerate_fsdp2(model, optimizer, efficient):
    """`efficient`: the model is moved to the meta device and then gets the weights of rank 0."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=efficient
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU  # otherwise the next lines are obsolete
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    prepared = accelerator.prepare(model, optimizer)
    assert all(hasattr(p, "full_tensor") for p in lora_parameters(model).values())
    return accelerator, *prepared


PREPARE = {
    "ddp": ddp,
    "accelerate-ddp": accelerate_ddp,
    "accelerate-fsdp2": partial(accelerate_fsdp2, efficient=False),
    "accelerate-fsdp2-efficient": partial(accelerate_fsdp2, efficient=True),
}


def forget_accelerate():
    """accelerate has one state per process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def train(model, optimizer, accelerator, share=slice(None)):
    """The mean over processes of the gradients of the halves is the gradient of the whole batch."""
    for inputs, labels in batches():
        optimizer.zero_grad()
        accelerator.backward(risk(model, (inputs[share], labels[share])))
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


def whole(model):
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in lora_parameters(model).items()}


def facts(model):
    anchors = find_adapters(model)[0].anchors()
    return {
        "rate": proximal_firing_rate(model),
        "distance": proximal_distance(model, space="factors"),
        "delta": proximal_distance(model, space="delta"),
    }, {name: anchor.a for name, anchor in anchors.items()}


# --- the Trainer ---------------------------------------------------------------------------------------------------


def rows():
    torch.manual_seed(3)
    return [{"input_ids": torch.randint(1, small_models.VOCABULARY, (6,)), "labels": index % 3} for index in range(16)]


class InOrder(Trainer):
    """The same examples in a step, however many processes share it."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def fit(folder, seed, batch_size, steered=False):
    """`steered`: λ to a budget of KL, and KL in the loss; the reference is the same in all processes."""
    torch.manual_seed(0)
    base = small_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    torch.manual_seed(seed)
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"}
    model = get_peft_model(base, ProximalLoraConfig(proximal_lambda=3.0, **options), autocast_adapter_dtype=False)
    arguments = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", seed=5,
        max_steps=6, learning_rate=0.02, per_device_train_batch_size=batch_size, logging_steps=1, max_grad_norm=0.5,
        average_tokens_across_devices=False,  # else the loss of a classifier is multiplied by the number of processes
        ddp_backend="gloo" if distributed.is_initialized() else None,
    )  # fmt: skip
    reference = small_models.text_batches()
    callbacks = [ProximalCallback()]
    if steered:
        callbacks = [ProximalCallback(reference, 1e-3), KlToBaseCallback(reference, 0.5)]
    trainer = InOrder(model=model, args=arguments, train_dataset=rows(), callbacks=callbacks)
    trainer.train()
    logged = [entry["proximal_distance"] for entry in trainer.state.log_history if "proximal_distance" in entry]
    return whole(model), logged


# --- the two processes -----------------------------------------------------------------------------------------------


def run(rank, port, folder, ways):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group("gloo")
    # first: accelerate's plugin for FSDP leaves an environment variable behind
    for name, steered in (("trainer", False), ("steered", True)):
        torch.save(fit(folder / name, 1 if rank == 0 else 99, 2, steered), folder / f"{name}{rank}.pt")
    half = slice(0, 3) if rank == 0 else slice(3, 6)
    for way, variant in itertools.product(ways, VARIANTS):
        alike = way == "accelerate-fsdp2"  # the weights of rank 0 are not copied
        model = proximal(seed=1 if alike or rank == 0 else 99, **VARIANTS[variant])
        forget_accelerate()
        accelerator, wrapped, optimizer = PREPARE[way](model, torch.optim.AdamW(groups(model)))
        train(wrapped, optimizer, accelerator, half)
        torch.save((whole(model), *facts(model)), folder / f"{way}-{variant}{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("together")
    port = free_port()
    ways = [way for way in PREPARE if "fsdp2" not in way or not FSDP2.args[0]]
    torch.multiprocessing.spawn(run, args=(port, folder, ways), nprocs=2)
    return folder


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("way", [pytest.param(way, marks=FSDP2 if "fsdp2" in way else ()) for way in PREPARE])
def test_two_processes_train_what_one_trains(together, way, variant):
    model = proximal(**VARIANTS[variant])
    train(model, torch.optim.AdamW(groups(model)), Plain())
    expected, starts = facts(model)
    for rank in range(2):
        values, known, anchors = torch.load(together / f"{way}-{variant}{rank}.pt")
        for name, value in whole(model).items():
            torch.testing.assert_close(values[name], value, rtol=1e-12, atol=1e-12)
        assert known == pytest.approx(expected, rel=1e-10)
        assert anchors.keys() == starts.keys()
        assert all(torch.equal(anchors[name], start) for name, start in starts.items())
    assert 0 < expected["rate"] <= 1


@pytest.mark.parametrize("name", ["trainer", "steered"])
@pytest.mark.filterwarnings("ignore:the run ends at a KL")
def test_the_trainer_in_two_processes_trains_what_it_trains_in_one(together, tmp_path, name):
    expected, distances = fit(tmp_path, 1, 4, name == "steered")
    for rank in range(2):
        values, logged = torch.load(together / f"{name}{rank}.pt")
        for key, value in expected.items():
            torch.testing.assert_close(values[key], value, rtol=1e-12, atol=1e-12)
        assert logged == pytest.approx(distances, rel=1e-10)
