# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a training step of a model consists of, counted on the meta device: no numbers are computed.

One forward and one backward pass of a copy without numbers say, of every operation of the backward pass and of every
tensor that autograd keeps, for which adapted modules it is needed: those that lie below it. A set of adapters needs
what any of its modules needs; `recommendation.cost` adds this up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftLinearError
from .batches import Batch
from .conditions import as_in_training, device_of
from .meta_copy import meta_copy
from .operations import Counter, FusedAttention, Work
from .targets import base_model, resolve_always_trained, resolve_targets


OUTSIDE = -1  # the block of what lies in no layer
FORMAT = 1
Reach = int  # a bit for every module, in the order of the record; the lowest bit: always


def step_record(
    model: nn.Module,
    inputs: Mapping[str, Any],
    candidates: Iterable[str] = (),
    always_trained: Iterable[str] | None = None,
) -> dict[str, Any]:
    """The operations and kept tensors of a training step, as JSON; `recommendation.cost.StepCost` reads it.

    Args:
        model: Left as it is, and may be on the meta device.
        inputs: Keyword arguments of one forward pass, on any device; with labels where the model makes its loss of
            them.
        candidates: Modules that may be adapted, beside all linear ones.
        always_trained: As for `compute_ntk`.

    Raises:
        PeftLinearError: the model's code does not run without numbers.

    Cost: one deep copy of the modules and two passes on the meta device, about 0.1 ms an operation.
    """
    root = base_model(model)
    names = None if always_trained is None else list(always_trained)
    head = resolve_always_trained(model, names)
    linear = resolve_targets(model, reserved=head)
    wanted = dict.fromkeys([*linear, *candidates])
    try:
        trace = _Trace(meta_copy(model), list(wanted), list(head))
        trace.run({key: value.to("meta") if isinstance(value, Tensor) else value for key, value in inputs.items()})
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise PeftLinearError(
            f"the operations of a training step of {type(root).__name__} cannot be counted: its code does not run on "
            f"the meta device ({type(error).__name__}: {reason[:200]})"
        ) from error
    tensors = [*root.parameters(), *root.buffers()]
    return {
        "format": FORMAT,
        "device": device_of(model).type,
        "checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in root.modules()),
        "weights": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "trained": sum(parameter.numel() for module in head.values() for parameter in module.parameters()),
        **trace.record(set(linear)),
    }


def counted_step(
    model: nn.Module, batch: Batch, candidates: Iterable[str], always_trained: Iterable[str] | None
) -> dict[str, Any]:
    """`step_record` for the provenance of kernels; {"error": why} where the operations cannot be counted.

    Only a budget of time or memory needs the counts, and says the error.
    """
    try:
        return step_record(model, step_inputs(model, batch), candidates, always_trained)
    except PeftLinearError as error:
        return {"error": str(error)}


