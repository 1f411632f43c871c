# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Factors that are sharded over processes by FSDP2's `fully_shard`: DTensors, and sums over their shards.

In factor space the proximal term is elementwise, so each process applies it to its own shard; only inner products and
norms are summed over the processes, a few numbers per step. In delta space the factors are gathered: they are small.
Everything here is a collective operation if a tensor is sharded: all ranks must call it. Tensors that are not sharded
are passed through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_supported(tensor: Tensor) -> bool:
    """Whether it is a plain tensor, or a DTensor whose placements are all `Shard` or `Replicate`."""
    if not is_sharded(tensor):
        return not hasattr(tensor, "device_mesh")
    return all(type(placement).__name__ in ("Shard", "Replicate") for placement in _placements(tensor))


def local_part(tensor: Tensor) -> Tensor:
    """The shard of the tensor on this process, in the tensor's own memory. To be called under `no_grad`."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or the gathered copy of a sharded one."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """The whole of the tensor of which `part` is this process's shard, sharded as `like` is."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor  # not in builds without distributed

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    shards = DTensor.from_local(part, mesh, _placements(like), shape=like.shape, stride=like.stride())
    return shards.full_tensor()


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """The part of `full` that corresponds to the local shard of `like`: a view."""
    if not is_sharded(like) or is_sharded(full):
        return local_part(full)
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    for axis, placement in enumerate(_placements(like)):
        if placement.is_shard():
            parts, rank = torch.chunk(full, mesh.size(axis), dim=placement.dim), mesh.get_local_rank(axis)
            full = parts[rank] if rank < len(parts) else full.narrow(placement.dim, 0, 0)
    return full


def added(tensor: Tensor, part: Tensor) -> Tensor:
    """A new tensor, sharded as `tensor`: the sum of `tensor` and, on this process's shard, `part`."""
    if not is_sharded(tensor):
        return tensor + part.to(tensor)
    result = tensor.clone()
    local_part(result).add_(part.to(result.dtype))
    return result


def totals(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """One scalar per tensor, computed from its local shard, summed over the processes that hold its other shards."""
    result = list(values)
    for layout, members in _by_layout(tensors):
        if layout is None:
            continue
        summed = _all_reduce(torch.stack([values[i] for i in members]), layout)
        for i, value in zip(members, summed, strict=True):
            result[i] = value
    return result


def total(tensors: Sequence[Tensor], partial: Callable[[list[int]], Tensor]) -> Tensor:
    """A sum over `tensors`; `partial(positions)` gives the sum over the local shards of the tensors at `positions`."""
    sums = []
    for layout, members in _by_layout(tensors):
        value = partial(members)
        sums.append(value if layout is None else _all_reduce(value, layout))
    return sums[0] if len(sums) == 1 else torch.stack([value.to(sums[0].device) for value in sums]).sum()


def _placements(tensor: Tensor) -> Any:
    return tensor.placements  # type: ignore[attr-defined]


def _by_layout(tensors: Sequence[Tensor]) -> list[tuple[Any, list[int]]]:
    """Positions of the tensors that are sharded over the same processes, in the same order on every process."""
    groups: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        axes = [axis for axis, p in enumerate(_placements(tensor)) if p.is_shard()] if is_sharded(tensor) else []
        layout = (tensor.device_mesh, tuple(axes)) if axes else None  # type: ignore[attr-defined]
        groups.setdefault(layout, []).append(index)
    return list(groups.items()) or [(None, [])]


def _all_reduce(value: Tensor, layout: Any) -> Tensor:
    mesh, axes = layout
    for axis in axes:
        torch.distributed.all_reduce(value, group=mesh.get_group(axis))
    return value
