# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""One training run: LoRA on the modules and ranks of an arm, AdamW, a linear decay of the rate to zero.

Every module has its own scaling lora_alpha / r with lora_alpha = 16. The base model comes back bitwise as it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from .batches import Encoded, evaluation_batches, pack, token_losses, training_batches


STEPS = 60
BATCH = 4
ALPHA = 16
CLIP = 1.0
CURVE_EVERY = 5


def lora_config(ranks: dict[str, int], alpha: int = ALPHA) -> LoraConfig:
    return LoraConfig(
        r=1,
        rank_pattern=dict(ranks),
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=list(ranks),
        task_type="CAUSAL_LM",
    )


def adapted(model: nn.Module, ranks: dict[str, int], seed: int) -> AbstractContextManager[nn.Module]:
    """`model` with LoRA on the modules of `ranks` inside the block, without it afterwards."""
    return with_adapter(model, lora_config(ranks), seed)


@contextmanager
def with_adapter(model: nn.Module, config: LoraConfig, seed: int) -> Iterator[nn.Module]:
    """`model` with the adapter of `config`, drawn from `seed`, inside the block, without it afterwards."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


def train(
    model: nn.Module,
    ranks: dict[str, int],
    data: dict[str, Sequence[Encoded]],  # splits "train", "validation", "test"
    rate: float,
    seed: int,
    steps: int = STEPS,
    measure: Callable[[nn.Module], dict] | None = None,
) -> dict:
    """Trains and evaluates; the losses are per label token. `measure` adds what else is asked of the trained model."""
    start = time.perf_counter()
    with adapted(model, ranks, seed):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        processor = time.process_time()
        losses, seconds = optimise(model, parameters, training_batches(data["train"], BATCH, steps, seed), rate)
        processor = time.process_time() - processor
        result = {split: mean_loss(model, data[split]) for split in ("validation", "test")}
        measured = measure(model) if measure is not None else {}
    return {
        "validation_loss": finite(result["validation"]),
        "test_loss": finite(result["test"]),
        "adapter_parameters": sum(parameter.numel() for parameter in parameters),
        "train_curve": curve(losses),
        "seconds_per_step": round(seconds / len(losses), 3),
        "cpu_seconds_per_step": round(processor / len(losses), 3),  # all threads; what other work does not lengthen
        "seconds": round(time.perf_counter() - start, 1),
        **measured,
    }


def batch_loss(model: nn.Module, batch: Sequence[Encoded]) -> Tensor:
    """The mean over the label tokens."""
    return token_losses(model, pack(batch)).mean()


def optimise(
    model: nn.Module,
    parameters: list[Tensor],
    batches: list[list[Encoded]],
    rate: float,
    *,
    loss_of: Callable[[nn.Module, list[Encoded]], Tensor] = batch_loss,
    weight_decay: float = 0.0,
    planned: int | None = None,
    begin: Callable[[torch.optim.Optimizer, Any], Callable[[], None]] | None = None,
) -> tuple[list[float], float]:
    """The loss of every step before its update, and the seconds of all steps; a loss of NaN ends the training.

    The rate decays to zero at step `planned`; default: at the last batch. `begin`, given the optimizer and the
    schedule, returns what is called after every step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)
    end = len(batches) if planned is None else planned
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / end)
    after_step = begin(optimizer, schedule) if begin is not None else lambda: None
    losses = []
    start = time.perf_counter()
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        after_step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return losses, time.perf_counter() - start


@torch.no_grad()
def mean_loss(model: nn.Module, examples: Sequence[Encoded]) -> float:
    """The mean over all label tokens of all examples."""
    losses = [token_losses(model, pack(batch)) for batch in evaluation_batches(examples)]
    return torch.cat(losses).double().mean().item()


def finite(loss: float) -> float | None:
    """Five digits; None for a run that diverged."""
    return round(loss, 5) if math.isfinite(loss) else None


def curve(losses: Sequence[float]) -> list[float | None]:
    """Mean training loss of every CURVE_EVERY steps, rounded."""
    parts = [losses[start : start + CURVE_EVERY] for start in range(0, len(losses), CURVE_EVERY)]
    return [finite(round(sum(part) / len(part), 3)) for part in parts]
