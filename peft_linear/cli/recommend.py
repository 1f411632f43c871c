# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`peft-linear recommend`: load, compute, choose, write."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from ..capture.resources import Resources
from ..errors import BudgetError, FileError
from ..files import write_text
from ..integrations.trl_data import require_trl
from ..kernels import ModuleKernels
from ..recommendation.budget import BudgetLike, parse_budget
from ..report.writer import write_report
from ..selection.dry_run import CostEstimate, estimate_cost
from ..selection.exclusion import DEFAULT_EXCLUDE
from ..selection.request import ModuleRequest
from ..selection.training import Training
from ..tuners.proximal_lora import ProximalLoraConfig
from .data import batches_of, collator, load_text_data, sample_rows, tokenize
from .language import batches_as_in_training
from .models import load_model, meta_model, task_of_config
from .sources import Rows


KERNELS_NAME = "kernels.safetensors"
HEAD_NAMES = ("losses_untrained_head.safetensors", "losses_trained_head.safetensors")
ADAPTER_NAME = "adapter"
MAX_LENGTH = 128  # tokens of a classification's texts; language models take TRL's default


def parse_budget_argument(text: str) -> int | float | str:
    """What was typed, as `recommend` takes it.

    "8" is modules, "0.25" and "25%" a fraction, "1.5M" parameters, "layers:4", "time:0.6" and "memory:0.6" what they
    say.

    Raises:
        BudgetError: it reads as none of these.
    """
    text = text.strip()
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?[0-9]*\.[0-9]+", text):
        return float(text)
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?\s*%", text):
        return float(text.rstrip("% ")) / 100
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?\s*[kKmMbB]|[A-Za-z]+:.*", text):
        return text
    raise BudgetError(
        f"cannot read the budget {text[:40]!r}; pass a number of modules (8), a fraction of the candidates' "
        "parameters (0.25, 25%), parameters (1.5M, 200k), layers:4, time:0.6 or memory:0.6"
    )


def parse_budget_arguments(texts: Sequence[str]) -> BudgetLike:
    """One budget, or a tuple of several. Raises as `parse_budget_argument`."""
    budgets = tuple(map(parse_budget_argument, texts))
    return budgets[0] if len(budgets) == 1 else budgets


def run_recommend(arguments: argparse.Namespace) -> None:
    """Runs the subcommand with its parsed arguments.

    Raises:
        PeftLinearError: or a subclass; nothing has been written then.
    """
    budget = parse_budget_arguments(arguments.budget)
    if arguments.dry_run:
        print(dry_run(arguments, budget))
        return
    resources = Resources(max_memory=arguments.max_memory, progress=not arguments.quiet)
    adapter = {"proximal_lambda": arguments.proximal_lambda, "base_model_name_or_path": arguments.model}
    ProximalLoraConfig(**adapter)  # refuses values that are none before anything is loaded
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise FileError(f"{output} exists and is not a folder; pass another --output")
    if arguments.quiet:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    data = load_text_data(arguments.dataset, arguments.task, arguments.text_column, arguments.label_column)
    language = data.task == "causal-lm"
    adapter["task_type"] = "CAUSAL_LM" if language else "SEQ_CLS"
    if language:
        require_trl()
        rows = data.rows(arguments.split)
    else:
        rows = sample_rows(data, arguments.examples, arguments.split, arguments.seed)
    request = _request(arguments, budget, data.task, resources)
    model, tokenizer = load_model(
        arguments.model, data.task, data.label_names, arguments.seed, arguments.device, arguments.dtype
    )
    request.candidates(model)
    if language:
        batches = _language_batches(arguments, rows, data.text_columns, tokenizer)
    else:
        features = tokenize(data, rows, tokenizer, arguments.max_length or MAX_LENGTH)
        batches = batches_of(features, collator(data, tokenizer), arguments.batch_size)
    computed: tuple[ModuleKernels, ...] = ()  # a language model's decision needs none
    if request.is_for_language(model):
        recommendation = request.recommend(model, batches)
    else:
        kernels, heads = request.compute_kernels(model, batches)
        recommendation = request.choose(kernels, heads)
        computed = (kernels, *heads)
    config = recommendation.to_config(**adapter)
    tool_file = None if arguments.yaml is None else recommendation.to_yaml(arguments.yaml)
    for name, saved in zip((KERNELS_NAME, *HEAD_NAMES), computed, strict=False):
        saved.save(output / name)
    written = write_report(recommendation, output)
    if tool_file is not None:
        written = (*written, output / f"{arguments.yaml}.yaml")
        write_text(written[-1], tool_file)
    config.save_pretrained(str(output / ADAPTER_NAME))
    if not arguments.quiet:
        print(recommendation)
        names = [*(path.name for path in written), *([KERNELS_NAME] if computed else [])]
        print(f"\nwritten to {output}: {', '.join(names)}, {ADAPTER_NAME}/")
        print(
            f"next: config = PeftConfig.from_pretrained({str(output / ADAPTER_NAME)!r}); "
            "model = get_peft_model(model, config)"
        )


def _language_batches(
    arguments: argparse.Namespace, rows: Rows, columns: tuple[str, ...], tokenizer: Any
) -> list[dict[str, Any]]:
    return batches_as_in_training(
        rows,
        columns,
        tokenizer,
        examples=arguments.examples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        max_length=arguments.max_length,
        assistant_only_loss=arguments.assistant_only_loss or None,
    )


def dry_run(arguments: argparse.Namespace, budget: BudgetLike) -> CostEstimate:
    """The estimate for a step of --train-batch-size texts of --max-length tokens, from the model's configuration.

    Raises:
        PeftLinearError: as `estimate_cost`, or a budget that no module fits.
    """
    task = task_of_config(arguments.model) if arguments.task == "auto" else arguments.task
    model = meta_model(arguments.model, task)
    request = _request(arguments, budget, task, Resources())
    sizes = request.candidates(model)
    shape = (arguments.train_batch_size, arguments.max_length or MAX_LENGTH)
    estimate = estimate_cost(model, shape, arguments.examples, **request.kernels)
    parse_budget(budget, sizes, estimate.rank, estimate.step)
    return estimate


def _request(arguments: argparse.Namespace, budget: BudgetLike, task: str, resources: Resources) -> ModuleRequest:
    kernels: dict[str, Any] = {
        "targets": arguments.targets[0] if arguments.targets == ["all-linear"] else arguments.targets,
        "space": arguments.space,
        "rank": arguments.rank,
        "lora_alpha": arguments.alpha,
    }
    if task != "causal-lm":
        kernels["outputs"] = "logits"
    if arguments.draws is not None:
        kernels["draws"] = arguments.draws
    return ModuleRequest(
        budget=budget,
        criterion=arguments.criterion,
        ridge=arguments.ridge,
        strategy=arguments.strategy,
        seed=arguments.seed,
        head_steps=arguments.head_steps,
        exclude=DEFAULT_EXCLUDE if arguments.exclude is None else arguments.exclude,
        training=Training(optimizer=arguments.optimizer, batch_size=arguments.train_batch_size),
        kernels=kernels,
        resources=resources,
    )
