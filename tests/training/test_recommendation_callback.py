# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The Trainer callback end to end on a tiny random BERT: what trains, what is saved, what is resumed."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_linear.errors import (
    BudgetError,
    CriterionError,
    FileError,
    KernelError,
    OutputError,
    PeftLinearError,
    TargetError,
)
from peft_linear.selection import Recommendation, recommend
from peft_linear.training.calibration import calibration_batches
from peft_linear.training.recommendation_callback import NtkRecommendationCallback, on_main_process, summary
from peft_linear.training.restrict import adapted_modules, checkpoint_modules, restrict_adapter
from peft_linear.training.workflow import check_request, default_outputs, recommend_modules
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from tests.selection.planted import planted_kernels
from tests.small_models import bert, causal_batches, gpt2, seeded, text_batches


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Drawing takes longer than everything else here; one test keeps it."""
    monkeypatch.setattr("peft_linear.report.writer.matplotlib_available", lambda: False)


def rows(count=24, seed=0):
    """Features whose class shows in their tokens."""
    generator = torch.Generator().manual_seed(seed)
    labels = [i % 3 for i in range(count)]
    ids = [torch.randint(2 + 15 * c, 17 + 15 * c, (6,), generator=generator).tolist() for c in labels]
    return [{"input_ids": i, "attention_mask": [1] * 6, "labels": c} for i, c in zip(ids, labels, strict=True)]


BATCHES = text_batches(sizes=(4, 4, 4))


def base_model():
    return seeded(bert, dtype=torch.float32)


def peft_bert(config_class=ProximalLoraConfig, seed=0, **kwargs):
    torch.manual_seed(seed)
    config = config_class(r=2, lora_alpha=4, target_modules="all-linear", task_type="SEQ_CLS", **kwargs)
    return get_peft_model(base_model(), config)


def trainer_for(model, folder, callbacks=(), **kwargs):
    arguments = {
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "lr_scheduler_type": "constant",
    }
    others = {key: kwargs.pop(key) for key in ("optimizers", "model_init") if key in kwargs}
    if "model_init" not in others:
        others["model"] = model
    return Trainer(
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **kwargs}),
        train_dataset=rows(),
        callbacks=list(callbacks),
        **others,
    )


def callback(action="restrict", budget=3, **kwargs):
    return NtkRecommendationCallback(
        BATCHES, budget, action, **{"criterion": "gradient_energy", "progress": False, **kwargs}
    )


def lora_parameters(model):
    return {name for name, p in model.named_parameters() if "lora_" in name and p.requires_grad}


@pytest.mark.parametrize("config_class", [ProximalLoraConfig, LoraConfig])
def test_restrict_makes_training_optimizer_checkpoint_and_config_agree(config_class, tmp_path):
    model = peft_bert(config_class)
    all_modules = set(adapted_modules(model, "default"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = callback()
    trainer = trainer_for(model, tmp_path, [ours])
    chosen = set(ours.modules)
    assert len(chosen) == 3 < len(all_modules)
    assert set(adapted_modules(model, "default")) == chosen == set(model.peft_config["default"].target_modules)
    assert set(model.base_model.targeted_module_names) == chosen
    for name, parameter in model.named_parameters():
        plain = {key.replace(".base_layer", ""): value for key, value in before.items()}
        assert torch.equal(parameter, plain[name.replace(".base_layer", "")]), "restricting changed a weight"
    trainer.train()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    assert len(lora_parameters(model)) == 2 * 3
    saved = tmp_path / "checkpoint-2"
    config = json.loads((saved / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == chosen
    loaded = PeftModel.from_pretrained(base_model(), saved)
    assert set(adapted_modules(loaded, "default")) == chosen
    batch = {k: v for k, v in BATCHES[0].items() if k != "labels"}
    model.eval()
    loaded.eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_the_choice_is_the_best_by_the_kernels(tmp_path):
    model = peft_bert()
    expected = recommend_modules(
        model,
        BATCHES,
        3,
        "gradient_energy",
        targets=list(adapted_modules(model, "default")),
        rank=2,
        lora_alpha=4,
        progress=False,
    )
    ours = callback()
    trainer_for(model, tmp_path, [ours])
    assert ours.recommendation.modules == expected.modules
    worst = {row.name for row in expected.scores[-3:]}
    assert not worst & set(adapted_modules(model, "default"))


def test_report_changes_nothing_and_writes_the_report(tmp_path, monkeypatch):
    monkeypatch.undo()  # with the figure
    model = peft_bert()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    ours = callback("report")
    trainer = trainer_for(model, tmp_path, [ours])
    assert model.training
    assert {name: p.shape for name, p in model.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert Recommendation.load(tmp_path) == ours.recommendation
    assert (tmp_path / "recommendation.md").is_file() and (tmp_path / "recommendation.png").is_file()
    assert set(ours.modules) < {row.name for row in ours.recommendation.scores}
    assert {row.parameters for row in ours.recommendation.scores} == {2 * 32, 2 * 40}, "the adapter's own rank"
    trainer.train()
    assert len(lora_parameters(model)) == 2 * len(adapted_modules(model, "default"))


def test_report_on_a_model_without_adapters(tmp_path):
    ours = callback("report", budget=0.5)
    trainer_for(base_model(), tmp_path, [ours])
    assert len(ours.recommendation.scores) == 13
    with pytest.raises(TargetError, match="BertForSequenceClassification carries no adapter to restrict"):
        trainer_for(base_model(), tmp_path / "other", [callback()])


def test_the_summary_is_in_the_trainers_log(tmp_path):
    seen = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    ours = callback()
    trainer = trainer_for(peft_bert(), tmp_path, [ours, Listener()])
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry.pop("step") == 0
    assert entry == summary(ours.recommendation)
    assert entry["ntk_modules"] == 3 and entry["ntk_candidates"] == 13
    assert entry["ntk_parameters"] == sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n)
    assert all(isinstance(value, float) for value in entry.values())
    assert entry.items() <= seen[0].items() and "loss" in seen[0]
    assert not any(key.startswith("ntk_") for logs in seen[1:] for key in logs)


def test_resuming_reads_the_choice_from_the_checkpoint(tmp_path, monkeypatch, caplog):
    straight = trainer_for(peft_bert(), tmp_path / "straight", [callback()], max_steps=4)
    straight.train()
    first = callback()
    trainer_for(peft_bert(), tmp_path / "broken", [first], max_steps=2).train()

    def recompute(*args, **kwargs):
        raise AssertionError("the choice was made again")

    monkeypatch.setattr("peft_linear.training.recommendation_callback.recommend_modules", recompute)
    again = callback(budget=7)  # a budget that would choose otherwise
    with caplog.at_level(logging.WARNING):
        resumed = trainer_for(peft_bert(), tmp_path / "broken", [again], max_steps=4)
    assert again.modules == tuple(sorted(first.modules, key=again.modules.index))
    assert again.recommendation == first.recommendation
    resumed.train(resume_from_checkpoint=True)
    for (name, ours), (_, theirs) in zip(
        resumed.model.named_parameters(), straight.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), f"{name} differs from the run without a break"


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


def test_added_later(tmp_path):
    model = peft_bert()
    trainer = trainer_for(model, tmp_path)
    trainer.add_callback(callback())
    with pytest.raises(PeftLinearError, match=r"was added after the Trainer was made.*callbacks=\[\.\.\.\]"):
        trainer.train()
    late = callback("report")
    trainer = trainer_for(model, tmp_path, max_steps=1)
    trainer.add_callback(late)
    trainer.train()
    assert len(late.modules) == 3 and trainer.state.log_history[0]["ntk_modules"] == 3


def test_model_init_is_refused_when_training_begins(tmp_path):
    trainer = trainer_for(None, tmp_path, [callback()], model_init=lambda: peft_bert())
    with pytest.raises(PeftLinearError, match=r"on 13 modules, but 3 were chosen.*model_init does"):
        trainer.train()


def test_an_optimizer_that_exists_is_refused(tmp_path):
    model = peft_bert()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(PeftLinearError, match="an optimizer was passed to the Trainer"):
        trainer_for(model, tmp_path, [callback()], optimizers=(optimizer, None))
    assert len(adapted_modules(model, "default")) == 13


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 0}, BudgetError, "a budget of 0 modules"),
        ({"budget": 14}, BudgetError, "a budget of 14 modules, but there are 1 to 13"),
        ({"criterion": "best"}, CriterionError, "unknown criterion 'best'"),
        ({"adapter_name": "other"}, TargetError, "there is no adapter 'other'; there are: default"),
        ({"colour": "red"}, PeftLinearError, "unknown arguments colour; compute_ntk takes: targets, space"),
    ],
)
def test_bad_requests_end_when_the_trainer_is_made_and_leave_the_model_alone(arguments, error, message, tmp_path):
    model = peft_bert()
    with pytest.raises(error, match=message):
        trainer_for(model, tmp_path, [callback(**arguments)])
    assert len(adapted_modules(model, "default")) == 13


def test_unknown_action():
    with pytest.raises(PeftLinearError, match="unknown action 'prune'; there are: report, restrict"):
        NtkRecommendationCallback(BATCHES, 3, "prune")


# -- the parts


def test_restricting_one_of_two_adapters_leaves_the_other():
    model = peft_bert()
    model.add_adapter("second", ProximalLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    names = list(adapted_modules(model, "default"))
    keep = [names[-1]]
    removed = restrict_adapter(model, keep, "default")
    assert set(removed) == set(names) - set(keep)
    assert list(adapted_modules(model, "default")) == keep
    assert all(name.endswith("query") for name in adapted_modules(model, "second"))
    assert len(adapted_modules(model, "second")) == 2
    assert all(layer.active_adapters == [] for layer in adapted_modules(model, "second").values())
    model.set_adapter("second")
    with pytest.raises(TargetError, match="cannot keep nothing: adapter 'second' is on"):
        restrict_adapter(model, [])
    with pytest.raises(TargetError, match="cannot keep x, y: adapter 'second' is on"):
        restrict_adapter(model, ["x", "y"])


def test_restricting_keeps_adapted_embeddings_and_drops_layer_patterns(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["query", "word_embeddings"], layers_to_transform=[0, 1], task_type="SEQ_CLS"
    )
    config.target_modules = {"query", "value"}
    model = get_peft_model(base_model(), config)
    keep = "bert.encoder.layer.1.attention.self.value"
    restrict_adapter(model, [keep])
    assert model.peft_config["default"].target_modules == {keep}
    assert model.peft_config["default"].layers_to_transform is None
    model.save_pretrained(tmp_path)
    assert checkpoint_modules(model, tmp_path) == (keep,)

    embedded = get_peft_model(base_model(), LoraConfig(r=2, target_modules=["query", "word_embeddings"]))
    query = "bert.encoder.layer.0.attention.self.query"
    restrict_adapter(embedded, [query])
    assert embedded.peft_config["default"].target_modules == {query, "bert.embeddings.word_embeddings"}


def test_exact_names_where_names_end_alike(tmp_path):
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})

    model = get_peft_model(Outer(), LoraConfig(r=2, target_modules=["proj"]))
    assert restrict_adapter(model, ["proj"]) == ("inner.proj",)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Outer(), tmp_path)
    assert list(adapted_modules(loaded, "default")) == ["proj"]


def test_checkpoints_that_do_not_fit(tmp_path):
    model = peft_bert()
    with pytest.raises(FileError, match=r"there is no adapter_config.json in"):
        checkpoint_modules(model, tmp_path)
    LoraConfig(target_modules=["c_attn"]).save_pretrained(str(tmp_path))
    with pytest.raises(TargetError, match=r"is on \{?'?c_attn.* of this model is not: it is on bert"):
        checkpoint_modules(model, tmp_path)


def test_two_active_adapters_need_a_name():
    model = get_peft_model(base_model(), LoraConfig(r=2, target_modules=["key"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(TargetError, match=r"2 adapters are active \(default, second\); say which with adapter_name"):
        restrict_adapter(model, ["x"])


class Tokenizer:
    """Pads as a tokenizer does, for the default collator."""

    padding_side = "right"

    def pad(self, features, **kwargs):
        length = max(len(f["input_ids"]) for f in features)
        padded = {
            key: [f[key] + [0] * (length - len(f[key])) for f in features] for key in ("input_ids", "attention_mask")
        }
        padded["labels"] = [f["labels"] for f in features]
        return {key: torch.tensor(value) for key, value in padded.items()}


def ragged(count=5):
    return [
        {"input_ids": [3] * (i + 1), "attention_mask": [1] * (i + 1), "labels": 0, "text": "x"} for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_examples_are_sampled_cleaned_and_collated(kind):
    data = ragged() if kind == "list" else Dataset.from_list(ragged())
    batches = calibration_batches(data, base_model(), processing_class=Tokenizer(), examples=4, batch_size=3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    assert set(batches[0]) == {"input_ids", "attention_mask", "labels"}
    lengths = [int(mask.sum()) for batch in batches for mask in batch["attention_mask"]]
    assert len(set(lengths)) == 4 and set(lengths) <= {1, 2, 3, 4, 5}
    again = calibration_batches(data, base_model(), processing_class=Tokenizer(), examples=4, batch_size=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    own = calibration_batches(data, base_model(), data_collator=lambda features: {"n": len(features)}, batch_size=2)
    assert own == [{"n": 2}, {"n": 2}, {"n": 1}]


def test_batches_pass_as_they_are_and_loaders_are_cut():
    assert calibration_batches(BATCHES, base_model()) == BATCHES
    assert len(calibration_batches(BATCHES, base_model(), examples=5)) == 2
    assert calibration_batches(iter(BATCHES), base_model()) == BATCHES
    assert calibration_batches(BATCHES[0], base_model()) == [BATCHES[0]]
    loader = DataLoader(rows(100), batch_size=10, collate_fn=Tokenizer().pad)
    assert len(calibration_batches(loader, base_model())) == 7
    plain = calibration_batches(rows(4), base_model())
    assert plain[0]["input_ids"].shape == (4, 6)


def test_data_that_is_none():
    with pytest.raises(PeftLinearError, match="expected batches or a dataset to choose modules by, got int"):
        calibration_batches(3, base_model())
    with pytest.raises(PeftLinearError, match="the data to choose modules by is empty"):
        calibration_batches([], base_model(), data_collator=len)
    with pytest.raises(PeftLinearError, match="examples and batch_size must be at least 1, got 0 and 16"):
        calibration_batches(BATCHES, base_model(), examples=0)


def test_recommend_modules_is_both_steps_and_knows_language_models():
    model = seeded(gpt2, True)
    batches = causal_batches(sizes=(4, 3))
    rec = recommend_modules(model, batches, "300", progress=False, rank=2)
    assert rec.settings["output_kind"] == default_outputs(model) == "log_likelihood"
    assert rec.criterion == "gradient_energy"
    assert rec.parameters <= 300 and rec.settings["rank"] == 2
    classifier = recommend_modules(base_model(), BATCHES, 2, progress=False)
    assert classifier.settings["output_kind"] == "logits" and classifier.settings["always_trained"]
    config = classifier.to_config(task_type="SEQ_CLS")
    adapted = get_peft_model(base_model(), config)
    assert set(adapted_modules(adapted, "default")) == set(classifier.modules)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 0}, BudgetError, "a budget of 0 modules"),
        ({"budget": 3, "targets": ["nothing"]}, TargetError, "matches no module"),
        ({"budget": 3, "rank": 0}, PeftLinearError, "rank must be a positive integer, got 0"),
        ({"budget": 6, "strategy": "exhaustive", "targets": "all-linear"}, None, ""),
        ({"budget": 3, "ridge": 0.0}, KernelError, "ridge must be a finite number > 0"),
        ({"budget": 3, "criterion": "predicted_loss", "outputs": "loss"}, OutputError, "cannot be computed from"),
        ({"budget": 3, "strategy": "other"}, CriterionError, "unknown strategy 'other'"),
        ({"budget": "10", "space": "bias"}, BudgetError, "is 10 parameters, but the smallest candidate has 16"),
    ],
)
def test_requests_are_checked_before_the_model_runs(arguments, error, message, monkeypatch):
    model = base_model()
    monkeypatch.setattr(type(model), "forward", None)
    if error is None:
        assert len(check_request(model, **arguments)) == 13
    else:
        with pytest.raises(error, match=message):
            recommend_modules(model, BATCHES, **arguments)


def test_summary_without_predictions():
    unlabelled = recommend(planted_kernels(output_kind="log_likelihood"), 2)
    values = summary(unlabelled)
    assert "ntk_predicted_loss" not in values and values["ntk_modules"] == 2


def _process(rank, port, folder):
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    rec = on_main_process(lambda: recommend(planted_kernels(), 2), rank == 0)
    (folder / f"{rank}.txt").write_text(" ".join(rec.modules))
    try:
        on_main_process(lambda: recommend(planted_kernels(), 0), rank == 0)
    except BudgetError as error:
        (folder / f"{rank}.error").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_main_ones_choice_and_its_errors(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, args=(port, tmp_path), nprocs=2)
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text() != ""
    assert (tmp_path / "0.error").read_text() == (tmp_path / "1.error").read_text()
