# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The runs of the forgetting benchmark: one base model, many ways to regularise an adapter.

Every arm is a path with one parameter from the plain LoRA run toward the base model: a value of the parameter is a
point of the path. Within a seed all runs have the same data in the same order and the same initial A.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from typing import Protocol as Interface

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from examples.common.training import trained_parameters, weight_distance
from peft_linear import ProximalLoraConfig
from peft_linear.proximal import proximal_firing_rate


LORA = "lora"  # the run that all paths start from
BASE = "base"  # the model before training
EARLY_STOPPING, SCALED = "early_stopping", "scaled_down"  # derived from the LoRA run, without training


@dataclass(frozen=True)
class Measure:
    """A number that forgetting moves: forgetting is `sign` times its change from the base model."""

    key: str
    words: str
    sign: int


@dataclass(frozen=True)
class Protocol:
    """How every run is trained."""

    steps: int
    batch_size: int
    learning_rate: float  # at the start, from where it falls linearly to zero
    rank: int = 8
    lora_alpha: int = 16

    @property
    def sum_of_rates(self) -> float:
        """Σ_t η_t of the plain LoRA run."""
        return self.learning_rate * (self.steps + 1) / 2


class Setting(Interface):
    """A base model with something to learn, and something to forget."""

    key: str
    title: str
    target: str
    measures: tuple[Measure, ...]
    lora: dict[str, Any]
    protocol: Protocol

    def new_model(self, seed: int) -> nn.Module: ...
    def batches(self, seed: int) -> Iterator[Any]: ...
    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...
    def evaluate(self, model: nn.Module, seed: int, split: str = "test") -> dict[str, float]: ...


@dataclass(frozen=True)
class Treatment:
    """Differences of one run from plain LoRA."""

    learning_rate: float = 1.0  # times the protocol's
    lora_alpha: float = 1.0  # times the protocol's
    weight_decay: float = 0.0
    proximal: Mapping[str, Any] = field(default_factory=dict)  # fields of ProximalLoraConfig


@dataclass(frozen=True)
class Arm:
    """A path with one parameter. `unit`: "inverse_rates" means that values are multiples of 1/Σ_t η_t."""

    key: str
    words: str
    grid: Mapping[str, tuple[float, ...]]  # by setting; from hardly regularised to strongly
    parameter: str = ""  # a field of Treatment; with `proximal`, its strength
    proximal: Mapping[str, Any] | None = None
    inverse_rates: bool = False
    ends_at_base: bool = True  # whether the path reaches the base model at its limit
    start: tuple[str, float] | None = None  # arm and value whose adapter is scaled down; default: the LoRA run

    @property
    def ours(self) -> bool:
        return self.key.startswith("proximal_")

    @property
    def trained(self) -> bool:
        return bool(self.parameter) or self.proximal is not None

    def strength(self, value: float, protocol: Protocol) -> float:
        """The parameter as the optimizer or the config takes it."""
        return value / protocol.sum_of_rates if self.inverse_rates else value

    def treatment(self, value: float, protocol: Protocol) -> Treatment:
        strength = self.strength(value, protocol)
        if self.proximal is not None:
            return Treatment(proximal={"proximal_lambda": strength, **self.proximal})
        return Treatment(**{self.parameter: strength})


@dataclass(frozen=True)
class Run:
    """One point of one path, of one seed."""

    setting: str
    arm: str
    value: float
    seed: int
    metrics: Mapping[str, float]
    distance: float  # ‖ΔW‖_F over all adapted weights
    firing_rate: float | None
    seconds: float  # of training; 0 for what was derived from another run
    protocol: Mapping[str, float]


def with_adapter(setting: Setting, seed: int, treatment: Treatment) -> PeftModel:
    protocol = setting.protocol
    shared: dict[str, Any] = {
        "r": protocol.rank,
        "lora_alpha": protocol.lora_alpha * treatment.lora_alpha,
        **setting.lora,
    }
    model = setting.new_model(seed)
    torch.manual_seed(seed)
    config = ProximalLoraConfig(**shared, **treatment.proximal) if treatment.proximal else LoraConfig(**shared)
    return get_peft_model(model, config).eval()  # no dropout: runs of a seed differ by their treatment alone


def train(setting: Setting, seed: int, treatment: Treatment) -> Iterator[tuple[int, PeftModel]]:
    """Trains, and yields the steps taken and the model after each step."""
    protocol = setting.protocol
    model = with_adapter(setting, seed, treatment)
    rate = protocol.learning_rate * treatment.learning_rate
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=rate, weight_decay=treatment.weight_decay)
    batches = setting.batches(seed)
    for step in range(protocol.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / protocol.steps)
        optimizer.zero_grad()
        setting.loss(model, next(batches)).backward()
        optimizer.step()
        yield step + 1, model


def trained_runs(setting: Setting, arm: Arm, value: float, seed: int, scaling: Sequence[Arm] = ()) -> list[Run]:
    """One training run of an arm, and its adapter scaled down by the arms `scaling`."""
    start = time.perf_counter()
    for _, last in train(setting, seed, arm.treatment(value, setting.protocol)):
        model = last
    runs = [_measured(setting, arm.key, value, seed, model, time.perf_counter() - start)]
    return runs + _scaled_runs(setting, scaling, seed, model)


def _scaled_runs(setting: Setting, arms: Sequence[Arm], seed: int, model: PeftModel) -> list[Run]:
    runs = []
    for arm in arms:
        for factor in arm.grid[setting.key]:
            with scaled(model, factor):
                runs.append(_measured(setting, arm.key, factor, seed, model, 0.0))
    return runs


def reference_runs(setting: Setting, arms: Sequence[Arm], seed: int) -> list[Run]:
    """The base model, the plain LoRA run, and what is derived from it: early stopping, and the adapter scaled down."""
    parts = [part for arm in arms if arm.key == EARLY_STOPPING for part in arm.grid[setting.key]]
    stops = [(max(1, round(part * setting.protocol.steps)), part) for part in parts]
    runs, seconds, start = [], 0.0, time.perf_counter()
    for step, model in train(setting, seed, Treatment()):
        seconds += time.perf_counter() - start
        runs += [_measured(setting, EARLY_STOPPING, part, seed, model, 0.0) for stop, part in stops if stop == step]
        start = time.perf_counter()
    runs.append(_measured(setting, LORA, 1.0, seed, model, seconds))
    runs += _scaled_runs(setting, [arm for arm in arms if arm.key == SCALED], seed, model)
    with scaled(model, 0.0):
        return [*runs, _measured(setting, BASE, 0.0, seed, model, 0.0)]


def _measured(setting: Setting, arm: str, value: float, seed: int, model: PeftModel, seconds: float) -> Run:
    config = model.peft_config["default"]
    pulled = isinstance(config, ProximalLoraConfig) and config.proximal_lambda > 0
    return Run(
        setting=setting.key,
        arm=arm,
        value=value,
        seed=seed,
        metrics={name: round(number, 7) for name, number in setting.evaluate(model, seed).items()},
        distance=round(weight_distance(model), 6),
        firing_rate=proximal_firing_rate(model) if pulled else None,
        seconds=round(seconds, 3),
        protocol=asdict(setting.protocol),
    )


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """The adapter's contribution times `factor`."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: factor * value for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
