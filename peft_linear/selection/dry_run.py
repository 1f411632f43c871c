# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a LoRA step and a recommendation would take, counted without computing either; models without weights too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..capture.batches import read_batches
from ..capture.engine.memory import format_memory
from ..capture.request import KernelRequest
from ..capture.step_cost import step_inputs, step_record
from ..capture.targets import base_model, resolve_always_trained
from ..errors import PeftLinearError
from ..functional.outputs import resolve_output
from ..recommendation.cost import FLOAT32, StepCost, Work
from .language import HIGHEST_RANK
from .learning_rate import TRIAL_STEPS
from .request import HEAD_DRAWS, ModuleRequest


FLOAT64 = 8
OPTIONS, RATES = 4, 3  # that a decision for a language model compares; more rates where the first ones are far off


@dataclass(frozen=True)
class CostEstimate:
    """A LoRA step on all linear layers, and the kernels of a recommendation beside it.

    Args:
        model: The name of its class.
        batch: Shape of the step's main input: (examples, tokens), or of images.
        rank: Of the adapters.
        step: Counts of the step, for any other modules and ranks.
        examples: That the recommendation is computed from.
        draws: Of the kernels; 0 for a language model, whose decision takes none.
        kernels_time: Of the recommendation, in all-linear steps of this batch.
        kernels_memory: Of the recommendation; bytes, with the weights.
    """

    model: str
    batch: tuple[int, ...]
    rank: int
    step: StepCost
    examples: int
    draws: int
    kernels_time: float
    kernels_memory: float

    def last_layers(self, share: float) -> dict[str, int]:
        """Ranks of an adapter on every linear layer of the last part of the model's layers."""
        blocks = [module.block for module in self.step.modules]
        first = min(blocks) + (1 + max(blocks) - min(blocks)) * (1 - share)
        return {m.name: self.rank for m in self.step.modules if m.all_linear and m.block >= first}

    def __str__(self) -> str:
        step, ranks = self.step, self.step.all_linear(self.rank)
        draws = f", draws of A: {self.draws}" if self.draws else ""
        forward = sum(step.forward.values(), Work())
        backward = step.work(ranks).flops - forward.flops
        again = step.with_checkpointing(not step.checkpointing)
        other = "without" if step.checkpointing else "with"
        lines = [
            f"{self.model}, batch of {' x '.join(map(str, self.batch))}, weights {format_memory(step.weights)}",
            f"all-linear LoRA step ({len(ranks)} modules, rank {self.rank}): {forward.flops:.3g} flops forward, "
            f"{backward:.3g} backward and adapters; memory {format_memory(step.memory(ranks))}, of which "
            f"{format_memory(step.activations(ranks))} are activations",
            f"  {other} gradient checkpointing: {again.time(ranks) / step.time(ranks):.2f} of the time, memory "
            f"{format_memory(again.memory(ranks))}",
        ]
        for share in (0.75, 0.5, 0.25):
            chosen = self.last_layers(share)
            lines.append(
                f"  last {share:.0%} of the layers: {step.time_share(chosen, self.rank):.2f} of the time, "
                f"{step.memory_share(chosen, self.rank):.2f} of the memory"
            )
        lines.append(
            f"recommendation ({self.examples} examples{draws}): at least {self.kernels_time:.1f} such steps, memory "
            f"about {format_memory(self.kernels_memory)}"
        )
        return "\n".join(lines)


def estimate_cost(
    model: nn.Module,
    batches: Sequence[int] | Mapping[str, Any] | Iterable[Mapping[str, Any]],
    examples: int | None = None,
    **kernels: Any,
) -> CostEstimate:
    """What `recommend_modules(model, batches, ...)` and a LoRA step of one such batch would take. Computes neither.

    Args:
        model: May be on the meta device, without weights; left as it is.
        batches: As for `compute_ntk`, or the shape of the main input, such as (4, 512) for 4 texts of 512 tokens.
        examples: That the kernels would be of; default: those of the batches.
        **kernels: Arguments of `compute_ntk` (`targets`, `space`, `rank`, `draws`, `outputs`, …), with the defaults of
            `recommend_modules`.

    Raises:
        PeftLinearError: the model's code does not run on the meta device, no batches, or unknown arguments.
        TargetError: unknown or unusable targets.

    Cost: two passes on the meta device, about a second for 30 layers.
    """
    wanted = ModuleRequest(budget=1, kernels=kernels)
    request = wanted.kernel_request(model)
    shaped = isinstance(batches, (list, tuple)) and bool(batches) and all(type(size) is int for size in batches)
    raw = [_of_shape(model, tuple(batches))] if shaped else batches  # type: ignore[arg-type]
    read = read_batches(raw, model, needs_labels=False, what="the estimate")  # type: ignore[arg-type]
    inputs = step_inputs(model, read[0])
    candidates = request.candidates(model)
    step = StepCost.from_record(step_record(model, inputs, candidates, request.always_trained))
    examples = sum(batch.size for batch in read) if examples is None else examples
    if examples < 1:
        raise PeftLinearError(f"examples must be at least 1, got {examples}")
    main = next(value for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim)
    if wanted.is_for_language(model):
        time, memory = _of_a_plan(step, read[0].size, examples)
    else:
        time, memory = _of_kernels(model, step, request, candidates, read[0].size, examples)
    return CostEstimate(
        model=type(base_model(model)).__name__,
        batch=tuple(main.shape),
        rank=request.rank,
        step=step,
        examples=examples,
        draws=0 if wanted.is_for_language(model) else request.draws,
        kernels_time=time / step.time(step.all_linear(request.rank)),
        kernels_memory=memory,
    )