def step_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the model is called with in training: a language model makes its loss of the labels."""
    generates = getattr(base_model(model), "get_output_embeddings", lambda: None)() is not None
    labels = {"labels": batch.labels} if generates and batch.labels is not None and batch.labels.ndim == 2 else {}
    return {**batch.inputs, **labels}


class _Trace:
    """The passes of one copy; markers at the outputs of modules stand for their adapters."""

    def __init__(self, model: nn.Module, names: list[str], head: list[str]) -> None:
        self.model = model
        self.named = {name: model.get_submodule(name) for name in names}
        for name in head:
            model.get_submodule(name).requires_grad_(True)
        self.blocks = _blocks(model, names)
        self.block = OUTSIDE
        self.current: int | None = None  # number of the node of the backward pass
        self.counting = True
        self.forward: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self.backward: dict[tuple[int, Reach], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self.kept: dict[int, tuple[int, int, Reach]] = {}  # {storage: (bytes, block, reach)}
        self.block_inputs: dict[int, int] = {}
        self.calls: dict[str, list[tuple[Tensor, Reach, int]]] = {}  # in the order of the first calls
        self.nodes: dict[Any, tuple[int, Reach]] = {}  # {node of the graph: (block, reach)}
        self._markers: list[tuple[Tensor, str]] = []  # alive as long as the graph
        self._bits: dict[int, Reach] = {}  # of markers
        self._alive: list[Tensor] = []

    def run(self, inputs: Mapping[str, Any]) -> None:
        with as_in_training(self.model), self._hooks(), torch.enable_grad(), FusedAttention(self._take):
            with Counter(self._take):
                loss = _scalar(self.model(**inputs))
            if loss.grad_fn is None:
                raise PeftLinearError("the outputs do not depend on any linear layer")
            self._walk([loss], OUTSIDE)
            nodes = [node for node in _reachable(loss.grad_fn) if node in self.nodes]
            self._keep(nodes)
            self._backward(loss, nodes)

    def record(self, linear: set[str]) -> dict[str, Any]:
        parameters = {
            parameter.untyped_storage()._cdata for parameter in (*self.model.parameters(), *self.model.buffers())
        }
        kept: dict[tuple[int, Reach], int] = defaultdict(int)
        for storage, (size, block, reach) in self.kept.items():
            if storage not in parameters:
                kept[block, reach] += size
        modules = []
        for name, calls in self.calls.items():
            inputs, below, block = calls[0]
            d_in = inputs.shape[-1]
            modules.append(
                {
                    "name": name,
                    "d_in": d_in,
                    "d_out": self._width(name),
                    "positions": sum(each.numel() for each, *_ in calls) // d_in,
                    "item_bytes": inputs.element_size(),
                    "block": block,
                    "input": inputs.untyped_storage()._cdata,
                    "below": _ranges(below),
                    "all_linear": name in linear,
                }
            )
        order: dict[int, int] = {}
        for module in modules:
            module["input"] = order.setdefault(module["input"], len(order))
        return {
            "modules": modules,
            "forward": [[block, *work] for block, work in self.forward.items()],
            "backward": [[block, _ranges(reach), *work] for (block, reach), work in self.backward.items()],
            "kept": [[block, _ranges(reach), size] for (block, reach), size in kept.items()],
            "block_inputs": [[block, size] for block, size in self.block_inputs.items()],
        }

    def _width(self, name: str) -> int:
        return next(marker.shape[-1] for marker, owner in self._markers if owner == name)

    def _take(self, work: Work) -> None:
        if not self.counting:
            return
        if self.current is None:
            sums = self.forward[self.block]
        else:
            sums = self.backward[self._numbered[self.current]]
        for position, value in enumerate(work):
            sums[position] += value

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for name, module in self.named.items():
            handles.append(module.register_forward_pre_hook(self._called(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._marked(name)))
        for number, module in enumerate(self.blocks):
            handles.append(module.register_forward_pre_hook(self._entered(number), with_kwargs=True))
            handles.append(module.register_forward_hook(self._left(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            below = self._walk([inputs], self.block)
            self._alive.append(inputs)
            self.calls.setdefault(name, []).append((inputs, below, self.block))

        return hook

    def _marked(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            self.counting = False
            marker = torch.empty_like(output).requires_grad_(True)
            self._markers.append((marker, name))
            self._bits[id(marker)] = 2 << list(self.calls).index(name)
            marked = output + marker
            self.counting = True
            return marked

        return hook

    def _entered(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if inputs is not None:
                self._walk([inputs], OUTSIDE)
                self.block_inputs[number] = inputs.numel() * inputs.element_size()
            self.block = number

        return hook

    def _left(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._walk(_tensors(output), number)
            self.block = OUTSIDE

        return hook

    def _walk(self, tensors: Iterable[Tensor], block: int) -> Reach:
        """Notes the nodes of the graph that are new, as made in `block`; the reach of the tensors together."""
        reach = 0
        for tensor in tensors:
            node = tensor.grad_fn
            stack = [node] if node is not None else []
            while stack:
                node = stack[-1]
                following = [each for each, _ in node.next_functions if each is not None]
                if waiting := [each for each in following if each not in self.nodes]:
                    stack += waiting
                    continue
                stack.pop()
                if node not in self.nodes:
                    variable = getattr(node, "variable", None)
                    own = 0 if variable is None else self._bits.get(id(variable), 1)
                    for each in following:
                        own |= self.nodes[each][1]
                    self.nodes[node] = (block, own)
            if tensor.grad_fn is not None:
                reach |= self.nodes[tensor.grad_fn][1]
        return reach

    def _keep(self, nodes: Iterable[Any]) -> None:
        """What autograd keeps for the backward pass, and what adapters keep: the inputs of their modules."""
        for node in nodes:
            block, reach = self.nodes[node]
            for tensor in _saved(node):
                self._keep_one(tensor, block, reach)
        for number, calls in enumerate(self.calls.values()):
            for inputs, _, block in calls:
                if inputs.element_size() >= 4:  # of others the adapter makes a copy in float32
                    self._keep_one(inputs, block, 2 << number)

    def _keep_one(self, tensor: Tensor, block: int, reach: Reach) -> None:
        storage = tensor.untyped_storage()
        self._alive.append(tensor)
        size, first, known = self.kept.get(storage._cdata, (storage.nbytes(), block, 0))
        self.kept[storage._cdata] = (size, first, known | reach)

    def _backward(self, loss: Tensor, nodes: list[Any]) -> None:
        self._numbered = [self.nodes[node] for node in nodes]
        for number, node in enumerate(nodes):
            node.register_prehook(self._starting(None if hasattr(node, "variable") else number))
        with Counter(self._take):
            loss.backward()
        self.current = None

    def _starting(self, number: int | None) -> Callable[[Any], None]:
        def hook(gradients: Any) -> None:
            self.counting = number is not None
            self.current = number

        return hook


def _scalar(output: Any) -> Tensor:
    """The loss, or a sum of the first outputs that depend on the linear layers."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point() and tensor.requires_grad]
    if not tensors:
        raise PeftLinearError("the outputs do not depend on any linear layer")
    return tensors[0].float().sum()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _reachable(node: Any) -> list[Any]:
    found: dict[Any, None] = {}
    stack = [node]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found[node] = None
            stack += [each for each, _ in node.next_functions]
    return list(found)


def _saved(node: Any) -> list[Tensor]:
    if hasattr(node, "saved_tensors"):  # of a custom function
        return [tensor for tensor in node.saved_tensors if tensor is not None]
    return [tensor for name in dir(node) if name.startswith("_saved_") for tensor in _tensors(getattr(node, name))]


def _blocks(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The outermost entries of module lists that hold linear layers: what gradient checkpointing computes again."""
    names = list(names)
    found: dict[str, nn.Module] = {}
    for list_name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(list_name.startswith(f"{name}.") for name in found):
            continue
        for key, child in module.named_children():
            prefix = f"{list_name}.{key}" if list_name else key
            if any(name.startswith(f"{prefix}.") for name in names):
                found[prefix] = child
    return list(found.values())


def _ranges(reach: Reach) -> list[list[int]]:
    """[first, last] of the runs of bits, shifted so that "always" is -1 and the first module 0."""
    ranges: list[list[int]] = []
    for position in range(reach.bit_length()):
        if reach >> position & 1:
            if ranges and ranges[-1][1] == position - 2:
                ranges[-1][1] = position - 1
            else:
                ranges.append([position - 1, position - 1])
    return ranges
