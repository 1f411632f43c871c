# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The demo and the quickstart run from end to end; the verdict says what the numbers say."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from examples.demo import arms as arms_module
from examples.demo import run as demo
from examples.demo import summary as summary_module
from peft_linear import ModuleKernels, recommend


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert demo.main(["--quick", "--seeds", "0", "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_demo_writes_everything(output):
    for name in (
        "report.md",
        "results.json",
        "recommendation.png",
        "results.png",
        "recommendation",
        "adapter",
        "exported",
    ):
        assert (output / name).exists(), name
    report = (output / "report.md").read_text(encoding="utf-8")
    for words in ("The recommendation", "recommended, ProximalLoRA", "query and value, LoRA", "all linear, LoRA"):
        assert words in report
    assert json.loads((output / "exported" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.slow
def test_demo_matches_parameters_and_keeps_the_evidence(output):
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    runs = {run["arm"]: run for run in results["runs"]}
    assert set(runs) == set(results["predicted"]) == {"recommended", "query_value", "all_linear"}
    assert runs["query_value"]["adapter_parameters"] == 12 * 8 * (384 + 384)
    assert 0.9 < runs["recommended"]["adapter_parameters"] / runs["query_value"]["adapter_parameters"] <= 1
    assert all(run["weight_distance"] > 0 and run["parameter_distance"] > 0 for run in runs.values())
    assert 0 <= runs["recommended"]["firing_rate"] <= 1 and runs["all_linear"]["firing_rate"] is None
    recommendation = demo.Recommendation.load(output / "recommendation")
    assert list(recommendation.modules) == results["modules"]


@pytest.mark.slow
def test_quickstart_leaves_a_plain_lora_that_loads_without_the_package(tmp_path):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    script = EXAMPLES / "quickstart.py"
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 of 37 modules" in done.stdout
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and "proximal_lambda" not in config
    with safe_open(tmp_path / "out" / "lora" / "adapter_model.safetensors", "pt") as weights:
        assert sum("lora_A" in name for name in weights.keys()) == 8  # noqa: SIM118


def make_runs(arm, losses, accuracies, parameters=100):
    run = arms_module.Run(arm, 0, 1e-3, 0.0, 0.0, 1.0, 1.0, parameters, parameters + 10, 1.0)
    pairs = zip(losses, accuracies, strict=True)
    return [replace(run, seed=i, test_loss=loss, test_accuracy=accuracy) for i, (loss, accuracy) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("losses", "accuracies", "words"),
    [
        ([1.0, 1.1, 1.2], [0.6, 0.6, 0.6], "The recommendation beats “baseline”: test loss -0.500 ± 0.000"),
        ([2.0, 2.1, 2.2], [0.6, 0.6, 0.6], "The recommendation LOSES to “baseline”: test loss +0.500 ± 0.000"),
        ([1.0, 1.6, 2.2], [0.6, 0.6, 0.6], "The recommendation does not win against “baseline”, no clear difference"),
        ([1.0, 1.1, 1.2], [0.2, 0.2, 0.2], "The recommendation does not win against “baseline”, no clear difference"),
    ],
)
def test_verdict_is_paired_over_seeds_and_blunt(losses, accuracies, words):
    ours, baseline = (arms_module.Arm(key, key, ("m",), dict, 8) for key in ("ours", "baseline"))
    runs = {
        "ours": make_runs("ours", losses, accuracies),
        "baseline": make_runs("baseline", [1.5, 1.6, 1.7], [0.6, 0.6, 0.6], parameters=200),
    }
    said = summary_module.verdict(ours, baseline, runs)
    assert said.startswith(words) and "50% of its parameters" in said


@pytest.mark.parametrize(
    ("rates", "words"), [([1.0, 1.0], "acted at every step."), ([0.4, 1.0], "acted at 70% ± 42% of the steps.")]
)
def test_the_report_says_how_often_the_proximal_term_acted(rates, words):
    arm = arms_module.Arm("ours", "ours", ("m",), dict, 8, proximal_lambda=4.0)
    runs = make_runs("ours", [1.0, 1.0], [0.5, 0.5])
    runs = [replace(run, firing_rate=rate) for run, rate in zip(runs, rates, strict=True)]
    assert summary_module.pull(arm, runs) == f"The proximal term of “ours” (λ = 4) {words}"


def test_one_seed_cannot_win():
    ours, baseline = (arms_module.Arm(key, key, ("m",), dict, 8) for key in ("ours", "baseline"))
    runs = {
        "ours": make_runs("ours", [0.1], [0.9]),
        "baseline": make_runs("baseline", [1.0], [0.5]),
    }
    assert "does not win" in summary_module.verdict(ours, baseline, runs)


def test_distances_are_those_of_the_adapter():
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    model = get_peft_model(
        BertForSequenceClassification(config), LoraConfig(r=2, lora_alpha=6, target_modules=["query"])
    )
    start = arms_module.lora_factors(model)
    assert arms_module.weight_distance(model) == 0.0 == arms_module.parameter_distance(model, start)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        layer.lora_B["default"].weight += 0.5
    change = 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert arms_module.weight_distance(model) == pytest.approx(float(change.detach().norm()), rel=1e-5)
    assert arms_module.parameter_distance(model, start) == pytest.approx(0.5 * 16**0.5)


def test_the_ablation_crosses_modules_and_proximal_term_at_equal_parameters():
    names = [f"layer.{i}.{kind}" for i in range(3) for kind in ("query", "key", "value")]
    generator = torch.Generator().manual_seed(0)
    factors = {name: torch.randn(8, 3, generator=generator, dtype=torch.float64) for name in names}
    kernels = ModuleKernels(
        blocks={name: factor @ factor.T for name, factor in factors.items()},
        base=torch.eye(8, dtype=torch.float64),
        outputs=torch.randn(4, 2, generator=generator, dtype=torch.float64),
        labels=torch.tensor([0, 1, 0, 1]),
        num_parameters=dict.fromkeys(names, 4 * 20),
        shapes=dict.fromkeys(names, (10, 10)),
        rank=4,
    )
    recommendation = recommend(kernels, budget=3)
    others = [name for name in names if not name.endswith("key")]
    arms = arms_module.make_arms(kernels, recommendation, others, proximal_lambda=2.0, ablation=True)
    by_key = {arm.key: (arm.modules, arm.rank, type(arm.make_config()).__name__) for arm in arms}
    chosen = recommendation.modules
    assert by_key == {
        "recommended": (chosen, 4, "ProximalLoraConfig"),
        "query_value": (tuple(others), 2, "LoraConfig"),  # 6 modules of rank 2 for 3 of rank 4
        "all_linear": (tuple(names), 4, "LoraConfig"),
        "recommended_lora": (chosen, 4, "LoraConfig"),
        "query_value_proximal": (tuple(others), 2, "ProximalLoraConfig"),
    }
    assert all(arm.make_config().lora_alpha == 2 * arm.rank for arm in arms if arm.key != "recommended")
    assert arms[4].make_config().proximal_lambda == 2.0 == arms[0].make_config().proximal_lambda
    assert len(arms_module.make_arms(kernels, recommendation, others, 2.0)) == 3
