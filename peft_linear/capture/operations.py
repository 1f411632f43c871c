# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Counts what the operations of a pass cost: multiplications, bytes that elementwise operations move, and calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


Work = tuple[float, float, float]  # (flops of matrix products, bytes of other operations, calls)
Take = Callable[[Work], None]

# Bytes count this many times: exponentials and several passes over the data. Measured on one CPU core.
_SLOWER = {"exp": 2, "silu": 2, "gelu": 3, "tanh": 3, "pow": 1, "_softmax": 2, "_log_softmax": 2}
_READS_FEW = ("embedding", "index_select", "gather", "nll_loss_forward", "index")  # of what they are given


class Counter(TorchDispatchMode):
    """Passes the work of every operation on to `take` while it is active.

    There are no values on the meta device: where a model's code asks a yes-or-no question about them, the answer is
    yes. transformers asks whether nothing is padded and whether one text fills each row.
    """

    def __init__(self, take: Take) -> None:
        super().__init__()
        self._take = take

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        output = func(*args, **(kwargs or {}))
        if (work := _work(func, args, kwargs or {}, output)) is not None:
            self._take(work)
        return output


def _work(func: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Work | None:
    packet = func._overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=output)), 0.0, 1.0
    if _is_view(func):
        return None
    name = packet.__name__
    outputs, inputs = _bytes([output]), _bytes([args, kwargs])
    if name in _READS_FEW:
        inputs = outputs
    return 0.0, (inputs + outputs) * _SLOWER.get(name.removesuffix("_backward").removesuffix("_backward_data"), 1), 1.0


def _is_view(func: Any) -> bool:
    results = func._schema.returns
    return bool(results) and all(each.alias_info is not None and not each.alias_info.is_write for each in results)


def _bytes(values: Iterable[Any]) -> float:
    """Of the different tensors in them."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor)}
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))


class FusedAttention(TorchFunctionMode):
    """`scaled_dot_product_attention` on the meta device as the fused kernels do it, which keep no probabilities."""

    def __init__(self, take: Take) -> None:
        super().__init__()
        self._count = take

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _fused_attention(self._count, *args, **(kwargs or {}))


def _fused_attention(
    take: Take,
    query: Tensor,  # (..., H, T, d)
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return _Attention.apply(take, query, key, value, attn_mask, is_causal)  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """Two products of (T, S, d) a head forward, five backward; half of them where the mask is causal."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, take: Take, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        *before, heads, length, _ = query.shape
        output = query.new_empty(*before, length, heads, value.shape[-1]).transpose(-2, -3)  # as the kernels lay it
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums, *(() if mask is None else (mask,)))
        ctx.take = take
        products = 2 * math.prod(query.shape[:-1]) * key.shape[-2]
        ctx.flops = products * (query.shape[-1] + value.shape[-1]) / 2 / (2 if causal else 1)
        take((2 * ctx.flops, 0.0, 1.0))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        ctx.take((5 * ctx.flops, 0.0, 1.0))
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
