# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a module's kernel is made of, for each space: pairs of maps that turn the layer's own input h and cotangent δ
into the h and δ of a weight-like Gram matrix (see `functional.gram`). A module's kernel is the sum over its terms.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import PeftLinearError, TargetError
from .targets import linear_shape, require_plain_lora


Space = Literal["lora", "weight", "rows", "columns", "bias"]
SPACES: tuple[Space, ...] = ("lora", "weight", "rows", "columns", "bias")

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """`inputs`: (N, T, d_in) → (N, T, k); `cotangents`: (N, T, d_out) → (N, T, l); a Jacobian row has k·l numbers.

    Where there is a `matrix` (k, d_in) float64, the features are h·matrixᵀ, and `inputs` is not used.
    With `draws` > 1 the k features are that many equal slices, one a draw of A, and the kernel is the mean over them.
    Where they are `nested`, the first r features of each draw are, but for its scaling, those of an adapter of rank r.
    """

    inputs: Map
    cotangents: Map
    features: int  # k
    channels: int  # l
    draws: int = 1
    matrix: Tensor | None = None
    nested: bool = False


def module_terms(
    name: str,
    module: nn.Module,
    space: Space,
    rank: int,
    lora_alpha: float,
    draws: int,
    seed: int,
) -> tuple[list[Term], int]:
    """The terms of one module and the number of parameters an adapter of this kind trains in it.

    The kernel of the whole weight says where a LoRA adapter belongs whatever its random A: its count is LoRA's.

    A LoRA layer with an active adapter brings its own A, B and scaling to space="lora" (both factors count where
    B ≠ 0); `rank`, `lora_alpha`, `draws` and `seed` then do not apply to it.
    """
    shape = linear_shape(module)
    if shape is None:
        raise TargetError(f"{name} ({type(module).__name__}) is no linear map")
    d_in, d_out = shape
    if space == "lora":
        adapter = require_plain_lora(name, module) if isinstance(module, LoraLayer) else None
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            raise TargetError(f'{name} already carries a {type(module).__name__}, not LoRA; use space="weight"')
        if adapter is not None:
            return _existing_lora(module, adapter, d_in, d_out)  # type: ignore[arg-type]
        stacked = torch.cat([initial_lora_a(name, d_in, rank, seed, draw) for draw in range(draws)])
        a = stacked * (lora_alpha / rank)
        term = Term(_same, _same, features=rank * draws, channels=d_out, draws=draws, matrix=a, nested=True)
        return [term], rank * (d_in + d_out)
    if space == "weight":
        return [Term(_same, _same, features=d_in, channels=d_out)], rank * (d_in + d_out)
    if space == "rows":
        count = _at_most(rank, d_out, name, "rows")
        return [Term(_same, lambda x: x[..., :count], features=d_in, channels=count)], count * d_in
    if space == "columns":
        count = _at_most(rank, d_in, name, "columns")
        return [Term(lambda x: x[..., :count], _same, features=count, channels=d_out)], count * d_out
    return [bias_term(d_out)], d_out


def linear_parameter_terms(module: nn.Module) -> list[Term]:
    """Terms of a linear map that is trained in full: its weight, and its bias where it has one."""
    d_in, d_out = linear_shape(module)  # type: ignore[misc]
    terms = [Term(_same, _same, features=d_in, channels=d_out)]
    return [*terms, bias_term(d_out)] if module.bias is not None else terms


def bias_term(d_out: int) -> Term:
    return Term(lambda x: x.new_ones(*x.shape[:-1], 1), _same, features=1, channels=d_out)


def formed_rows_term(parameters: Sequence[nn.Parameter]) -> Term:
    """Of parameters that belong to no linear map: their Jacobian rows come as they are, (B·C, P, 1)."""
    return Term(_same, _same, features=sum(parameter.numel() for parameter in parameters), channels=1)


def initial_lora_a(
    name: str,
    d_in: int,
    rank: int,
    seed: int = 0,
    draw: int = 0,
) -> Tensor:  # (rank, d_in) float64
    """A as peft initialises it (Kaiming-uniform with a=√5: uniform on ±1/√d_in, variance 1/(3·d_in)).

    The numbers depend on `name`, `seed` and `draw` alone, so that a module's block does not change with the company
    it is computed in, and they leave the global random state untouched. They are rounded to float32, as peft's are.
    Row by row, they do not depend on `rank`: A of a lower rank is the first rows of this one.
    """
    digest = hashlib.sha256(f"{name}\0{seed}\0{draw}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    uniform = torch.rand(rank, d_in, generator=generator, dtype=torch.float32)
    return ((uniform * 2 - 1) / math.sqrt(d_in)).to(torch.float64)


def check_adapter_arguments(space: str, rank: int, lora_alpha: float, draws: int) -> None:
    """Raises PeftLinearError for arguments that describe no adapter."""
    if space not in SPACES:
        raise PeftLinearError(f"space must be one of {', '.join(map(repr, SPACES))}, got {space!r}")
    if not isinstance(rank, int) or rank <= 0:
        raise PeftLinearError(f"rank must be a positive integer, got {rank!r}")
    if not lora_alpha > 0 or not math.isfinite(lora_alpha):
        raise PeftLinearError(f"lora_alpha must be a positive number, got {lora_alpha!r}")
    if not isinstance(draws, int) or draws <= 0:
        raise PeftLinearError(f"draws must be a positive integer, got {draws!r}")
    if draws > 1 and space != "lora":
        raise PeftLinearError(f'draws={draws} are draws of LoRA\'s A and need space="lora", got space={space!r}')


def _existing_lora(layer: LoraLayer, adapter: str, d_in: int, d_out: int) -> tuple[list[Term], int]:
    scaling = float(layer.scaling[adapter])
    a, b = (scaling * _weight(factor[adapter]) for factor in (layer.lora_A, layer.lora_B))
    rank = a.shape[0]
    terms = [Term(_same, _same, features=rank, channels=d_out, matrix=a)]
    if b.any():
        terms.append(Term(_same, _linear(b.T), features=d_in, channels=rank))
    return terms, sum(p.numel() for p in (*layer.lora_A[adapter].parameters(), *layer.lora_B[adapter].parameters()))


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight).detach().to(torch.float64)


def _linear(matrix: Tensor) -> Map:
    """x → x·matrixᵀ in x's dtype and on its device; the matrix is converted once for each."""
    cache: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def apply(x: Tensor) -> Tensor:
        key = (x.dtype, x.device)
        if key not in cache:
            cache[key] = matrix.to(device=x.device, dtype=x.dtype).T
        return x @ cache[key]

    return apply


def _same(x: Tensor) -> Tensor:
    return x


def _at_most(rank: int, size: int, name: str, what: str) -> int:
    if rank > size:
        raise TargetError(f"{name} has {size} {what}, fewer than rank={rank}; pass a lower rank")
    return rank
