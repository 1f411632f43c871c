# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The demo: SmolLM2-135M learns to translate package descriptions, within a budget of forgetting.

    python -m examples.language_demo             # minutes on two CPU cores, offline
    python -m examples.language_demo --quick     # the same steps, too short to mean anything

Writes report.md, plan.html, results.json, results.png, adapter/ and exported/ into --output.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from examples.benchmarks.language.models import load_language_model
from examples.benchmarks.language.tasks import load_task
from examples.common.files import save_json, save_text
from examples.common.reports import circumstances, command_line
from peft_linear import (
    ProximalCallback,
    Recommendation,
    Training,
    export_lora,
    kl_to_base,
    recommend_modules,
)

from .report import Arm, draw, render


MODULE = "examples.language_demo"
REFERENCE, RETAINED, TEST = 48, 16, 64  # texts


@dataclass(frozen=True)
class Data:
    """What is learned, and what must not be forgotten."""

    train: Dataset
    test: Dataset
    reference: list[str]  # of what the model is used for; half gives the statistics, half steers λ
    retained: dict[str, list[str]]  # {kind: texts that no arm reads}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    began = time.perf_counter()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True, warn_only=True)

    step(1, f"Loading {options.model}, and {options.language} translations of package descriptions")
    data = read_data(options)
    base, tokenizer = load(options.model)

    step(2, "The plan, before training: modules, rank and learning rate")
    training = Training(steps=options.steps, batch_size=options.batch_size)
    plan = recommend_modules(
        base, data.train.select(range(options.examples)), tokenizer=tokenizer, budget=0.125, training=training
    )
    print(plan)
    save_text(output / "plan.html", plan.to_html())

    step(
        3,
        f"Training: the plan within {options.target_kl:g} nats, the plan as plain LoRA, query and value as plain LoRA",
    )
    arms = []
    for name, config, callbacks in configurations(plan, data, options):
        arm, trainer = train(name, config, callbacks, data, options, plan.learning_rate)
        arms.append(arm)
        if len(arms) == 1:
            step(4, "Saving the adapter, loading it back, exporting it as plain LoRA")
            checks = save_and_reload(trainer.model, options.model, output, tokenizer, data)
            print("\n".join(f"{words}: {value}" for words, value in checks.items()))
        del trainer

    step(5, "Results")
    seconds = time.perf_counter() - began
    text = render(arms, plan, checks, options, seconds)
    print(text)
    draw(arms, output / "results.png", options.target_kl)
    record = {"arms": [vars(arm) for arm in arms], "seconds": round(seconds), "checks": checks}
    save_json(output / "results.json", record | circumstances(command_line(MODULE, options.command), None))
    save_text(output / "report.md", text)
    print(f"\n{seconds:.0f} s in all. The report: {output / 'report.md'}; the plan: {output / 'plan.html'}")
    return 0


def read_data(options: argparse.Namespace) -> Data:
    task, english, code = (load_task(name) for name in (f"translation_{options.language}", "domain_text", "code"))

    def rows(examples: Sequence[Any]) -> Dataset:
        return Dataset.from_list([{"prompt": f"{each.prompt}\n", "completion": each.completion} for each in examples])

    retained = RETAINED if not options.quick else 2
    return Data(
        rows(task.train),
        rows(task.test[: TEST if not options.quick else 4]),
        [each.completion for each in english.train[: REFERENCE if not options.quick else 4]],
        {
            "English descriptions": [each.completion for each in english.test[:retained]],
            "Python code": [f"{each.prompt}\n{each.completion}" for each in code.test[:retained]],
        },
    )


def load(model: str) -> tuple[nn.Module, Any]:
    """One of the models of the language benchmark, or a folder."""
    if Path(model).is_dir():
        return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    return load_language_model(model)


