# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The spaces: ways to parametrise the change of a layer, each by one or two matrices of parameters.

The Jacobian of such a matrix has the form `Σ_t h'_t ⊗ δ'_t` (see `functional.gram`), h' and δ' made of the layer's own
input h and cotangent δ. The kernel of a module is the sum over its matrices.

| space | the change of W | matrices | h' | δ' |
|---|---|---|---|---|
| lora | (lora_alpha/rank)·BA, A random | B (where B ≠ 0 A too) | s·A h | δ (s·h, Bᵀδ) |
| weight | any | W | h | δ |
| rows | of the first `rank` rows | those rows | h | δ of those rows |
| columns | of the first `rank` columns | those columns | h of those columns | δ |
| bias | none: of the bias | b | 1 | δ |
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import PeftLinearError, TargetError
from .layers import Layer, layer_of
from .targets import require_plain_lora


Space = Literal["lora", "weight", "rows", "columns", "bias"]
SPACES: tuple[Space, ...] = ("lora", "weight", "rows", "columns", "bias")

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ParameterMatrix:
    """`inputs`: h (N, T, d_in) → h' (N, T, k); `cotangents`: δ (N, T, d_out) → δ' (N, T, l); a row has k·l numbers.

    Where there is a `projection` (k, d_in) float64, h' is h·projectionᵀ, and `inputs` is not used.
    With `draws` > 1 the k features are that many equal slices, one a draw of A, and the kernel is the mean over them.
    Where they are `nested`, the first r features of each draw are, but for its scaling, those of an adapter of rank r.
    """

    inputs: Map
    cotangents: Map
    features: int  # k
    channels: int  # l
    draws: int = 1
    projection: Tensor | None = None
    nested: bool = False
    parameter: nn.Parameter | None = None  # the one that trains, where it is there already
    of_gradient: Map | None = None  # takes a gradient of that parameter to (k, l)


def place_of(layer: Layer, space: Space) -> Literal["around", "module", "base"]:
    """Where the change of a layer acts; see `Layer.attach`."""
    if space != "lora":
        return "base"
    return "around" if _active_adapter(layer) is None else "module"


def space_matrices(
    layer: Layer, space: Space, rank: int, lora_alpha: float, draws: int, seed: int
) -> list[ParameterMatrix]:
    """The matrices that parametrise the change of a layer.

    A LoRA layer with an active adapter brings its own A, B and scaling to space="lora" (both factors count where
    B ≠ 0); `rank`, `lora_alpha`, `draws` and `seed` then do not apply to it.

    Raises:
        TargetError: the layer is smaller than `rank` (rows, columns), its weight is a parametrization, or it carries
            an adapter that is not plain LoRA.
    """
    d_in, d_out = layer.shape
    if space == "lora":
        if _active_adapter(layer) is not None:
            return _existing_lora(layer)
        stacked = torch.cat([initial_lora_a(layer.name, d_in, rank, seed, draw) for draw in range(draws)])
        a = stacked * (lora_alpha / rank)
        return [ParameterMatrix(_same, _same, rank * draws, d_out, draws=draws, projection=a, nested=True)]
    _check_own(layer, "bias" if space == "bias" else "weight")
    weight = _own_weight(layer)
    if space == "weight":
        return [ParameterMatrix(_same, _same, d_in, d_out, parameter=weight, of_gradient=_transposed(layer))]
    if space == "rows":
        count = _at_most(rank, d_out, layer.name, "rows")
        of_rows = _transposed(layer, columns=count)
        return [ParameterMatrix(_same, _first(count), d_in, count, parameter=weight, of_gradient=of_rows)]
    if space == "columns":
        count = _at_most(rank, d_in, layer.name, "columns")
        of_columns = _transposed(layer, rows=count)
        return [ParameterMatrix(_first(count), _same, count, d_out, parameter=weight, of_gradient=of_columns)]
    return [_bias_matrix(layer)]


def count_parameters(layer: Layer, space: Space, rank: int) -> int:
    """How many parameters an adapter of this kind trains in a layer; an adapter that is there keeps its own number.

    space="weight" says where a LoRA adapter belongs independently of its random A: its count is LoRA's.

    Raises:
        TargetError: as `space_matrices`.
    """
    d_in, d_out = layer.shape
    adapter = _active_adapter(layer) if space == "lora" else None
    if adapter is not None:
        factors: tuple[nn.Module, ...] = (layer.module.lora_A[adapter], layer.module.lora_B[adapter])  # type: ignore
        return sum(parameter.numel() for factor in factors for parameter in factor.parameters())
    if space == "rows":
        return _at_most(rank, d_out, layer.name, "rows") * d_in
    if space == "columns":
        return _at_most(rank, d_in, layer.name, "columns") * d_out
    return d_out if space == "bias" else rank * (d_in + d_out)


