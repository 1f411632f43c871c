# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a LoRA training step takes, in time and memory, for any set of modules and ranks: plain counts, no model.

The counts are those of `capture.step_cost`. An operation of the backward pass, and a tensor that is kept for it, is
needed if and only if some adapted module lies below it. So with S the modules of positive rank and R_i the modules
below operation i

    time(S)   = forward + Σ_i [S ∩ R_i ≠ ∅] work_i + Σ_{m∈S} (work of the adapter of m at its rank)
    memory(S) = weights + Σ_j [S ∩ R_j ≠ ∅] bytes_j + Σ_{m∈S} (bytes of the adapter of m at its rank).

Both grow with the set and with every rank. The backward pass ends at the lowest adapted module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from ..errors import BudgetError, TargetError
from .names import parse_name


RECORD = "step_cost"  # the key of the counts in the provenance of kernels
OUTSIDE = -1  # the block of what lies in no layer
FLOAT32 = 4  # bytes of a number of an adapter, its gradient and its optimizer states
STATES = 4  # of an adapter weight: itself, its gradient, Adam's two moments
# An optimizer step reads and writes weight, gradient and moments several times, in separate calls a tensor.
OPTIMIZER_BYTES, OPTIMIZER_CALLS = 60, 14


@dataclass(frozen=True)
class Work:
    """Multiplications and additions of matrix products, bytes that other operations move, and calls."""

    flops: float = 0.0
    moved: float = 0.0  # bytes
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved, self.calls + other.calls)


Part = TypeVar("Part", Work, float)


@dataclass(frozen=True)
class Machine:
    """How long a moved byte and a call take, in flops of a large matrix product."""

    flops_per_byte: float
    flops_per_call: float

    def time(self, work: Work) -> float:
        return work.flops + self.flops_per_byte * work.moved + self.flops_per_call * work.calls


# "cpu" is fitted to measured steps of one model on one core (docs/how-to/choose_by_time_or_memory.md); "cuda" follows
# the data sheets of GPUs with 16-bit products (about 200 flops a byte of memory, 5 µs a call) and is not measured.
MACHINES = {"cpu": Machine(4.0, 2e5), "cuda": Machine(200.0, 1e9)}


PACKED = 3  # times a product with one short side moves its long one: read, copied into blocks, read again


def _passes(rank: int) -> int:
    return 1 if rank == 1 else PACKED  # one column needs no blocks


@dataclass(frozen=True)
class StepModule:
    """A module that can be adapted, in the order of the forward pass."""

    name: str
    d_in: int
    d_out: int
    positions: int  # inputs of the batch, tokens in most models
    item_bytes: int  # of a number of its input
    block: int  # number of the layer that checkpointing computes again; -1: none
    input: int  # modules with the same number have the same input, as queries, keys and values
    below: int  # a bit for every module that its input depends on
    all_linear: bool

    @property
    def kind(self) -> str:
        return parse_name(self.name).kind

    @property
    def layer(self) -> int | None:
        return parse_name(self.name).layer

    def parameters(self, rank: int) -> int:
        return rank * (self.d_in + self.d_out)

    def forward(self, rank: int) -> Work:
        """Of an adapter in the forward pass: x Aᵀ, its product with Bᵀ, scaled and added to the output."""
        narrow, wide = self.positions * self.d_in, self.positions * self.d_out
        moved = _passes(rank) * (narrow + wide) + 5 * wide
        cast = (narrow + wide) * (FLOAT32 + self.item_bytes) if self.item_bytes < FLOAT32 else 0
        return Work(2 * rank * (narrow + wide), max(FLOAT32, self.item_bytes) * moved + cast, 6)

    def work(self, rank: int, passes_on: bool) -> Work:
        """Of an adapter in a whole step: forward, backward, and its share of the optimizer step.

        Args:
            passes_on: Whether the gradient goes on to the module's input.
        """
        narrow, wide = self.positions * self.d_in, self.positions * self.d_out
        flops = 2 * rank * (narrow + 2 * wide + (narrow if passes_on else 0))
        moved = _passes(rank) * (narrow + 2 * wide) + 2 * wide
        if passes_on:
            moved += (_passes(rank) + 3) * narrow
        backward = Work(flops, max(FLOAT32, self.item_bytes) * moved, 8 if passes_on else 6)
        optimizer = Work(0.0, OPTIMIZER_BYTES * self.parameters(rank), 2 * OPTIMIZER_CALLS)
        return self.forward(rank) + backward + optimizer

    def kept(self, rank: int) -> int:
        """Bytes that the adapter keeps for the backward pass, beside an input that it shares with others."""
        own_input = self.d_in if self.item_bytes < FLOAT32 else 0
        return max(FLOAT32, self.item_bytes) * self.positions * (rank + own_input)


