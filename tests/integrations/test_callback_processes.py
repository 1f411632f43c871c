# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The callback under DDP: the main process chooses, all restrict to it, and train what one process trains."""

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_linear.errors import BudgetError
from peft_linear.integrations import recommendation_callback
from peft_linear.integrations.main_process import on_main_process
from peft_linear.integrations.restrict import adapted_modules
from peft_linear.selection import recommend
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from tests.helpers.callback_runs import callback, trainer_for
from tests.helpers.planted import planted_kernels
from tests.helpers.ports import free_port
from tests.helpers.small_models import bert, seeded


RUNS = {"report": ProximalLoraConfig, "restrict": ProximalLoraConfig, "lora": LoraConfig}


def model_for(run, seed=0):
    base = seeded(bert, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(seed)
    return get_peft_model(base, RUNS[run](r=2, lora_alpha=4, target_modules="all-linear", task_type="SEQ_CLS"))


def fit(run, folder, batch_size, resume=None):
    """(modules, state of the adapter after four steps, the callback)"""
    ours = callback("report" if run == "report" else "restrict", resume_from_checkpoint=resume)
    model = model_for(run, seed=0 if resume is None else 5)
    options = {"max_steps": 4, "learning_rate": 0.02, "per_device_train_batch_size": batch_size}
    if torch.distributed.is_initialized():
        options["ddp_backend"] = "gloo"
    trainer = trainer_for(model, folder, [ours], **options)
    trainer.train(resume_from_checkpoint=resume)
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return sorted(adapted_modules(model, "default")), values, ours


def _process(rank, port, folder):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", **address)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if rank:

        def compute(*args, **kwargs):
            raise AssertionError("only the main process computes")

        recommendation_callback.recommend_modules = compute
    for run in RUNS:
        modules, values, ours = fit(run, folder / run, batch_size=2)
        torch.save((modules, values, ours.recommendation.modules), folder / f"{run}{rank}.pt")
    # as on two machines: the second has no checkpoint in its own output folder
    checkpoint = str(folder / "restrict" / "checkpoint-2")
    try:
        found = fit("restrict", folder / "restrict" if rank == 0 else folder / "elsewhere", 2, checkpoint)
    except RuntimeError as error:
        if "tagged with cpu" not in str(error):
            raise
        (folder / "upstream").touch()
    else:
        modules, values, ours = found
        torch.save((modules, values, ours.modules), folder / f"resumed{rank}.pt")
    try:
        on_main_process(lambda: recommend(planted_kernels(), 0), rank == 0)
    except BudgetError as error:
        (folder / f"{rank}.error").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("together")
    port = free_port()
    torch.multiprocessing.spawn(_process, args=(port, folder), nprocs=2)
    return folder


def of(folder, run):
    return [torch.load(folder / f"{run}{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("run", list(RUNS))
def test_two_processes_choose_once_and_train_what_one_trains(together, run, tmp_path):
    """Both see two rows a step; one process that sees all four takes the mean of the same gradients."""
    expected, alone, ours = fit(run, tmp_path, batch_size=4)
    assert len(ours.modules) == 3 and len(expected) == (13 if run == "report" else 3)
    for modules, values, chosen in of(together, run):
        assert modules == expected and chosen == ours.modules
        assert list(values) == list(alone)
        for name, value in values.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)
    one, other = (values for _, values, _ in of(together, run))
    assert all(torch.equal(one[name], other[name]) for name in one), "the processes drifted apart"
    start = {name: p.detach() for name, p in model_for(run).named_parameters()}
    assert any(not torch.equal(value, start[name]) for name, value in one.items()), "nothing was trained"
    assert (together / run / "recommendation.json").is_file()


@pytest.mark.slow
def test_all_processes_resume_the_choice_that_the_main_one_finds(together):
    if (together / "upstream").exists():
        pytest.skip("this version of torch cannot load the Trainer's optimizer onto the device 'cpu:0'")
    for whole, resumed in zip(of(together, "restrict"), of(together, "resumed"), strict=True):
        assert whole[0] == resumed[0] and set(whole[2]) == set(resumed[2])
        assert all(torch.equal(value, resumed[1][name]) for name, value in whole[1].items())


@pytest.mark.slow
def test_an_error_of_the_main_process_is_raised_on_all(together):
    assert (together / "0.error").read_text() == (together / "1.error").read_text()
    assert "a budget of 0 modules" in (together / "0.error").read_text()
