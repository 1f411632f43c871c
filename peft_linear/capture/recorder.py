# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The only place where layers of a model are hooked: their inputs and output cotangents; the model is left as found.

The graph begins at the output of the first chosen module: all parameters are frozen meanwhile, so nothing below
it is saved or differentiated, and no parameter gradient is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TargetError
from .conditions import as_in_training, gradient_errors
from .layers import Layer, Record


_PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' flag on a 4-bit linear
Take = Callable[[str, int, Tensor], None]  # (layer, number of the call, cotangent)


@dataclass
class Call:
    """One call of a layer."""

    inputs: Tensor  # as the layer got it, unless its version is another one by now
    version: int
    leaf: Tensor | None = None  # its output, where the graph begins here


@dataclass
class Recorder:
    """Records the calls of `layers` between `clear()`s; `backward` hands out the cotangents of their outputs."""

    layers: Mapping[str, Layer]
    calls: dict[str, list[Call]] = field(default_factory=dict)
    copied: set[str] = field(default_factory=set)  # layers whose inputs the model changes in place later on
    _take: Take | None = None

    def clear(self) -> None:
        self.calls = {name: [] for name in self.layers}

    def copy_changed_inputs(self) -> bool:
        """Whether the model has changed a recorded input in place since; such inputs will be copied from now on.

        Autograd does not notice: it keeps no input of a layer whose weight takes no gradient.
        """
        changed = {
            name
            for name, calls in self.calls.items()
            if name not in self.copied and any(call.inputs._version != call.version for call in calls)
        }
        self.copied |= changed
        return bool(changed)

    def backward(self, scalar: Tensor, keep_graph: bool, on_cotangent: Take) -> None:
        """One backward pass from `scalar` to the recorded outputs, whose cotangents are passed on one by one."""
        self._take = on_cotangent
        if not scalar.requires_grad:
            return
        recorded = {
            id(call.leaf): (name, number)
            for name, calls in self.calls.items()
            for number, call in enumerate(calls)
            if call.leaf is not None
        }
        # All leaves, not the recorded ones alone: a pass that stops at those would miss outputs whose only leaf is
        # another one, such as the embeddings that gradient checkpointing marks.
        leaves = _graph_leaves(scalar)
        with gradient_errors():
            gradients = torch.autograd.grad(scalar, leaves, retain_graph=keep_graph, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None and id(leaf) in recorded:
                self._receive(*recorded[id(leaf)], gradient)

    def _receive(self, name: str, number: int, cotangent: Tensor) -> None:
        if self._take is not None:
            self._take(name, number, cotangent.detach())

    def record(self, name: str) -> Record:
        """What the layer of that name is to call; see `Layer.attach`."""

        def record(inputs: Tensor, output: Tensor) -> Tensor:
            number = len(self.calls[name])
            inputs = inputs.detach()
            inputs = inputs.clone() if name in self.copied else inputs
            call = Call(inputs, inputs._version)
            self.calls[name].append(call)
            if output.requires_grad:
                output.register_hook(lambda gradient: self._receive(name, number, gradient))
                return output
            call.leaf = output.detach().requires_grad_(True)
            return call.leaf.clone()  # a copy, so that the model may change it in place

        return record


def _graph_leaves(scalar: Tensor) -> list[Tensor]:
    """The tensors at which the graph of `scalar` ends."""
    leaves: dict[int, Tensor] = {}
    stack: list[Any] = [scalar.grad_fn]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        stack.extend(following for following, _ in node.next_functions)
    return list(leaves.values())


@contextmanager
def recording(
    model: nn.Module,
    layers: Mapping[str, Layer],
) -> Iterator[Recorder]:
    """Hooks `layers` of `model`, which is in eval mode with frozen parameters inside the block, and as before after.

    Raises:
        TargetError: 4-bit weights that are packed for inference, so that no gradient goes through them.

    Restored also when the block raises: hooks, train/eval mode of every module, `requires_grad` of every parameter.
    `.grad`, buffers and random states are never touched.
    """
    recorder = Recorder(layers)
    recorder.clear()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    packers = _inference_packers(model)
    handles = []
    try:
        with as_in_training(model), torch.enable_grad():
            for name, layer in layers.items():
                handles.append(layer.attach(recorder.record(name)))
            for parameter in trainable:
                parameter.requires_grad_(False)
            for module in packers:
                setattr(module, _PACKS, False)
            yield recorder
    finally:
        for module in packers:
            setattr(module, _PACKS, True)
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        recorder.clear()


def _inference_packers(model: nn.Module) -> list[nn.Module]:
    """4-bit linears of bitsandbytes that would pack their weights for inference in eval mode, on CPUs with bf16."""
    packers = [module for module in model.modules() if getattr(module, _PACKS, False)]
    for module in packers:
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise TargetError(
                f"{type(module).__name__} has 4-bit weights that bitsandbytes packed for inference in an earlier pass "
                "in eval mode; no gradient goes through them: load the model again, and call this before any such pass"
            )
    return packers