@dataclass(frozen=True)
class StepCost:
    """Counts of one training step; `time`, `memory` and the shares of an all-linear LoRA step for {module: rank}.

    Args:
        modules: That can be adapted, in the order of the forward pass.
        forward: {block: work} of the frozen model.
        backward: (block, reach, work): needed if an adapted module is in the reach.
        kept: (block, reach, bytes): likewise.
        block_inputs: {block: bytes} of its first input, which checkpointing keeps.
        weights: Bytes of the model's parameters and buffers.
        trained: Parameters that are trained with every set (a task head).
        checkpointing: Whether layers are computed again in the backward pass instead of kept.
        machine: How fast what kind of work is.
    """

    modules: tuple[StepModule, ...]
    forward: Mapping[int, Work]
    backward: tuple[tuple[int, int, Work], ...]
    kept: tuple[tuple[int, int, int], ...]
    block_inputs: Mapping[int, int]
    weights: int
    trained: int = 0
    checkpointing: bool = False
    machine: Machine = field(default_factory=lambda: MACHINES["cpu"])

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> StepCost:
        """From what `capture.step_cost.step_record` counted."""
        return cls(
            modules=tuple(StepModule(**{**each, "below": _bits(each["below"])}) for each in record["modules"]),
            forward={block: Work(*work) for block, *work in record["forward"]},
            backward=tuple((block, _bits(reach), Work(*work)) for block, reach, *work in record["backward"]),
            kept=tuple((block, _bits(reach), size) for block, reach, size in record["kept"]),
            block_inputs=dict(map(tuple, record["block_inputs"])),
            weights=record["weights"],
            trained=record["trained"],
            checkpointing=record["checkpointing"],
            machine=MACHINES.get(record["device"], MACHINES["cpu"]),
        )

    @classmethod
    def of_kernels(cls, provenance: Mapping[str, Any]) -> StepCost:
        """From the provenance of kernels.

        Raises:
            BudgetError: it has no counts.
        """
        record = provenance.get(RECORD)
        if not isinstance(record, Mapping):
            raise BudgetError(
                "a budget of time, memory or layers needs the counts of a training step, which these kernels do not "
                "have: they were computed by an earlier version; compute them again"
            )
        if "error" in record:
            raise BudgetError(f"a budget of time or memory cannot be kept: {record['error']}")
        return cls.from_record(record)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """{module: its place in the forward pass}."""
        return {module.name: place for place, module in enumerate(self.modules)}

    def all_linear(self, rank: int) -> dict[str, int]:
        """Every linear layer that peft adapts, at one rank: what shares are relative to."""
        return {module.name: rank for module in self.modules if module.all_linear}

    def work(self, ranks: Mapping[str, int]) -> Work:
        """Of one step in which these modules have adapters of these ranks.

        Raises:
            TargetError: a module that has no counts.
        """
        head = Work(0.0, self._head_bytes, 0.0)
        return sum(self._parts(ranks, self.forward, self.backward, StepModule.work, StepModule.forward), head)

    def time(self, ranks: Mapping[str, int]) -> float:
        """Of one step, in flops of a large matrix product. Raises as `work`."""

        def of_adapter(module: StepModule, rank: int, passes_on: bool) -> float:
            key = (module.name, rank, passes_on)
            if key not in self._adapter_times:
                self._adapter_times[key] = self.machine.time(module.work(rank, passes_on))
            return self._adapter_times[key]

        def again(module: StepModule, rank: int) -> float:
            return self.machine.time(module.forward(rank))

        head = self.machine.flops_per_byte * self._head_bytes
        return sum(self._parts(ranks, self._forward_times, self._backward_times, of_adapter, again), head)

    def _parts(
        self,
        ranks: Mapping[str, int],
        forward: Mapping[int, Part],
        backward: Iterable[tuple[int, int, Part]],
        of_adapter: Callable[[StepModule, int, bool], Part],
        of_adapter_again: Callable[[StepModule, int], Part],
    ) -> Iterator[Part]:
        """What a step consists of; with checkpointing, forward passes of layers that a gradient enters come twice."""
        reached = self._reached(ranks)
        yield from forward.values()
        again: set[int] = set()
        for block, reach, part in backward:
            if reach & reached:
                yield part
                again.add(block)
        for module, rank in self._adapted(ranks):
            yield of_adapter(module, rank, bool(module.below & reached))
            again.add(module.block)
            if self.checkpointing and module.block != OUTSIDE:
                yield of_adapter_again(module, rank)
        if self.checkpointing:
            yield from (forward[block] for block in again if block in forward and block != OUTSIDE)

    @property
    def _head_bytes(self) -> float:
        return float(OPTIMIZER_BYTES * self.trained)

    @cached_property
    def _adapter_times(self) -> dict[tuple[str, int, bool], float]:
        return {}

    @cached_property
    def _forward_times(self) -> Mapping[int, float]:
        return {block: self.machine.time(work) for block, work in self.forward.items()}

    @cached_property
    def _backward_times(self) -> tuple[tuple[int, int, float], ...]:
        return tuple((block, reach, self.machine.time(work)) for block, reach, work in self.backward)

    def activations(self, ranks: Mapping[str, int]) -> float:
        """Bytes that are kept for the backward pass. Raises as `work`."""
        reached = self._reached(ranks)
        sizes: dict[int, float] = dict.fromkeys([OUTSIDE, *self.block_inputs], 0.0)
        for block, reach, size in self.kept:
            if reach & reached:
                sizes[block] = sizes.get(block, 0.0) + size
        for module, rank in self._adapted(ranks):
            sizes[module.block] = sizes.get(module.block, 0.0) + module.kept(rank)
        outside = sizes.pop(OUTSIDE)
        if not self.checkpointing:
            return outside + sum(sizes.values())
        inputs = sum(self.block_inputs.get(block, 0) for block, size in sizes.items() if size)
        return outside + inputs + max(sizes.values(), default=0.0)

    def memory(self, ranks: Mapping[str, int]) -> float:
        """Bytes: weights, kept activations, and adapters with gradients and AdamW's states. Raises as `work`."""
        adapters = sum(module.parameters(rank) for module, rank in self._adapted(ranks))
        return self.weights + self.activations(ranks) + FLOAT32 * (STATES * adapters + (STATES - 1) * self.trained)

    def time_share(self, ranks: Mapping[str, int], rank: int) -> float:
        """Of an all-linear LoRA step at `rank`."""
        return self.time(ranks) / self.time(self.all_linear(rank))

    def memory_share(self, ranks: Mapping[str, int], rank: int) -> float:
        """Of an all-linear LoRA step at `rank`."""
        return self.memory(ranks) / self.memory(self.all_linear(rank))

    def with_checkpointing(self, checkpointing: bool = True) -> StepCost:
        """The same step with or without gradient checkpointing of whole layers."""
        return replace(self, checkpointing=checkpointing)

    def place(self, name: str) -> int:
        """Of a module in the forward pass. Raises TargetError where it has no counts."""
        if name not in self.index:
            raise TargetError(f"there are no counts of a training step for {name!r}; compute the kernels again")
        return self.index[name]

    def _adapted(self, ranks: Mapping[str, int]) -> Iterable[tuple[StepModule, int]]:
        return ((self.modules[self.place(name)], rank) for name, rank in ranks.items() if rank > 0)

    def _reached(self, ranks: Mapping[str, int]) -> int:
        """The bits of the adapted modules, and the lowest, of what is trained always."""
        reached = 1
        for name, rank in ranks.items():
            if rank > 0:
                reached |= 2 << self.place(name)
        return reached


def _bits(ranges: Iterable[Iterable[int]]) -> int:
    """A bit for every number of the ranges, from -1 ("always") on."""
    bits = 0
    for first, last in ranges:
        bits |= (1 << (last + 2)) - (1 << (first + 1))
    return bits