def full_matrices(layer: Layer) -> list[ParameterMatrix]:
    """Those of a layer that is trained in full: its weight, and its bias where it has one."""
    d_in, d_out = layer.shape
    of_weight = _transposed(layer)
    weight = ParameterMatrix(_same, _same, d_in, d_out, parameter=layer.weight, of_gradient=of_weight)
    return [weight] if layer.bias is None else [weight, _bias_matrix(layer)]


def formed_rows(parameters: Sequence[nn.Parameter]) -> ParameterMatrix:
    """Of parameters that belong to no layer: their Jacobian rows come as they are, (B·C, P, 1)."""
    return ParameterMatrix(_same, _same, sum(parameter.numel() for parameter in parameters), 1)


def initial_lora_a(
    name: str,
    d_in: int,
    rank: int,
    seed: int = 0,
    draw: int = 0,
) -> Tensor:  # (rank, d_in) float64
    """A as peft initialises it (Kaiming-uniform with a=√5: uniform on ±1/√d_in, variance 1/(3·d_in)).

    The numbers depend on `name`, `seed` and `draw` alone, so that a block does not depend on which other modules are
    computed, and they leave the global random state untouched. They are rounded to float32, as peft's are.
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


def _active_adapter(layer: Layer) -> str | None:
    """The name of the layer's active LoRA adapter; None where a fresh adapter is considered."""
    if isinstance(layer.module, LoraLayer):
        return require_plain_lora(layer.name, layer.module)
    if isinstance(layer.module, BaseTunerLayer):
        raise TargetError(
            f'{layer.name} already carries a {type(layer.module).__name__}, not LoRA; use space="weight"'
        )
    return None


def _existing_lora(layer: Layer) -> list[ParameterMatrix]:
    d_in, d_out = layer.shape
    module: Any = layer.module
    adapter = _active_adapter(layer)
    scaling = float(module.scaling[adapter])
    a, b = (scaling * _weight(factor[adapter]) for factor in (module.lora_A, module.lora_B))
    rank = a.shape[0]
    of_a, of_b = ((f[adapter].weight, _transposed(layer_of("", f[adapter]))) for f in (module.lora_A, module.lora_B))
    matrices = [ParameterMatrix(_same, _same, rank, d_out, projection=a, parameter=of_b[0], of_gradient=of_b[1])]
    if b.any():
        back = _linear(b.T)
        matrices.append(ParameterMatrix(_same, back, d_in, rank, parameter=of_a[0], of_gradient=of_a[1]))
    return matrices


def _bias_matrix(layer: Layer) -> ParameterMatrix:
    bias = getattr(layer.base, "bias", None)
    return ParameterMatrix(
        lambda x: x.new_ones(*x.shape[:-1], 1),
        _same,
        features=1,
        channels=layer.shape[1],
        parameter=bias if isinstance(bias, nn.Parameter) else None,
        of_gradient=lambda gradient: gradient[None],
    )


def _check_own(layer: Layer, name: str) -> None:
    """Raises TargetError where a weight or bias is made of other parameters, which are those that train."""
    value = getattr(layer.base, name, None)
    own = {id(tensor) for tensor in (*layer.base._parameters.values(), *layer.base._buffers.values())}
    if isinstance(value, Tensor) and value.is_floating_point() and id(value) not in own:
        raise TargetError(
            f"the {name} of {layer.name} is no parameter: it is made of others (weight_norm, spectral_norm or another "
            'parametrization), which are those that train; use space="lora", or leave it out of `targets`'
        )


def _own_weight(layer: Layer) -> nn.Parameter | None:
    """The layer's weight, where it is a parameter of floating-point numbers."""
    weight = getattr(layer.base, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.is_floating_point() else None


def _transposed(layer: Layer, rows: int | None = None, columns: int | None = None) -> Map:
    """From a tensor that is stored as the weight is to the first `rows` and `columns` of Wᵀ (d_in, d_out)."""
    return lambda gradient: layer.as_matrix(gradient).T[:rows, :columns]


def _first(count: int) -> Map:
    return lambda x: x[..., :count]


def _weight(factor: nn.Module) -> Tensor:
    layer = layer_of("an adapter's factor", factor)
    return layer.as_matrix(layer.base.weight.detach()).to(torch.float64)


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
