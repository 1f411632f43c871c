# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The demo: choose modules before training, train them and two baselines, compare predictions with measurements.

    python -m examples.demo                    # MiniLM, topics of Debian packages; minutes on two CPU cores
    python -m examples.demo --quick            # the same steps in seconds, too short to mean anything
    python -m examples.demo --model roberta-base --dataset glue/sst2 --steps 500

Writes report.md, results.json, recommendation/, recommendation.png, results.png, adapter/ and exported/ into --output.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from examples.common.files import save_json, save_text
from examples.common.reports import as_page, circumstances, command_line
from examples.common.tasks import DEMO_DATASET, DEMO_MODEL, Task, load_task
from examples.demo.arms import Arm, Protocol, Run, choose_learning_rate, make_arms, train
from examples.demo.figure import draw_results
from examples.demo.summary import Summary, summarize
from peft_linear import ModuleKernels, Recommendation, Training, export_lora
from peft_linear.cli.recommend import parse_budget_argument
from peft_linear.selection.baselines.by_kernels import query_value
from peft_linear.selection.criteria import View
from peft_linear.selection.preconditioning import adam_preconditioned
from peft_linear.selection.prediction import predict
from peft_linear.selection.problem import Problem
from peft_linear.selection.request import ModuleRequest


MODULE = "examples.demo"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    began = time.perf_counter()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)

    step(1, f"Loading {options.model} and {options.dataset}")
    limits = (256, 64, 64) if options.quick else (None, options.max_eval, options.max_eval)
    task = load_task(options.model, options.dataset, options.max_length, limits)

    step(2, f"The kernel of every candidate module on {options.examples} training examples, before training")
    batches = task.calibration(options.examples)
    model = task.new_model(options.seeds[0])
    request = ModuleRequest(
        budget=options.budget or 1,
        criterion=options.criterion,
        training=Training(batch_size=options.batch_size),
        kernels={"rank": options.rank, "lora_alpha": 2.0 * options.rank},
    )
    kernels, heads = request.compute_kernels(model, batches)
    print(kernels)

    step(3, "The recommendation")
    baseline = tuple(name for name in kernels.names if name in query_value(kernels))
    budget = options.budget or str(sum(kernels.num_parameters[name] for name in baseline))
    recommendation = replace(request, budget=budget).choose(kernels, heads)
    print(recommendation)
    recommendation.plot(output / "recommendation.png")
    recommendation.save(output / "recommendation")

    step(4, "Training the recommendation and the baselines, each with the same protocol")
    arms = make_arms(kernels, recommendation, baseline, options.proximal_lambda, options.ablation)
    protocol = Protocol(options.steps, options.batch_size, tuple(options.learning_rates))
    predicted = predict_arms(kernels, recommendation, arms)
    runs, adapted = train_arms(task, arms, protocol, options.seeds)

    step(5, "Saving the adapter, loading it back, exporting it as plain LoRA")
    checks = save_and_reload(task, adapted, options.seeds[0], output)
    print("\n".join(f"{words}: {value}" for words, value in checks.items()))

    step(6, "Results")
    summary = summarize(arms, runs, predicted, protocol, options.seeds)
    seconds = time.perf_counter() - began
    print(f"{summary.table}\n\n{summary.predictions}\n\n{summary.verdict}")
    draw_results(summary, arms, output / "results.png")
    write(output, options, recommendation, summary, runs, predicted, checks, seconds)
    print(f"\n{seconds:.0f} s in all. The report: {output / 'report.md'}")
    return 0


def predict_arms(kernels: ModuleKernels, recommendation: Recommendation, arms: Sequence[Arm]) -> dict[str, dict]:
    """Predictions of the linear theory for each arm, from the kernels alone."""
    settings = recommendation.settings
    plain = View(kernels, Problem.of(kernels, recommendation.ridge))
    by_adam = settings.optimizer == "adamw"
    trained = adam_preconditioned(kernels, settings.train_batch_size) if by_adam else kernels
    simulated = {key: getattr(settings, key) for key in ("learning_rate", "steps", "seed")}
    optimizer = View(trained, Problem.of(trained, settings.criterion_ridge, **simulated))
    return {arm.key: predict(plain, arm.modules, optimizer) for arm in arms}