def _of_shape(model: nn.Module, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A batch of zeros."""
    if len(shape) < 2 or min(shape) < 1:
        raise PeftLinearError(f"a batch's shape is such as (4, 512) or (4, 3, 224, 224), got {shape}")
    root = base_model(model)
    name = getattr(root, "main_input_name", "input_ids")
    whole = name.endswith("input_ids")
    batch = {name: torch.zeros(shape, dtype=torch.long if whole else torch.float32)}
    return batch | ({"labels": batch[name]} if whole else {})


def _of_a_plan(step: StepCost, size: int, examples: int) -> tuple[float, float]:
    """Of the decision for a language model (`selection.language`): time, as `StepCost.time` counts it, and bytes.

    Half of the examples give a gradient at the highest rank; the other half are passed through twice for each of four
    options, once for each of three learning rates, and once without an adapter. A rate takes four steps of half a
    batch.
    """
    highest = step.all_linear(HIGHEST_RANK)
    forward = step.machine.time(sum(step.forward.values(), Work()))
    batches = examples / 2 / size
    passes = 2 * OPTIONS + RATES + 1
    steps = TRIAL_STEPS * RATES / 2
    return (batches + steps) * step.time(highest) + passes * batches * forward, float(step.memory(highest))


def _of_kernels(
    model: nn.Module, step: StepCost, request: KernelRequest, candidates: Iterable[str], size: int, examples: int
) -> tuple[float, float]:
    """Time, as `StepCost.time` counts it, and bytes: a lower estimate, without the checks.

    Kernels of 16 texts of SmolLM2-135M took 9.6 steps on a busy core where this says 4.6.
    """
    everything = dict.fromkeys(candidates, request.rank)
    known = {name: rank for name, rank in everything.items() if name in step.index}
    modules = [step.modules[step.index[name]] for name in known]
    adapters = sum((step.machine.time(m.work(request.rank, bool(m.below))) for m in modules), 0.0)
    forward = step.machine.time(sum(step.forward.values(), Work()))
    backward = max(0.0, step.time(known) - forward - adapters)
    outputs = _outputs(model, request)
    time = examples / size * (forward + outputs * backward)
    memory = float(step.weights + step.activations(known))
    heads = resolve_output(request.outputs).name == "logits" and bool(resolve_always_trained(model))
    kinds = [(outputs, request.draws)] + [(1, HEAD_DRAWS)] * 2 * heads  # losses through both states of the head
    time += 2 * heads * examples / size * (forward + backward)
    for count, draws in kinds:
        rows = examples * count
        for module in modules:
            positions = module.positions / size
            features = module.d_in if request.space == "weight" else request.rank * draws
            product = min(features * module.d_out, positions**2 * (features + module.d_out))
            numbers = min(features * module.d_out, positions * (features + module.d_out))
            flops = 2 * rows * positions * features * (module.d_in + module.d_out) + 2 * rows**2 * product
            made = rows * (positions * (features + module.d_out) + numbers)  # written once, read for sums and products
            time += step.machine.time(Work(flops, FLOAT32 * 4 * made, 10 * examples / size))
            memory += FLOAT32 * rows * numbers + FLOAT64 * rows**2
    return time, memory


def _outputs(model: nn.Module, request: KernelRequest) -> int:
    """C, the outputs of an example."""
    output = resolve_output(request.outputs)
    if output.name == "logits":
        return int(getattr(getattr(base_model(model), "config", None), "num_labels", 1))
    return int(getattr(output, "num_projections", 1))
