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
"""`compute_ntk`: the neural tangent kernel of a model's modules, before training, one block a module."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import TargetError
from ..functional.gram import DEFAULT_MAX_BYTES, rows_gram
from ..kernels import ModuleKernels
from .accumulate import TermAccumulator, relative_spread
from .batches import Batch, evaluate, gather_labels, progress_bar, read_batches
from .outputs import OutputFunction, OutputKind, label_shift
from .parameters import parameter_rows, split_parameters
from .recorder import Recorder, by_example, recording
from .targets import Targets, base_model, linear_shape, resolve_always_trained, resolve_targets
from .terms import Space, Term, check_adapter_arguments, linear_parameter_terms, module_terms


def compute_ntk(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: Targets = "all-linear",
    space: Space = "lora",
    rank: int = 8,
    lora_alpha: float = 16.0,
    draws: int = 1,
    outputs: OutputKind = "logits",
    always_trained: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    num_projections: int = 16,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> ModuleKernels:
    """The empirical NTK `K_m = J_m J_mᵀ` of every target module m at the model's present parameters.

    One forward and C backward passes a batch give the rows of every module at once, through hooks on the unmodified
    model; there is no loop over examples and no parameter gradient is computed. The result is exact: it agrees with a
    Jacobian taken example by example up to rounding. With random A (space="lora") it is exact for *that* A.

    Args:
        model: a PreTrainedModel, a PeftModel, or any nn.Module called with keyword arguments; left as it was found
            (mode, requires_grad, gradients, hooks, random state). Dropout is off while we look.
        batches: dict batches, as a DataLoader gives them; read once, before any work. Labels ("labels" or "label")
            are kept and used where `outputs` needs them.
        targets: "all-linear", a regular expression for full names, or a list of names and suffixes; peft's own rules.
        space: which parameters of a module count: "lora" (a fresh adapter, B = 0; a layer that carries an active LoRA
            adapter counts with its own A, B and scaling), "weight" (the full matrix), "rows" or "columns" (the first
            `rank` of them), "bias".
        rank, lora_alpha: of the adapter under consideration; its scaling is lora_alpha / rank.
        draws: draws of LoRA's random A taken in the same pass; blocks are their mean, `kernels.spread` is the
            relative standard deviation between them. The mean estimates (lora_alpha²/(3·rank·d_in)) · K_weight.
        outputs: "logits" (C = number of labels), "label_logit", "margin", "log_likelihood", "random_projection"
            (C = num_projections) or "loss"; see `peft_linear.capture.outputs`.
        always_trained: names of modules trained in full whatever is chosen; their kernel is `kernels.base`. Default:
            `modules_to_save` of a PeftModel, the task head of a plain model. Pass () for none.
        seed: of A and of random projections.
        progress: show progress bars.
        num_projections: outputs of "random_projection".
        max_bytes: bound on the temporary memory of one Gram product.

    Returns:
        ModuleKernels with float64 (n, n) blocks on the CPU, n = N·C.

    Raises:
        TargetError: unknown or unusable targets, candidates that take no gradient, examples that cannot be told apart.
        OutputError: labels missing or out of range, outputs that are not finite or of the wrong shape.
        PeftLinearError: no batches, or arguments out of range.

    Cost: (1 forward + C backward passes to the lowest target) of N examples, N·C·T·rank·d_out multiplications a
    module for the rows, and n²·rank·d_out for its Gram matrix (d_in in place of rank for space="weight").

    Source: *Linearization Explains Fine-Tuning in Large Language Models* (arXiv 2602.08239), section 4; the
    factorisation of a linear layer's per-example gradient is Goodfellow's (arXiv 1510.01799).
    """
    check_adapter_arguments(space, rank, lora_alpha, draws)
    function = OutputFunction(
        outputs, shift=label_shift(base_model(model)), num_projections=num_projections, seed=seed
    )
    head = resolve_always_trained(model, always_trained)
    chosen = resolve_targets(model, targets, reserved=head)
    head_linear, head_other = split_parameters(head)
    terms, num_parameters = {}, {}
    for name, module in chosen.items():
        terms[name], num_parameters[name] = module_terms(name, module, space, rank, lora_alpha, draws, seed)
    read = read_batches(batches, model, function.needs_labels, f"outputs={outputs!r}")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    start = time.perf_counter()
    hooked = {**chosen, **head_linear}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        head_terms = {name: linear_parameter_terms(module) for name, module in head_linear.items()}
        accumulators, values = _capture(model, hooked, chosen, terms | head_terms, read, function, device, progress)
        labels = gather_labels(read, values, function)
        other_rows = parameter_rows(model, head_other, read, function, device, progress) if head_other else None
    passes_seconds = time.perf_counter() - start

    blocks, spread, ways = {}, {}, {}
    n = values.numel()
    base = torch.zeros(n, n, dtype=torch.float64)
    bar = tqdm(list(hooked), desc="Gram matrices", unit="module", disable=not progress)
    for name in bar:
        block, draws_of_block, ways[name] = _gram(accumulators.pop(name), max_bytes)
        if name in chosen:
            blocks[name] = block
            if draws_of_block is not None:
                spread[name] = relative_spread(draws_of_block)
        else:
            base += block
    if other_rows is not None:
        base += rows_gram(other_rows, max_bytes).cpu()
    if not any(block.any() for block in blocks.values()):
        raise _no_gradient(blocks, outputs)
    return ModuleKernels(
        blocks=blocks,
        base=base,
        outputs=values,
        labels=labels,
        num_parameters=num_parameters,
        shapes={name: linear_shape(module) for name, module in chosen.items()},  # type: ignore[misc]
        output_kind=outputs,
        space=space,
        rank=rank,
        lora_alpha=float(lora_alpha),
        spread=spread,
        provenance={
            **_describe(model, device),
            "seed": seed,
            "draws": draws,
            "num_batches": len(read),
            "always_trained": sorted(head),
            "no_gradient": [name for name, block in blocks.items() if not block.any()],
            "ways": ways,
            "seconds_passes": passes_seconds,
            "seconds_gram": time.perf_counter() - start - passes_seconds,
        },
    )


def _check_first_batch(
    recorder: Recorder,
    candidates: Iterable[str],
    outputs: Tensor,
    model: nn.Module,
    kind: str,
) -> None:
    """Before the first backward pass: are candidates part of the graph, and are the examples of a batch independent?

    Transformers work on (batch, …, width) everywhere; where a model does, no gradient of example 0 can reach the rows
    of another example. Other layouts and other models are tried: one more backward pass, of the first example alone.
    """
    size = outputs.shape[0]
    calls = [(name, call) for name, calls in recorder.calls.items() for call in calls]
    if not outputs.requires_grad or not any(recorder.calls[name] for name in candidates):
        raise _no_gradient(candidates, kind)
    plain = isinstance(base_model(model), PreTrainedModel) and all(
        call.inputs.shape[0] == size and size not in call.inputs.shape[1:-1] for _, call in calls
    )
    if size == 1 or plain:
        return
    mixed = {}

    def look(name: str, number: int, cotangent: Tensor) -> None:
        by_example(recorder.calls[name][number].inputs, size, name)
        if bool(by_example(cotangent, size, name)[1:].any()):
            mixed[name] = tuple(cotangent.shape)

    recorder.backward(outputs[0].sum(), keep_graph=True, on_cotangent=look)
    if mixed:
        name, shape = next(iter(mixed.items()))
        raise TargetError(
            f"{name} mixes the examples of a batch (its output has shape {shape}), so their gradients cannot be told "
            "apart; pass batches of one example"
        )


def _no_gradient(candidates: Iterable[str], kind: str) -> TargetError:
    return TargetError(
        f"no target takes a gradient from outputs={kind!r}: {', '.join(candidates)}; "
        "are they part of the forward pass that makes these outputs?"
    )


def _capture(
    model: nn.Module,
    hooked: Mapping[str, nn.Module],
    candidates: Iterable[str],
    terms: Mapping[str, list[Term]],
    read: Sequence[Batch],
    function: OutputFunction,
    device: torch.device,
    progress: bool,
) -> tuple[dict[str, list[TermAccumulator]], Tensor]:
    """All passes: the accumulators of every hooked module, and f at θ0 (N, C) float64."""
    accumulators = {name: [TermAccumulator(name, term) for term in terms[name]] for name in hooked}
    values = []
    now = {"output": 0, "size": 0, "outputs": 0}

    def take(name: str, number: int, cotangent: Tensor) -> None:
        for accumulator in accumulators[name]:
            accumulator.add(recorder.calls[name], number, cotangent, now["output"], now["size"], now["outputs"])

    with recording(model, hooked) as recorder:
        for number, batch in enumerate(progress_bar(list(read), progress, "Jacobians")):
            recorder.clear()
            outputs = evaluate(model, batch.to(device), function, number)
            now["size"], now["outputs"] = outputs.shape
            if number == 0:
                _check_first_batch(recorder, candidates, outputs, model, function.kind)
            for output in range(outputs.shape[1]):
                now["output"] = output
                recorder.backward(outputs[:, output].sum(), output + 1 < outputs.shape[1], take)
            for module in accumulators.values():
                for accumulator in module:
                    accumulator.end_batch(*outputs.shape)
            values.append(outputs.detach().to("cpu", torch.float64))
    return accumulators, torch.cat(values)


def _gram(accumulators: Sequence[TermAccumulator], max_bytes: int) -> tuple[Tensor, Tensor | None, str]:
    """Sum over the terms of a module."""
    results = [accumulator.gram(max_bytes) for accumulator in accumulators]
    total = torch.stack([gram for gram, _, _ in results]).sum(0)
    return total, results[0][1], "+".join(way for _, _, way in results)


def _describe(model: nn.Module, device: torch.device) -> dict[str, Any]:
    root = base_model(model)
    config = getattr(root, "config", None)
    return {
        "model_class": type(root).__name__,
        "model": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(next((p.dtype for p in root.parameters() if p.is_floating_point()), None)),
        "device": str(device),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
