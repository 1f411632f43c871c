# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The kinds of layer that have a kernel: one small class a kind.

A layer of every kind applies one matrix W (d_out, d_in) at T positions of each example, `y_t = W x_t + b`: to tokens,
patches, or the unfolded windows of an image. With its inputs as (B, T, d_in) and the cotangents of its outputs as
(B, T, d_out) everything else (`functional.gram`, the spaces of `adapter_spaces`) is the same for all kinds.

A new kind is a subclass of `Layer` with `@register_layer` that says which modules it `accepts`, their `shape`, and,
where its features are not the last dimension, how `inputs` and `cotangents` are made of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, ClassVar, Literal, TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from ..errors import TargetError


Record = Callable[
    [Tensor, Tensor], Tensor
]  # (inputs, output) of one use of the weight → the output that the model continues with


class Layer:
    """One module of a kind, with its full name; an adapter around it is part of it."""

    described: ClassVar[str]  # the modules of this kind, in words
    in_all_linear: ClassVar[bool] = False  # whether targets="all-linear" names it, as peft's does
    output_first: ClassVar[bool] = True  # whether its weight is stored (d_out, d_in, …), or (d_in, d_out)
    layout: ClassVar[Hashable] = "features last"  # layers that are equal in it make the same `inputs` of one tensor

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether a module (not an adapter around one) is of this kind."""
        raise NotImplementedError

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.base: Any = _inside(module)  # without an adapter around it
        self.place: Literal["around", "module", "base"] = "around"  # see `attach`

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        raise NotImplementedError

    def inputs(self, tensor: Tensor, batch_size: int) -> Tensor:  # (B, T, d_in)
        """What the weight was applied to, position by position.

        Raises:
            TargetError: the first dimension is not a multiple of the batch, so examples cannot be told apart.
        """
        return self._features_last(tensor, batch_size)

    def cotangents(self, tensor: Tensor, batch_size: int) -> Tensor:  # (B, T, d_out)
        """The gradient with respect to the output, in the same positions. Raises as `inputs` does."""
        return self._features_last(tensor, batch_size)

    @property
    def weight(self) -> nn.Parameter | None:
        """The weight, where it is a parameter of floating-point numbers; None where it is quantised."""
        weight = getattr(self.module, "weight", None)
        return weight if isinstance(weight, nn.Parameter) and weight.is_floating_point() else None

    @property
    def bias(self) -> nn.Parameter | None:
        return getattr(self.module, "bias", None)

    def as_matrix(self, tensor: Tensor) -> Tensor:  # (d_out, d_in)
        """A tensor that is stored as the weight is, such as its gradient."""
        return tensor.flatten(1) if self.output_first else tensor.T

    def attach(self, record: Record) -> Handles:
        """Has `record` called at each use of the weight, until the handle is removed.

        A user's hooks may change what goes into a module and what comes out of it. `place` says between which of
        them the weight lies: "around" all hooks of the module (an adapter that peft will put around it), inside those
        of the "module" (an adapter that it is), or of the "base" layer (its own weight).

        Raises (when the module is called):
            TargetError: it gets or returns no tensor.
        """
        around = self.place == "around"
        raw: list[Tensor | None] = []

        def pre_hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            raw.append(_first_tensor(args, kwargs))

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor:
            inputs = raw.pop() if around and raw else _first_tensor(args, kwargs)
            raw.clear()
            if inputs is None:
                raise TargetError(f"{self.name} was called without a tensor; leave it out of `targets`")
            if not isinstance(output, Tensor):
                raise TargetError(
                    f"{self.name} ({type(module).__name__}) returned {type(output).__name__}, not a tensor; "
                    "leave it out of `targets`"
                )
            return record(inputs, output)

        module = self.base if self.place == "base" else self.module
        handles = [module.register_forward_hook(hook, with_kwargs=True, prepend=not around)]
        if around and module._forward_pre_hooks:
            handles.append(module.register_forward_pre_hook(pre_hook, with_kwargs=True, prepend=True))
        return Handles(handles)

    def _features_last(self, tensor: Tensor, batch_size: int) -> Tensor:
        """(B, d), (B, …, d) or (B·T, d) as (B, T, d)."""
        self._check_examples(tensor, batch_size)
        return tensor.reshape(batch_size, -1, tensor.shape[-1])

    def _check_examples(self, tensor: Tensor, batch_size: int) -> None:
        if tensor.ndim < 2 or tensor.shape[0] % batch_size:
            raise TargetError(
                f"{self.name} works on a tensor of shape {tuple(tensor.shape)}, in which the {batch_size} examples of "
                "the batch cannot be told apart; pass batches of one example"
            )


class Handles:
    """Handles of several hooks, removed together."""

    def __init__(self, handles: Iterable[Any]) -> None:
        self._handles = list(handles)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


Kind = TypeVar("Kind", bound=type[Layer])
LAYER_KINDS: list[type[Layer]] = []


def register_layer(kind: Kind) -> Kind:
    """Class decorator: makes a kind known. Of several that accept a module, the one registered first counts."""
    LAYER_KINDS.append(kind)
    return kind


def layer_kind(module: nn.Module) -> type[Layer] | None:
    """The kind of a module, or of the one in an adapter; None where it has no kernel."""
    inside = _inside(module)
    return next((kind for kind in LAYER_KINDS if kind.accepts(inside)), None)


def layer_of(name: str, module: nn.Module) -> Layer:
    """The layer of a module.

    Raises:
        TargetError: it is of no kind.
    """
    kind = layer_kind(module)
    if kind is None:
        raise not_a_layer([(name, module)])
    return kind(name, module)


def not_a_layer(modules: Iterable[tuple[str, nn.Module]]) -> TargetError:
    wrong = ", ".join(f"{name} ({type(module).__name__})" for name, module in modules)
    supported = ", ".join(kind.described for kind in LAYER_KINDS)
    return TargetError(
        f"not a linear layer, so it has no kernel: {wrong}; leave it out of `targets` (supported are: {supported})"
    )


@register_layer
class Conv1D(Layer):
    """GPT-2's linear layer, whose weight is stored transposed, (d_in, d_out)."""

    described = "transformers' Conv1D"
    in_all_linear = True
    output_first = False

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, TransformersConv1D)

    @property
    def shape(self) -> tuple[int, int]:
        d_in, d_out = self.base.weight.shape
        return int(d_in), int(d_out)


@register_layer
class Linear(Layer):
    """nn.Linear, and quantised linears, which are known by their class's name and their sizes."""

    described = "nn.Linear and quantised linears"
    in_all_linear = True

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        return isinstance(module, nn.Linear) or (
            "Linear" in type(module).__name__ and all(type(size) is int for size in sizes)
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.in_features, self.base.out_features


def is_plain(module: nn.Module) -> bool:
    """Whether the forward of a module is the one of a linear layer, not one that a subclass or an instance brings."""
    return "forward" not in vars(module) and type(module).forward in (nn.Linear.forward, TransformersConv1D.forward)


def _first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _inside(module: nn.Module) -> nn.Module:
    """What an adapter is around; any other module itself."""
    return _inside(module.get_base_layer()) if isinstance(module, BaseTunerLayer) else module
