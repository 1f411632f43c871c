# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The section on the choice in every model card that is written or pushed, once, beside what else the card says."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Trainer

from peft_linear.errors import TargetError
from peft_linear.integrations.model_cards import keep_in_model_cards
from peft_linear.integrations.recommendation_callback import NtkRecommendationCallback
from peft_linear.integrations.restrict import adapted_modules
from peft_linear.report.model_card import BEGIN, END, with_model_card_section
from peft_linear.selection.request import recommend_modules
from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from tests.helpers.callback_runs import BATCHES, base_model, callback, peft_bert, trainer_for
from tests.helpers.small_models import causal_batches, llama, seeded


HEADING = "## Which modules are adapted"


def card_of(folder):
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


def section_of(card):
    assert card.count(BEGIN) == card.count(END) == card.count(HEADING) == 1
    return card[card.index(BEGIN) : card.index(END)]


def assert_whole(card, ours):
    """The section with every chosen module, under metadata that still say what peft and transformers said."""
    section = section_of(card)
    assert all(f"`{name}`" in section for name in ours.modules)
    assert f"\n{len(ours.modules)} of 13 candidate modules were chosen before training" in section
    assert "held-out cross-entropy of simulated training" in section
    data = ModelCard(card).data
    assert data.library_name == "peft" and "lora" in data.tags


@pytest.fixture
def hub(monkeypatch):
    """What would have been uploaded: a list of README texts."""
    uploaded = []

    def create_repo(*args, **kwargs):
        return SimpleNamespace(repo_id="me/adapter")

    def upload_folder(*args, folder_path, **kwargs):
        uploaded.append(card_of(folder_path))

    def create_commit(*args, operations, **kwargs):
        readme = next(op for op in operations if op.path_in_repo == "README.md")
        uploaded.append(Path(readme.path_or_fileobj).read_text(encoding="utf-8"))

    for name, stand_in in {
        "create_repo": create_repo,
        "upload_folder": upload_folder,
        "create_commit": create_commit,
    }.items():
        monkeypatch.setattr(huggingface_hub.HfApi, name, stand_in)
        for module in (transformers.trainer, transformers.utils.hub):  # functions of their own in older versions
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    return uploaded


@pytest.mark.parametrize("config_class", [ProximalLoraConfig, LoraConfig])
def test_every_card_of_a_restricted_run(config_class, tmp_path, hub):
    ours = callback()
    trainer = trainer_for(peft_bert(config_class), tmp_path, [ours])
    trainer.train()
    assert_whole(card_of(tmp_path / "checkpoint-2"), ours)
    trainer.save_model()
    saved = card_of(tmp_path)
    assert_whole(saved, ours)
    trainer.save_model()
    assert card_of(tmp_path) == saved, "saving twice changed the card"
    trainer.create_model_card(model_name="Mine")
    assert_whole(card_of(tmp_path), ours)
    assert "# Mine" in card_of(tmp_path) and "### Training hyperparameters" in card_of(tmp_path)
    trainer.push_to_hub()
    assert len(hub) == 1
    assert_whole(hub[0], ours)
    assert "### Training hyperparameters" in hub[0]


def test_a_card_that_the_trainer_writes_before_anything_is_saved(tmp_path):
    ours = callback()
    trainer = trainer_for(peft_bert(), tmp_path, [ours])
    trainer.create_model_card()
    assert all(f"`{name}`" in section_of(card_of(tmp_path)) for name in ours.modules)


def test_the_model_pushes_it_too(tmp_path, hub):
    ours = callback()
    trainer = trainer_for(peft_bert(), tmp_path, [ours])
    trainer.model.push_to_hub("me/adapter")
    assert len(hub) == 1
    assert all(f"`{name}`" in section_of(hub[0]) for name in ours.modules)


def test_the_users_text_stays(tmp_path):
    ours = callback()
    model = trainer_for(peft_bert(), tmp_path / "run", [ours]).model
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n\nWritten by hand.\n", encoding="utf-8")
    model.save_pretrained(tmp_path)
    first = card_of(tmp_path)
    assert_whole(first, ours)
    assert "# Mine\n\nWritten by hand.\n" in first and ModelCard(first).data.license == "mit"
    card.write_text(first + "\n## Afterwards\n\nMore by hand.\n", encoding="utf-8")
    model.save_pretrained(tmp_path)
    second = card_of(tmp_path)
    assert_whole(second, ours)
    assert "Written by hand." in second and second.rstrip().endswith("## Afterwards\n\nMore by hand.")
    assert section_of(second) == section_of(first)


