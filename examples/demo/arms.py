# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The arms of the demo's comparison, and their training with the Hugging Face Trainer, the same for each of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from examples.common.tasks import Task
from examples.common.training import weight_distance
from peft_linear import ModuleKernels, ProximalLoraConfig, Recommendation
from peft_linear.proximal import proximal_firing_rate


PILOT_SEED = 1000  # of the runs that choose a learning rate; none of the seeds that are compared


@dataclass(frozen=True)
class Arm:
    """One way to spend adapter parameters."""

    key: str
    label: str
    modules: tuple[str, ...]
    make_config: Callable[[], LoraConfig]  # anew for each run: peft writes into the config it is given
    rank: int
    proximal_lambda: float = 0.0


@dataclass(frozen=True)
class Protocol:
    """How every arm is trained."""

    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]  # each arm gets the one with the least validation loss

    @property
    def pilots(self) -> int:
        """Runs that choose the learning rate of an arm."""
        return len(self.learning_rates) if len(self.learning_rates) > 1 else 0


@dataclass(frozen=True)
class Run:
    """What was measured of one arm and seed."""

    arm: str
    seed: int
    learning_rate: float
    test_loss: float
    test_accuracy: float
    weight_distance: float  # ‖ΔW‖_F over all adapted weights: how far the backbone is from the pretrained one
    parameter_distance: float  # ‖θ − θ0‖ over the LoRA factors
    adapter_parameters: int
    trainable_parameters: int  # with the task head
    train_seconds: float
    firing_rate: float | None = None  # of the proximal term: at what share of the steps it acted


class StepBar(TrainerCallback):
    """One progress bar over the steps of all runs, in the place of the Trainer's own for each run."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update()


def matching_rank(parameters: int, modules: Sequence[str], kernels: ModuleKernels) -> int:
    """The rank at which LoRA on `modules` has as nearly as possible that many parameters."""
    of_rank_one = sum(kernels.num_parameters[name] for name in modules) / kernels.rank
    return max(1, round(parameters / of_rank_one))


def make_arms(
    kernels: ModuleKernels,
    recommendation: Recommendation,
    baselines: Sequence[str],
    proximal_lambda: float,
    ablation: bool = False,
) -> tuple[Arm, ...]:
    """The recommendation with ProximalLoRA; query and value with as many parameters; every linear module.

    The ablation crosses the first two: each choice of modules with and without the proximal term.
    """
    rank = matching_rank(recommendation.parameters, baselines, kernels)

    def arm(key: str, label: str, modules: Sequence[str], r: int, pull: float = 0.0) -> Arm:
        def make_config() -> LoraConfig:
            shared = {"r": r, "lora_alpha": 2 * r, "target_modules": list(modules), "task_type": "SEQ_CLS"}
            return ProximalLoraConfig(**shared, proximal_lambda=pull) if pull else LoraConfig(**shared)

        return Arm(key, label, tuple(modules), make_config, r, pull)

    def recommended() -> LoraConfig:
        return recommendation.to_config(task_type="SEQ_CLS", proximal_lambda=proximal_lambda)

    chosen, label = recommendation.modules, "recommended, ProximalLoRA"
    arms = [
        Arm("recommended", label, chosen, recommended, kernels.rank, proximal_lambda),
        arm("query_value", "query and value, LoRA", baselines, rank),
        arm("all_linear", "all linear, LoRA", kernels.names, kernels.rank),
    ]
    if ablation:
        arms.append(arm("recommended_lora", "recommended, LoRA", chosen, kernels.rank))
        label = "query and value, ProximalLoRA"
        arms.append(arm("query_value_proximal", label, baselines, rank, proximal_lambda))
    return tuple(arms)


def lora_factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def parameter_distance(model: nn.Module, start: Mapping[str, Tensor]) -> float:
    now = lora_factors(model)
    return sum(float((now[name] - value).square().sum()) for name, value in start.items()) ** 0.5


def train(
    task: Task,
    arm: Arm,
    seed: int,
    learning_rate: float,
    protocol: Protocol,
    folder: Path,
    bar: tqdm,
    split: str = "test",
) -> tuple[Run, PeftModel]:
    """Trains one arm from the head, the A matrices and the batch order of `seed`; measures on `split`."""
    model = get_peft_model(task.new_model(seed), arm.make_config())
    start = lora_factors(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=protocol.steps,
        per_device_train_batch_size=protocol.batch_size,
        per_device_eval_batch_size=4 * protocol.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=task.train, data_collator=task.collator, callbacks=[StepBar(bar)]
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    measured = trainer.predict(getattr(task, split))
    logits, labels = torch.as_tensor(measured.predictions).double(), torch.as_tensor(measured.label_ids)
    run = Run(
        arm=arm.key,
        seed=seed,
        learning_rate=learning_rate,
        test_loss=float(nn.functional.cross_entropy(logits, labels)),
        test_accuracy=float((logits.argmax(-1) == labels).double().mean()),
        weight_distance=weight_distance(model),
        parameter_distance=parameter_distance(model, start),
        adapter_parameters=sum(value.numel() for value in start.values()),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        train_seconds=seconds,
        firing_rate=proximal_firing_rate(model) if arm.proximal_lambda > 0 else None,
    )
    return run, model


def choose_learning_rate(task: Task, arm: Arm, protocol: Protocol, folder: Path, bar: tqdm) -> float:
    """The learning rate of the protocol with the least validation loss in one pilot run each."""
    if protocol.pilots == 0:
        return protocol.learning_rates[0]
    losses = {
        rate: train(task, arm, PILOT_SEED, rate, protocol, folder, bar, split="validation")[0].test_loss
        for rate in protocol.learning_rates
    }
    return min(losses, key=losses.__getitem__)


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of a single value)."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