def train_arms(
    task: Task, arms: Sequence[Arm], protocol: Protocol, seeds: Sequence[int]
) -> tuple[list[Run], PeftModel]:
    """All runs, and the model of the first arm and seed."""
    runs, adapted = [], None
    steps = len(arms) * (protocol.pilots + len(seeds)) * protocol.steps
    with tempfile.TemporaryDirectory() as folder, tqdm(total=steps, desc="training", unit="step") as bar:
        for arm in arms:
            rate = choose_learning_rate(task, arm, protocol, Path(folder), bar)
            for seed in seeds:
                run, model = train(task, arm, seed, rate, protocol, Path(folder), bar)
                bar.write(f"{arm.label}, seed {seed}: loss {run.test_loss:.3f}, accuracy {run.test_accuracy:.1%}")
                runs.append(run)
                adapted = adapted or model
    assert adapted is not None
    return runs, adapted


@torch.inference_mode()
def save_and_reload(task: Task, adapted: PeftModel, seed: int, output: Path) -> dict[str, str]:
    """Saves the adapter, reads it into a fresh model, exports it as plain LoRA; equal logits or an error.

    Raises:
        RuntimeError: a reloaded adapter computes something else.
    """
    adapted.save_pretrained(output / "adapter")
    export_lora(output / "adapter", output / "exported", overwrite=True)
    batch = task.collator(task.test[:16])
    expected = adapted.eval()(**batch).logits
    checks = {}
    for folder in ("adapter", "exported"):
        model = PeftModel.from_pretrained(task.new_model(seed), output / folder).eval()
        difference = float((model(**batch).logits - expected).abs().max())
        kind = str(getattr(model.peft_config["default"].peft_type, "value", model.peft_config["default"].peft_type))
        if difference > 1e-4 * float(expected.abs().max()):
            raise RuntimeError(f"the logits of the reloaded {folder} differ by {difference:.2e}")
        checks[f"{folder}/ reloaded as {kind}, largest difference of a logit"] = f"{difference:.1e}"
    return checks


def write(
    output: Path,
    options: argparse.Namespace,
    recommendation: Recommendation,
    summary: Summary,
    runs: Sequence[Run],
    predicted: dict[str, dict],
    checks: dict[str, str],
    seconds: float,
) -> None:
    """report.md for people and results.json for programs."""
    record = {
        "options": vars(options),
        "modules": recommendation.modules,
        "criterion": recommendation.criterion,
        "predicted": predicted,
        "runs": [asdict(run) for run in runs],
        "verdict": summary.verdict,
        "checks": checks,
        "seconds": round(seconds, 1),
        **circumstances(command_line(MODULE, options.command), None),
    }
    save_json(output / "results.json", record)
    sections = [
        "# Demo: modules chosen before training",
        f"`{options.model}` on `{options.dataset}`: {seconds:.0f} s in all, {record['machine']}, {record['date']}.",
        f"## Result\n\n{summary.verdict}",
        summary.table,
        summary.protocol,
        "![test loss and accuracy of each arm](results.png)",
        f"## Predicted before training, and measured\n\n{summary.predictions}",
        "\n".join(f"- `{words}`: {value}" for words, value in checks.items()),
        recommendation.to_markdown().replace("\n#", "\n##").replace("# Rec", "## Rec", 1),
        "![spectra and scores](recommendation.png)",
    ]
    save_text(output / "report.md", as_page(sections))


def step(number: int, text: str) -> None:
    print(f"\n[{number}/6] {text}", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="a folder or a name on the Hugging Face Hub")
    parser.add_argument(
        "--dataset", default=DEMO_DATASET, help="a set of examples/data, a folder, or a name on the Hub"
    )
    parser.add_argument(
        "--budget", type=parse_budget_argument, help='modules ("8"), a fraction ("0.25") or parameters ("100k")'
    )
    parser.add_argument("--criterion", default="default-by-evidence")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--proximal-lambda", type=float, default=4.0, help="4 is 1/Σ of the rates of 100 steps from 5e-3 to zero"
    )
    parser.add_argument("--examples", type=int, default=64, help="for the kernels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-3, 5e-3], help="each arm gets its best")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--max-eval", type=int, default=1000, help="examples of the validation and of the test split")
    parser.add_argument("--output", default="demo_output")
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="two more arms: LoRA on the recommended modules, ProximalLoRA on query and value",
    )
    parser.add_argument("--quick", action="store_true", help="a few examples and steps, one learning rate, two seeds")
    options = parser.parse_args(argv)
    options.command = list(argv if argv is not None else sys.argv[1:])
    if options.quick:
        options.examples, options.steps, options.learning_rates = 8, 3, options.learning_rates[:1]
        options.seeds = options.seeds[:2]
    return options
