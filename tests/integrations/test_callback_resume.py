# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The callback in a run that is resumed: the choice is the checkpoint's, and the run goes on as if never broken."""

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from peft_linear.errors import FileError, PeftLinearError, TargetError
from peft_linear.integrations.restrict import checkpoint_modules
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from tests.helpers.callback_runs import callback, peft_bert, trainer_for


class Killed(Exception):
    pass


class KilledAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("config_class", [ProximalLoraConfig, LoraConfig])
@pytest.mark.parametrize("action", ["restrict", "report"])
def test_a_run_killed_after_a_checkpoint_goes_on_as_if_never_broken(
    action, config_class, tmp_path, monkeypatch, caplog
):
    whole = callback(action)
    straight = trainer_for(peft_bert(config_class), tmp_path / "straight", [whole], max_steps=4)
    straight.train()
    first = callback(action)
    broken = trainer_for(peft_bert(config_class), tmp_path / "broken", [first, KilledAfter(3)], max_steps=4)
    with pytest.raises(Killed):
        broken.train()

    def recompute(*args, **kwargs):
        raise AssertionError("the choice was made again")

    monkeypatch.setattr("peft_linear.capture.request.KernelRequest.compute", recompute)
    again = callback(action, budget=7)  # a budget that would choose otherwise
    with caplog.at_level(logging.WARNING):
        resumed = trainer_for(peft_bert(config_class), tmp_path / "broken", [again], max_steps=4)
    assert set(again.modules) == set(first.modules) == set(whole.modules)
    assert again.recommendation == first.recommendation
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for (name, ours), (_, theirs) in zip(
        resumed.model.named_parameters(), straight.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), f"{name} differs from the run without a break"
    summaries = [entry for entry in resumed.state.log_history if "ntk_modules" in entry]
    assert len(summaries) == 1, "the summary is logged once a run, however often it is resumed"


def test_where_the_checkpoint_is_looked_for(tmp_path):
    first = callback()
    trainer_for(peft_bert(), tmp_path, [first]).train()
    given = callback(budget=5, resume_from_checkpoint=tmp_path / "checkpoint-2")
    trainer_for(peft_bert(), tmp_path / "elsewhere", [given])
    by_arguments = callback(budget=5)
    trainer_for(peft_bert(), tmp_path / "third", [by_arguments], resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert set(given.modules) == set(by_arguments.modules) == set(first.modules)
    assert given.recommendation is None, "the report of the other folder is not this run's"
    anew = callback(budget=5, resume_from_checkpoint=False)
    trainer_for(peft_bert(), tmp_path, [anew])
    assert len(anew.modules) == 5
    with pytest.raises(FileError, match="there is no checkpoint folder 'nowhere'"):
        trainer_for(peft_bert(), tmp_path / "x", [callback(resume_from_checkpoint="nowhere")])
    with pytest.raises(FileError, match=r"there is no checkpoint in .* to resume from"):
        trainer_for(peft_bert(), tmp_path / "x", [callback(resume_from_checkpoint=True)])


def test_a_report_is_read_again_when_resuming(tmp_path):
    first = callback("report")
    trainer_for(peft_bert(), tmp_path, [first]).train()
    again = callback("report", budget=9)
    trainer_for(peft_bert(), tmp_path, [again])
    assert again.recommendation == first.recommendation and again.modules == first.modules


def test_a_checkpoint_of_another_choice_is_refused_when_training_begins(tmp_path):
    first = callback()
    trainer_for(peft_bert(LoraConfig), tmp_path, [first]).train()
    again = callback(criterion="condition_number", resume_from_checkpoint=False)
    other = trainer_for(peft_bert(LoraConfig), tmp_path, [again], max_steps=4)
    assert set(first.modules) != set(again.modules) and len(first.modules) == len(again.modules)
    with pytest.raises(PeftLinearError, match=r"the adapter in .*checkpoint-2' is on bert.* of this model is not"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    more = callback(budget=4, resume_from_checkpoint=False)
    trainer = trainer_for(peft_bert(LoraConfig), tmp_path, [more], max_steps=4)
    trainer.state.global_step = 2
    with pytest.raises(PeftLinearError, match=r"holds an adapter on .* were chosen; pass resume_from_checkpoint="):
        more.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_checkpoints_that_do_not_fit(tmp_path):
    model = peft_bert()
    with pytest.raises(FileError, match=r"there is no adapter_config.json in"):
        checkpoint_modules(model, tmp_path)
    LoraConfig(target_modules=["c_attn"]).save_pretrained(str(tmp_path))
    with pytest.raises(TargetError, match=r"is on \{?'?c_attn.* of this model is not: it is on bert"):
        checkpoint_modules(model, tmp_path)
