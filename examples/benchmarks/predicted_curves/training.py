# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""One run of the measurement of predicted curves: what is predicted before training, what really happens, the gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from examples.common.tasks import Task
from examples.common.training import trained_parameters
from peft_linear import ModuleKernels, ProximalLoraConfig, compute_ntk, linearization_gap, linearize
from peft_linear.capture.features import jacobian_features
from peft_linear.capture.gap import GapReport
from peft_linear.capture.ntk import compute_sign_kernel
from peft_linear.functional.simulation import TrainingCurve
from peft_linear.kernels.jacobian_features import JacobianFeatures
from peft_linear.kernels.training import predict_training


@dataclass(frozen=True)
class Method:
    """An optimizer and the λ to try with it."""

    key: str
    label: str
    learning_rate: float  # the highest, at the first step; down to 0 along a line
    optimizer: Any  # a class of torch.optim
    arguments: Mapping[str, Any]
    ridges: tuple[float, ...]  # λ


@dataclass(frozen=True)
class Protocol:
    steps: int
    batch_size: int
    evaluate_every: int
    rank: int
    seed: int

    def rate(self, method: Method) -> Any:
        """The learning rate by step."""
        return lambda step: method.learning_rate * (1 - step / self.steps)

    def sum_of_rates(self, method: Method) -> float:
        return sum(self.rate(method)(step) for step in range(self.steps))

    def batches(self, examples: int) -> list[Tensor]:
        """The examples of each step, epoch after epoch in random order; the same in prediction and training."""
        generator = torch.Generator().manual_seed(self.seed)
        epochs = -(-self.steps * self.batch_size // examples)
        order = torch.cat([torch.randperm(examples, generator=generator) for _ in range(epochs)])
        return list(order[: self.steps * self.batch_size].split(self.batch_size))


@dataclass(frozen=True)
class Problem:
    """The task, the modules, and all that is computed before the first step."""

    task: Task
    modules: tuple[str, ...]
    train: JacobianFeatures
    held_out: JacobianFeatures
    kernels: ModuleKernels  # of the training examples, and below them the held-out ones
    signs: ModuleKernels  # the same, sign kernel

    @property
    def held_numbers(self) -> range:
        return range(len(self.task.train), len(self.task.train) + len(self.task.test))


@dataclass
class Point:
    """The real model after some steps, and its gap from the linear model at its own parameters (held-out examples)."""

    step: int
    train_loss: float
    train_accuracy: float
    held_out_loss: float
    held_out_accuracy: float
    gap: dict[str, Any]


@dataclass
class Run:
    method: str
    ridge: float
    predicted: dict[str, list[float]]  # before training; "recorded" has the steps
    approximated: dict[str, list[float]] | None  # of Adam, by the sign kernel
    points: list[Point]
    distance: float  # ‖θ−θ0‖ of the real model, head included
    report: dict[str, Any]  # `linearization_gap` at the end, held-out examples
    own_gap: dict[str, Any]  # of the real model from the linear one that was trained by itself
    gap_at_first_a: dict[str, Any]  # of the real model with LoRA's A reset to its start, on which f̄ does not depend
    rows_against_forward_mode: float  # largest difference of a linear logit, two ways to it

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def new_model(task: Task, modules: Sequence[str], protocol: Protocol, ridge: float) -> PeftModel:
    """The model of every run: the same pretrained weights, head and A. Always in eval mode: dropout is off."""
    config = ProximalLoraConfig(
        r=protocol.rank,
        lora_alpha=2 * protocol.rank,
        target_modules=list(modules),
        task_type="SEQ_CLS",
        proximal_lambda=ridge,
        proximal_selective=False,
    )
    return get_peft_model(task.new_model(protocol.seed), config).eval()


def collate(task: Task, rows: Sequence[Any], size: int = 32) -> list[dict]:
    return [task.collator(list(rows[first : first + size])) for first in range(0, len(rows), size)]


def prepare(task: Task, modules: tuple[str, ...], protocol: Protocol) -> Problem:
    """Features and kernels of the training and the held-out examples."""
    model = new_model(task, modules, protocol, 0.0)
    train, held_out = collate(task, task.train), collate(task, task.test)
    kernels, signs = (
        compute(model, train + held_out, modules, progress=False) for compute in (compute_ntk, compute_sign_kernel)
    )
    return Problem(
        task=task,
        modules=modules,
        train=jacobian_features(model, train, progress=False),
        held_out=jacobian_features(model, held_out, progress=False),
        kernels=kernels,
        signs=signs,
    )


def predict(problem: Problem, method: Method, ridge: float, protocol: Protocol) -> tuple[TrainingCurve, Any]:
    """The curve of the linear model (SGD in kernel space, AdamW on features), and Adam's by the sign kernel."""
    settings: dict[str, Any] = {
        "learning_rate": protocol.rate(method),
        "steps": protocol.steps,
        "batches": protocol.batches(len(problem.task.train)),
        "record_every": max(1, protocol.evaluate_every // 4),
        "ridge": ridge,
    }
    if method.optimizer is torch.optim.SGD:
        held = {"held_out": problem.held_numbers}
        return predict_training(problem.kernels, proximal_mode="decoupled", **held, **settings), None
    exact = problem.train.train(
        held_out=problem.held_out, optimizer=method.optimizer, optimizer_arguments=method.arguments, **settings
    )
    return exact, predict_training(problem.signs, held_out=problem.held_numbers, **settings)


def run(problem: Problem, method: Method, ridge: float, protocol: Protocol, bar: tqdm) -> Run:
    """Predicts, then trains, then measures the gap."""
    curve, approximated = predict(problem, method, ridge, protocol)
    model = new_model(problem.task, problem.modules, protocol, ridge)
    linearized = linearize(model)
    points = train(problem, model, method, protocol, bar)
    held_out = collate(problem.task, problem.task.test)
    report = linearization_gap(model, linearized, held_out, at="model")
    theta = problem.held_out.flatten(model)
    by_rows = linear_logits(problem.held_out, theta)
    inputs = {key: value for key, value in held_out[0].items() if key != "labels"}
    exact = linearized.linear_outputs(dict(model.named_parameters()), **inputs).logits
    assert curve.held_out_outputs is not None

    def gap(outputs: Tensor, linear: Tensor, distance: float) -> dict[str, Any]:
        start, labels = problem.held_out.outputs, problem.held_out.labels
        return GapReport.of_logits(outputs, linear, start, labels, distance=distance).to_dict()

    distance = float((theta - problem.held_out.start).double().norm())
    own = gap(logits(model, problem.task, problem.task.test), curve.held_out_outputs, float(curve.distance[-1]))
    anchors = {name: value for name, value in linearized.anchor_state_dict().items() if "lora_A" in name}
    model.load_state_dict(anchors, strict=False)
    at_first_a = gap(logits(model, problem.task, problem.task.test), by_rows, distance)
    return Run(
        method=method.key,
        ridge=ridge,
        predicted=as_lists(curve),
        approximated=None if approximated is None else as_lists(approximated),
        points=points,
        distance=distance,
        report=report.to_dict(),
        own_gap=own,
        gap_at_first_a=at_first_a,
        rows_against_forward_mode=float((exact - by_rows[: len(exact)]).abs().max()),
    )


def train(problem: Problem, model: PeftModel, method: Method, protocol: Protocol, bar: tqdm) -> list[Point]:
    """A plain loop: the optimizer that a user would take, the proximal term where the adapter has it."""
    task = problem.task
    optimizer = method.optimizer(trained_parameters(model), lr=method.learning_rate, **method.arguments)
    points = [evaluate(problem, model, 0)]
    for step, batch in enumerate(protocol.batches(len(task.train)), start=1):
        for group in optimizer.param_groups:
            group["lr"] = protocol.rate(method)(step - 1)
        optimizer.zero_grad()
        model(**task.collator([task.train[i] for i in batch.tolist()])).loss.backward()
        optimizer.step()
        bar.update()
        if step % protocol.evaluate_every == 0 or step == protocol.steps:
            points.append(evaluate(problem, model, step))
    return points


def evaluate(problem: Problem, model: nn.Module, step: int) -> Point:
    train, held_out = (logits(model, problem.task, rows) for rows in (problem.task.train, problem.task.test))
    theta = problem.held_out.flatten(model)
    gap = GapReport.of_logits(
        held_out,
        linear_logits(problem.held_out, theta),
        problem.held_out.outputs,
        problem.held_out.labels,
        distance=float((theta - problem.held_out.start).double().norm()),
        evaluated_at="model",
    )
    losses = [score(*pair) for pair in ((train, problem.train.labels), (held_out, problem.held_out.labels))]
    return Point(step, *losses[0], *losses[1], gap=gap.to_dict())


def linear_logits(features: JacobianFeatures, theta: Tensor) -> Tensor:  # (N, C)
    """f̄ at parameters θ (P,), from the Jacobian's rows."""
    return features.outputs + (features.rows @ (theta - features.start)).double().view_as(features.outputs)


@torch.inference_mode()
def logits(model: nn.Module, task: Task, rows: Sequence[Any]) -> Tensor:  # (N, C) float64
    return torch.cat([model(**batch).logits for batch in collate(task, rows)]).double()


def score(outputs: Tensor, labels: Tensor | None) -> tuple[float, float]:
    assert labels is not None
    return float(F.cross_entropy(outputs, labels)), float((outputs.argmax(1) == labels).double().mean())


def as_lists(curve: TrainingCurve) -> dict[str, list[float]]:
    names = ("recorded", "train_loss", "train_accuracy", "held_out_loss", "held_out_accuracy", "distance")
    return {name: getattr(curve, name).tolist() for name in names}
