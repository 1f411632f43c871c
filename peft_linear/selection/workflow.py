# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""From a model and data to a recommendation in one line."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..capture.ntk import compute_ntk
from ..capture.request import KernelRequest
from ..capture.resources import Resources
from ..capture.targets import base_model, resolve_always_trained
from ..capture.warm_head import STEPS as HEAD_STEPS
from ..capture.warm_head import warmed_head
from ..errors import PeftLinearError, TargetError
from ..functional.outputs import Outputs, resolve_output
from ..kernels.module_kernels import ModuleKernels
from ..recommendation.budget import parse_budget
from ..recommendation.recommendation import Recommendation
from .avoided import AVOIDED, check_avoid
from .criteria import DEFAULT_NAME, resolve_criterion
from .preconditioning import BATCH_SIZE, check_optimizer
from .problem import Problem
from .recommend import BY_HEADS, check_ridge, recommend
from .search.search import check_strategy


DRAWS = 8  # of LoRA's A where an example has one output, for which a draw costs little
LANGUAGE_DRAWS = 32  # of a language model, whose default inverts the kernel, and with it the draws' noise


def default_outputs(model: nn.Module) -> str:
    """ "log_likelihood" for a model with output embeddings (a language model), "logits" for any other."""
    embeddings = getattr(base_model(model), "get_output_embeddings", lambda: None)()
    return "logits" if embeddings is None else "log_likelihood"


def check_request(
    model: nn.Module,
    budget: int | float | str,
    criterion: str = DEFAULT_NAME,
    ridge: float | None = None,
    strategy: str = "greedy",
    optimizer: str | None = None,
    head_steps: int | None = None,
    train_batch_size: int = BATCH_SIZE,
    avoid: str | Sequence[str] = AVOIDED,
    **ntk: Any,
) -> tuple[str, ...]:
    """Refuses a recommendation that cannot be made, before any pass through the model; returns the candidates' names.

    Raises:
        TargetError, BudgetError, CriterionError, KernelError: as `recommend_modules`.
        OutputError: outputs of this kind do not provide what the criterion needs, even with labels.
        PeftLinearError: a keyword that `compute_ntk` does not take.
    """
    accepted = [name for name in inspect.signature(compute_ntk).parameters if name not in ("model", "batches")]
    accepted.append("progress")
    unknown = sorted(set(ntk) - set(accepted))
    if unknown:
        raise PeftLinearError(f"unknown arguments {', '.join(unknown)}; compute_ntk takes: {', '.join(accepted)}")
    check_ridge(ridge)
    check_avoid(avoid)
    kind = ntk.get("outputs") or default_outputs(model)
    labelled = _labelled(kind)
    resolved = resolve_criterion(criterion, labelled)
    check_optimizer(optimizer, criterion, labelled, train_batch_size)
    head = resolve_always_trained(model, ntk.get("always_trained"))
    if head_steps is not None and head_steps < 0:
        raise PeftLinearError(f"head_steps must be at least 0, got {head_steps}")
    if head_steps and not head:
        raise TargetError(
            f"head_steps={head_steps}, but {type(base_model(model)).__name__} has no task head, which is trained "
            "whatever is chosen; leave head_steps at 0, or name the head in `always_trained`"
        )
    asked = {name: value for name, value in ntk.items() if name not in ("progress", "resources")}
    sizes = KernelRequest(**asked).candidates(model)
    limit = parse_budget(budget, sizes)
    check_strategy(strategy, len(sizes), limit, resolved)
    return tuple(sizes)


def _labelled(outputs: Outputs) -> Problem:
    """Outputs of that kind with class labels, to ask which criteria they allow."""
    return Problem(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), resolve_output(outputs).name, ridge=1.0)


