# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The scores of every criterion and every baseline, before training, for the configurations of the benchmark.

A scorer computes everything that follows from one pass over calibration examples: kernels of one space, Jacobian
features, or a baseline. Scores are signed so that higher is better. A set has the criterion of its summed kernel, or,
for baselines that score modules, the sum of their scores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from examples.benchmarks.selection.sets import Configuration
from examples.benchmarks.selection.simulation import gradient_norms, simulated_losses
from examples.benchmarks.selection.tasks import SelectionTask
from examples.benchmarks.selection.training import Protocol
from examples.common.records import Records
from peft_linear import ModuleKernels, Resources, compute_ntk
from peft_linear.capture.features import jacobian_features
from peft_linear.capture.request import KernelRequest
from peft_linear.capture.warm_head import warmed_head
from peft_linear.errors import TargetError
from peft_linear.functional.simulation import SMOOTHNESS
from peft_linear.selection.baselines.by_kernels import kappa_order
from peft_linear.selection.baselines.by_model import MODEL_BASELINES, model_scores
from peft_linear.selection.criteria import CRITERIA, applicable_criteria
from peft_linear.selection.heads import over_heads
from peft_linear.selection.preconditioning import adam_preconditioned
from peft_linear.selection.problem import Problem
from peft_linear.selection.request import kernels_through_heads
from peft_linear.selection.views import default_ridge


SCORE_SEED = 0  # head, A and calibration examples of what is scored
EXAMPLES, MAX_ROWS = 64, 640  # calibration examples, and rows of a kernel, which limit them
PROBE_STEPS, PROBE_RATE = 20, 3e-3
PARAMETERS = "number of parameters"
BY_ADAM = ", AdamW"
MANY_DRAWS = "lora, 32 draws"  # for models without a head only: those with one have other defaults
DEFAULT = "the default of recommend_modules"
BOTH_HEADS = "gradient energy, least share over both heads"
MEAN_SHARE, WARMED_HEAD = "gradient energy, mean share over both heads", "gradient energy, warmed head"
DEFAULTS = {  # by whether there is a head
    True: f"{BOTH_HEADS}{BY_ADAM} (lora, 8 draws, both heads)",
    False: f"leave_one_out{BY_ADAM} ({MANY_DRAWS})",
}

Scores = dict[str, dict[str, float]]  # criterion -> configuration -> utility