def configurations(
    plan: Recommendation, data: Data, options: argparse.Namespace
) -> list[tuple[str, LoraConfig, list[ProximalCallback]]]:
    """Names, adapters and callbacks; all have about the plan's number of parameters."""
    budget = ProximalCallback(reference=data.reference, target_kl=options.target_kl)
    return [
        (
            f"plan, at most {options.target_kl:g} nats",
            plan.to_config(task_type="CAUSAL_LM", proximal_space="function"),
            [budget],
        ),
        ("plan, LoRA", plan.to_config(task_type="CAUSAL_LM", proximal_lambda=0.0), []),
        (
            "query and value, LoRA",
            LoraConfig(r=5, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            [],
        ),
    ]


def train(
    name: str,
    config: LoraConfig,
    callbacks: list[ProximalCallback],
    data: Data,
    options: argparse.Namespace,
    rate: float | None,
) -> tuple[Arm, SFTTrainer]:
    """One arm on a fresh base model, and all that is measured of it."""
    model, tokenizer = load(options.model)
    set_seed(0)
    arguments = SFTConfig(
        output_dir=str(Path(options.output) / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=8,
        learning_rate=rate or 2e-3,
        lr_scheduler_type="linear",
        max_length=160,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        seed=0,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.test,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=callbacks,
    )
    before = trainer.evaluate()["eval_loss"]
    start = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - start) / options.steps
    steered = [entry["kl_to_base"] for entry in trainer.state.log_history if "kl_to_base" in entry]
    adapted = trainer.model
    arm = Arm(
        name=name,
        parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        loss_before=before,
        loss=trainer.evaluate()["eval_loss"],
        forgotten={kind: kl_to_base(adapted, texts, tokenizer=tokenizer) for kind, texts in data.retained.items()},
        steered_kl=steered,
        seconds_per_step=seconds,
        generations=generate(adapted, tokenizer, data.test),
    )
    shown = ", ".join(f"{kind}: {value:.3f}" for kind, value in arm.forgotten.items())
    print(f"{name}: test loss {arm.loss:.3f}; KL from the base model on {shown}", flush=True)
    return arm, trainer


@torch.inference_mode()
def generate(model: nn.Module, tokenizer: Any, test: Dataset, count: int = 5) -> list[dict[str, str]]:
    """Greedy answers to the first test prompts."""
    model.eval()
    found = []
    for row in test.select(range(min(count, len(test)))):
        inputs = tokenizer(row["prompt"], return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append({"prompt": row["prompt"].strip(), "wanted": row["completion"], "answer": answer.strip()})
    return found


@torch.inference_mode()
def save_and_reload(adapted: PeftModel, model: str, output: Path, tokenizer: Any, data: Data) -> dict[str, str]:
    """Saves the adapter, reads it into a fresh model, exports it as plain LoRA; equal logits or an error.

    Raises:
        RuntimeError: a reloaded adapter computes something else.
    """
    adapted.save_pretrained(output / "adapter")
    export_lora(output / "adapter", output / "exported", overwrite=True)
    batch = tokenizer(data.test[0]["prompt"], return_tensors="pt").to(adapted.device)
    expected = adapted.eval()(**batch).logits
    checks = {}
    for folder in ("adapter", "exported"):
        fresh = PeftModel.from_pretrained(load(model)[0].to(adapted.device), output / folder).eval()
        difference = float((fresh(**batch).logits - expected).abs().max())
        kind = fresh.peft_config["default"].peft_type
        if difference > 1e-4 * float(expected.abs().max()):
            raise RuntimeError(f"the logits of the reloaded {folder} differ by {difference:.2e}")
        checks[f"{folder}/ reloaded as {getattr(kind, 'value', kind)}, largest difference of a logit"] = (
            f"{difference:.1e}"
        )
    return checks


def step(number: int, text: str) -> None:
    print(f"\n[{number}/5] {text}", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, gemma3-270m, or a folder of a model")
    parser.add_argument("--language", choices=("fr", "it"), default="fr")
    parser.add_argument("--target-kl", type=float, default=0.03, help="the budget in nats a token")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--examples", type=int, default=32, help="for the plan")
    parser.add_argument("--output", default="demo_output")
    parser.add_argument("--quick", action="store_true", help="a few texts and steps")
    options = parser.parse_args(argv)
    options.command = list(argv if argv is not None else sys.argv[1:])
    if options.quick:
        options.steps, options.examples = 3, 32
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return options