def look(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    criterion: str = DEFAULT_NAME,
    head_steps: int | None = None,
    **ntk: Any,
) -> tuple[ModuleKernels, tuple[ModuleKernels, ...]]:
    """The kernels that `recommend` needs for a criterion, and its `heads`, if it is taken over heads.

    Gradient energy of labelled logits has heads (`through_heads`). Other criteria see the model as it is or, where
    `head_steps` asks for it, through the warmed head alone, which the kernels' provenance then says.

    Args:
        criterion: A name of `CRITERIA`, or "default-by-evidence".
        head_steps: Default: 20 for gradient energy where there is a task head, else 0.
        **ntk: As for `compute_ntk`, but `draws` is `LANGUAGE_DRAWS` by default for log-likelihoods.
    """
    if ntk.get("outputs") == "log_likelihood" and ntk.get("space", "lora") == "lora":
        ntk.setdefault("draws", LANGUAGE_DRAWS)
    batches = [batches] if isinstance(batches, Mapping) else list(batches)  # read more than once
    by_heads = resolve_criterion(criterion, _labelled(ntk.get("outputs", "logits"))).name == BY_HEADS
    if head_steps and not by_heads:
        with warmed_head(model, batches, head_steps, always_trained=ntk.get("always_trained")):
            return _after(head_steps, compute_ntk(model, batches, **ntk)), ()
    kernels = compute_ntk(model, batches, **ntk)
    if head_steps is None:
        head_steps = HEAD_STEPS if resolve_always_trained(model, ntk.get("always_trained")) else 0
    if not by_heads or not head_steps or "logits" not in Problem.of(kernels, ridge=1.0).provides:
        return kernels, ()
    draws = max(ntk.pop("draws", 1), DRAWS)
    return kernels, through_heads(model, batches, head_steps, draws, **ntk)


def through_heads(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    head_steps: int = HEAD_STEPS,
    draws: int = DRAWS,
    **ntk: Any,
) -> tuple[ModuleKernels, ModuleKernels]:
    """Kernels of the losses through the task head as it is, and as `head_steps` steps of training make it.

    One backward pass a batch each, so that LoRA's random A can be averaged over several draws.

    Args:
        draws: Of A; other spaces have none.
        **ntk: Others, as for `compute_ntk`; `outputs` and a folder are not used.
    """
    ntk = {**ntk, "outputs": "loss", "resources": replace(ntk.get("resources", Resources()), folder=None)}
    if ntk.get("space", "lora") == "lora":
        ntk["draws"] = draws
    as_it_is = compute_ntk(model, batches, **ntk)
    with warmed_head(model, batches, head_steps, always_trained=ntk.get("always_trained")):
        return as_it_is, _after(head_steps, compute_ntk(model, batches, **ntk))


def _after(head_steps: int, kernels: ModuleKernels) -> ModuleKernels:
    return replace(kernels, provenance={**kernels.provenance, "head_steps": head_steps})


def recommend_modules(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    budget: int | float | str,
    criterion: str = DEFAULT_NAME,
    ridge: float | None = None,
    strategy: str = "greedy",
    *,
    seed: int = 0,
    head_steps: int | None = None,
    avoid: str | Sequence[str] = AVOIDED,
    optimizer: str | None = None,
    train_batch_size: int = BATCH_SIZE,
    learning_rate: float | None = None,
    steps: int = 100,
    folds: int = 4,
    **ntk: Any,
) -> Recommendation:
    """`recommend(compute_ntk(model, batches), budget)`, with what can be refused refused before the first pass.

    Args:
        model, batches: As for `compute_ntk`; the model is left as it was found.
        budget, criterion, ridge, strategy: As for `recommend`.
        avoid, optimizer, train_batch_size, learning_rate, steps, folds: As for `recommend`.
        head_steps: Steps that the task head is trained for, alone and for the moment (`warmed_head`). Gradient energy
            is the least of a module's shares through the head as it is and that one (default: 20 steps, where there is
            a head); 0: the head as it is. Other criteria look through that head alone where steps are given; their
            default is 0.
        seed: Of LoRA's random A and of the cross-validation folds.
        **ntk: Other arguments of `compute_ntk` (`targets`, `space`, `rank`, `lora_alpha`, `draws`, `outputs`, …).
            `outputs` defaults to "log_likelihood" for language models, then `draws` to 32, and to "logits" otherwise.
            For a language model that fits, space="weight" chooses better than the default (docs/decisions/0009).

    Raises:
        PeftLinearError: or one of its kin, as `compute_ntk` and `recommend`.
    """
    check_request(model, budget, criterion, ridge, strategy, optimizer, head_steps, train_batch_size, avoid, **ntk)
    ntk.setdefault("outputs", default_outputs(model))
    kernels, heads = look(model, batches, criterion, head_steps, seed=seed, **ntk)
    return recommend(
        kernels,
        budget,
        criterion,
        ridge,
        strategy,
        seed,
        heads=heads,
        avoid=avoid,
        optimizer=optimizer,
        train_batch_size=train_batch_size,
        learning_rate=learning_rate,
        steps=steps,
        folds=folds,
    )