def count_examples(task: SelectionTask, model: nn.Module) -> int:
    """As many as keep the kernel at `MAX_ROWS` rows."""
    return EXAMPLES if task.outputs != "logits" else max(8, min(EXAMPLES, MAX_ROWS // int(model.config.num_labels)))  # type: ignore[union-attr, arg-type]


def start_model(task: SelectionTask, seed: int, probed: bool) -> nn.Module:
    """The model of `seed`; `probed`: its head trained alone for a few steps first."""
    model = task.make_model(seed)
    if not probed:
        return model
    head = getattr(model, str(task.head))
    model.requires_grad_(False)
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=PROBE_RATE, weight_decay=0.0)
    batches = task.batches(seed, 16)
    for _ in range(PROBE_STEPS):
        optimizer.zero_grad()
        model(**next(batches)).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.requires_grad_(True)


def kernel_scorer(space: str, draws: int, probed: bool, warmed: bool = False) -> Callable[..., Scores]:
    """All criteria on kernels of one space, plain and Adam-preconditioned; `warmed`: with `warmed_head`."""

    def scorer(task: SelectionTask, sets: Sequence[Configuration], seed: int, protocol: Protocol) -> Scores:
        model = start_model(task, seed, probed)
        batches = task.calibration(count_examples(task, model), seed)
        with warmed_head(model, batches) if warmed else nullcontext():
            kernels = compute_ntk(
                model,
                batches,
                space=space,
                rank=protocol.rank,
                lora_alpha=protocol.lora_alpha,
                draws=draws,
                outputs=task.outputs,
                seed=seed,
                progress=False,
            )
        return criteria_of(kernels, sets)

    return scorer


def heads_scorer(space: str, draws: int) -> Callable[..., Scores]:
    """Gradient energy with the new head and the warmed one; `recommend_modules` scores by its least share."""

    def scorer(task: SelectionTask, sets: Sequence[Configuration], seed: int, protocol: Protocol) -> Scores:
        model = task.make_model(seed)
        batches = task.calibration(count_examples(task, model), seed)
        request = KernelRequest(
            space=space,
            rank=protocol.rank,
            lora_alpha=protocol.lora_alpha,
            draws=draws if space == "lora" else 1,
            seed=seed,
        )
        by_head = kernels_through_heads(request, model, batches, resources=Resources(progress=False))
        scores: Scores = {}
        for suffix, of in (("", by_head), (BY_ADAM, tuple(map(adam_preconditioned, by_head)))):
            shares = [_shares([kernels]) for kernels in of]
            mean = {name: statistics.fmean(share[name] for share in shares) for name in shares[0]}
            scores[f"{BOTH_HEADS}{suffix}"] = sums(_shares(of), sets)
            scores[f"{MEAN_SHARE}{suffix}"] = sums(mean, sets)
            scores[f"{WARMED_HEAD}{suffix}"] = sums(shares[1], sets)
        return scores

    return scorer


def _shares(by_head: Sequence[ModuleKernels]) -> dict[str, float]:
    """{module: its gradient energy in `over_heads`}."""
    kernels = over_heads(by_head)
    problem = Problem.of(kernels, ridge=1.0)
    return {name: CRITERIA["gradient_energy"](kernels[name], problem) for name in kernels.names}


def criteria_of(kernels: ModuleKernels, sets: Sequence[Configuration]) -> Scores:
    return _criteria_of(kernels, sets, "") | _criteria_of(adam_preconditioned(kernels), sets, BY_ADAM)


def _criteria_of(kernels: ModuleKernels, sets: Sequence[Configuration], suffix: str) -> Scores:
    rate = kernels.num_examples / SMOOTHNESS["cross_entropy"] / float(kernels.spectrum().eigenvalues[0])
    problem = Problem.of(kernels, default_ridge(kernels), learning_rate=rate)
    names = applicable_criteria(problem)
    scores: Scores = {name + suffix: {} for name in names}
    for configuration in sets:
        gram = kernels.subset(configuration.modules)
        for name in names:
            scores[name + suffix][configuration.key] = CRITERIA[name].utility(CRITERIA[name](gram, problem))
    return scores


def feature_scorer(probed: bool) -> Callable[..., Scores]:
    """AdamW simulated in the linearised model, and what its first step gains: the gradient's 1-norm."""

    def scorer(task: SelectionTask, sets: Sequence[Configuration], seed: int, protocol: Protocol) -> Scores:
        model = start_model(task, seed, probed)
        count = 2 * count_examples(task, model)
        features = jacobian_features(
            model,
            task.calibration(count, seed),
            rank=protocol.rank,
            lora_alpha=protocol.lora_alpha,
            outputs=task.outputs,
            seed=seed,
            progress=False,
        )
        scores: Scores = {"gradient 1-norm": sums(gradient_norms(features), sets)}
        if task.outputs == "logits":
            for steps in protocol.steps:
                scores[f"simulated AdamW, {steps} steps"] = {}
            for configuration in sets:
                losses = simulated_losses(features.subset(configuration.modules), seed, protocol)
                for steps, loss in losses.items():
                    scores[f"simulated AdamW, {steps} steps"][configuration.key] = -loss
        return scores

    return scorer


def baseline_scorer(name: str) -> Callable[..., Scores]:
    """A baseline that scores modules by the model and its gradients."""

    def scorer(task: SelectionTask, sets: Sequence[Configuration], seed: int, protocol: Protocol) -> Scores:
        model = task.make_model(seed)
        batches = task.calibration(count_examples(task, model), seed)
        scores = model_scores(name, model, batches, rank=protocol.rank, lora_alpha=protocol.lora_alpha, seed=seed)
        return {name: sums(scores, sets)}

    return scorer


def kappa_scorer(task: SelectionTask, sets: Sequence[Configuration], seed: int, protocol: Protocol) -> Scores:
    """KappaTune's order; a set has the mean place of its modules."""
    model = task.make_model(seed)
    kernels = compute_ntk(model, task.calibration(1, seed), outputs=task.outputs, progress=False)
    try:
        order = kappa_order(model, kernels)
    except TargetError:  # GPT-2's Conv1D is not an nn.Linear
        return {}
    places = {name: float(len(order) - place) for place, name in enumerate(order)}
    return {"kappa_tune": sums({name: places.get(name, 0.0) for name in task.modules}, sets)}


def sums(scores: Mapping[str, float], sets: Sequence[Configuration]) -> dict[str, float]:
    """{configuration: the sum over its modules}."""
    return {c.key: sum(scores[name] for name in c.modules) for c in sets}


SCORERS: dict[str, Callable[..., Scores]] = {
    "lora": kernel_scorer("lora", 1, probed=False),
    "lora, 8 draws": kernel_scorer("lora", 8, probed=False),
    MANY_DRAWS: kernel_scorer("lora", 32, probed=False),
    "weight": kernel_scorer("weight", 1, probed=False),
    "lora, 8 draws, probed head": kernel_scorer("lora", 8, probed=True),
    "weight, probed head": kernel_scorer("weight", 1, probed=True),
    "lora, warmed head": kernel_scorer("lora", 1, probed=False, warmed=True),
    "lora, both heads": heads_scorer("lora", 1),
    "lora, 8 draws, both heads": heads_scorer("lora", 8),
    "weight, both heads": heads_scorer("weight", 1),
    "features": feature_scorer(probed=False),
    "features, probed head": feature_scorer(probed=True),
    **{f"baseline {name}": baseline_scorer(name) for name in MODEL_BASELINES},
    "baseline kappa_tune": kappa_scorer,
}


def scorers_of(task: SelectionTask) -> list[str]:
    """All scorers that apply: without a head, none can be probed."""
    return [name for name in SCORERS if (name != MANY_DRAWS if task.head is not None else "head" not in name)]


def measure_scores(
    task: SelectionTask,
    sets: Sequence[Configuration],
    seed: int,
    protocol: Protocol,
    records: Records,
    wanted: Iterable[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """{scorer: its record} of the `wanted` ones, or all, computed where `records` lacks it.

    A record has the scores, and the seconds they took.
    """
    found = {}
    for name in scorers_of(task) if wanted is None else wanted:
        key = (task.key, name, seed)
        if key not in records:
            start = time.perf_counter()
            scores = shortened(SCORERS[name](task, sets, seed, protocol))
            seconds = round(time.perf_counter() - start, 2)
            records.add({"task": task.key, "scorer": name, "seed": seed, "scores": scores, "seconds": seconds})
        found[name] = records[key]
    return found


def shortened(scores: Scores) -> Scores:
    """Every score with as few digits, from six on, as keep the order and the ties of its criterion."""

    def rounded(values: Mapping[str, float]) -> dict[str, float]:
        for digits in range(6, 17):
            short = {key: float(f"{value:.{digits}g}") for key, value in values.items()}
            if len(set(short.values())) == len(set(values.values())):  # rounding is monotonic: no new tie, same order
                return short
        return dict(values)

    return {criterion: rounded(values) for criterion, values in scores.items()}


def table_of(
    task: SelectionTask, sets: Sequence[Configuration], scored: Mapping[str, Mapping[str, Any]], rank: int
) -> Scores:
    """{"criterion (scorer)": {configuration: utility}} of everything that was scored, and the number of parameters."""
    table: Scores = {PARAMETERS: {c.key: float(task.parameters(c.modules, rank)) for c in sets}}
    for scorer, record in scored.items():
        for criterion, values in record["scores"].items():
            table[criterion if scorer.startswith("baseline") else f"{criterion} ({scorer})"] = dict(values)
    default = DEFAULTS[task.head is not None]
    if default in table:
        table[DEFAULT] = table[default]
    return table