@pytest.mark.parametrize(
    "card",
    [
        f"Mine.\n\n{BEGIN}\n\nHalf a section, then mine.\n",
        f"Mine.\n\n{END}\n\nThen mine.\n",
        f"Mine.\n\n{END}\n\nThen {BEGIN} mine.\n",
        "Mine.\r\n\r\nThen mine.\r\n",
    ],
)
def test_a_broken_section_takes_nothing_of_the_users_with_it(card):
    rec = recommend_modules(base_model(), BATCHES, 2, "gradient_energy", progress=False)
    once = with_model_card_section(card, rec)
    assert once.startswith(card.rstrip("\r\n")) and once.count(HEADING) == 1
    assert with_model_card_section(once, rec) == once


def test_a_report_that_was_not_followed_says_so(tmp_path):
    ours = callback("report")
    trainer = trainer_for(peft_bert(), tmp_path, [ours])
    trainer.save_model()
    section = section_of(card_of(tmp_path))
    assert "The adapter is on 13 modules. 3 of 13 candidate modules were recommended before training" in section


def test_other_models_are_left_alone(tmp_path):
    trainer_for(peft_bert(), tmp_path / "ours", [callback()])
    other = peft_bert()
    other.save_pretrained(tmp_path / "other")
    assert HEADING not in card_of(tmp_path / "other")
    trainer = trainer_for(base_model(), tmp_path / "whole", [callback("report")])
    trainer.create_model_card()
    assert HEADING not in card_of(tmp_path / "whole")


def test_trainers_that_write_cards_of_their_own(tmp_path, hub):
    """As TRL's do."""

    class OwnCard(Trainer):
        def create_model_card(self, model_name=None):
            Path(self.args.output_dir, "README.md").write_text("# From scratch\n")

    ours = callback()
    plain = trainer_for(peft_bert(), tmp_path, [ours])
    trainer = OwnCard(model=plain.model, args=plain.args, train_dataset=plain.train_dataset, callbacks=[callback()])
    trainer.push_to_hub()
    assert hub[0].startswith("# From scratch\n")
    assert all(f"`{name}`" in section_of(hub[0]) for name in ours.modules)


@pytest.mark.slow
def test_trl_pushes_it(tmp_path, hub):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    options = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    ours = NtkRecommendationCallback(causal_batches(sizes=(4, 3)), 2, "restrict", progress=False)
    trainer = trl.SFTTrainer(
        model=seeded(llama, causal=True, dtype=torch.float32),
        args=trl.SFTConfig(output_dir=str(tmp_path), max_steps=2, save_steps=2, disable_tqdm=True, **options),
        train_dataset=Dataset.from_list([{"text": "a b a b"}] * 16),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[ours],
    )
    assert set(adapted_modules(trainer.model, "default")) == set(ours.modules)
    trainer.train()
    trainer.push_to_hub()
    assert all(f"`{name}`" in section_of(hub[-1]) for name in ours.modules)
    assert "trl" in hub[-1].lower() and trainer.state.log_history[0]["ntk_modules"] == 2


def test_by_hand_for_a_model_made_from_a_config(tmp_path):
    rec = recommend_modules(base_model(), BATCHES, 2, "gradient_energy", progress=False)
    model = get_peft_model(base_model(), rec.to_config(task_type="SEQ_CLS"))
    keep_in_model_cards(model, rec)
    keep_in_model_cards(model, rec)
    model.save_pretrained(tmp_path)
    assert "2 of 13 candidate modules were chosen" in section_of(card_of(tmp_path))
    assert set(adapted_modules(model, "default")) == set(rec.modules)
    with pytest.raises(TargetError, match="BertForSequenceClassification carries no adapter"):
        keep_in_model_cards(base_model(), rec)
    with pytest.raises(TargetError, match="there is no adapter 'other'"):
        keep_in_model_cards(model, rec, "other")


def test_nothing_is_kept_on_the_model_or_the_callback(tmp_path):
    model = peft_bert()
    before = set(vars(model))
    ours = callback("report")
    trainer_for(model, tmp_path, [ours])
    assert set(vars(model)) == before
    assert pickle.loads(pickle.dumps(ours)).recommendation == ours.recommendation
    assert not os.path.exists(tmp_path / "README.md"), "a report alone is no model card"
