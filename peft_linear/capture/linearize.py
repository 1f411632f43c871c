# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`linearize`: the first-order model `f_θ0(x) + J(x)(θ−θ0)` of a model with an adapter, exact and trainable."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import OutputError, TargetError
from ..functional.outputs import Outputs
from .batches import read_batches
from .conditions import unwrapped
from .forward_mode import (
    LinearLosses,
    differentiable_attention,
    evaluation,
    first_order,
    forward_mode_errors,
    has_tangent,
    map_tensors,
    with_gradient_of,
)
from .outputs import OutputFunction
from .targets import base_model


def linearize(model: nn.Module) -> LinearizedModel:
    """The linearised model `f̄_θ(x) = f_θ0(x) + J(x)(θ−θ0)` of `model` at its present parameters θ0.

    θ are the parameters of `model` that require a gradient: of a PeftModel, the adapter and `modules_to_save`.

    Args:
        model: a PeftModel, a PreTrainedModel, or any nn.Module; it is not changed and not trained. Linearise it
            *before* it is fine-tuned: θ0 is copied here.

    Raises:
        TargetError: no parameter of the model requires a gradient.

    Source: *Linearization Explains Fine-Tuning in Large Language Models* (arXiv 2602.08239), section 3. The
    derivative is exact (forward-mode automatic differentiation), not a finite difference.
    """
    return LinearizedModel(model)


class LinearizedModel(nn.Module):
    """`f̄_θ(x) = f_θ0(x) + J(x)(θ−θ0)`, an nn.Module that trains like the model it was made of.

    It takes the same arguments as the model and returns the same class of output with every floating-point tensor
    replaced by its linearisation; `loss` is the model's own loss *of the linearised logits*. Dropout is always off.
    Caches (`past_key_values`) are left out.

    `parameters()` are its own copy of θ, under the model's names with "/" for "."; buffers hold θ0. The frozen
    weights are shared with the wrapped model, which is called but never changed; `to(device)` moves both. The
    proximal term of a ProximalLoRA adapter acts on the wrapped model only: here, add `squared_distance` to the loss.

    Cost: a forward-mode pass without a graph (the primal and the tangent, 2 to 3 forward passes); where a gradient
    is needed, one ordinary forward pass with its graph more. Because f̄ is affine in θ, its gradient is
    `J(x)ᵀ ∂loss/∂f̄`: the ordinary backward pass of the model at θ0, fed with the linear model's cotangents. So the
    memory is that of an ordinary training step. Gradients are exact; gradients of gradients raise an error.
    """

    wrapped: nn.Module
    theta0: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model = unwrapped(model)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise TargetError(
                f"no parameter of {type(model).__name__} requires a gradient, so there is nothing to linearise in; "
                "add an adapter with peft.get_peft_model first (with is_trainable=True if it is loaded)"
            )
        object.__setattr__(self, "wrapped", model)  # not registered: its weights are neither trained nor saved here
        self.names = tuple(trainable)
        self.theta, self.theta0 = nn.ParameterDict(), nn.Module()
        for name, parameter in trainable.items():  # one by one: a ParameterDict made of a dict would be sorted
            self.theta[_key(name)] = nn.Parameter(parameter.detach().clone())
            self.theta0.register_buffer(_key(name), parameter.detach().clone())
        # The Trainer drops the columns of a data set that the forward of its model does not name.
        forward = functools.partial(self.forward)
        forward.__signature__ = inspect.signature(base_model(model).forward)  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Linearised outputs, and the model's own loss of them where it is given `labels`.

        Raises:
            OutputError: the model runs an operation without forward-mode AD, or its loss is not one of
                `forward_mode.LOSSES` of its logits.
        """
        if labels is not None:
            kwargs["labels"] = labels
        values, logits = self._forward_mode(self.displacement(), args, kwargs)
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in self.theta.values())):
            return values
        with evaluation(self.wrapped), LinearLosses(replay=logits):
            carried = {
                name: with_gradient_of(self._at(self.theta0, name), self._at(self.theta, name)) for name in self.names
            }
            carrier = functional_call(self.wrapped, carried, args, kwargs)
        return map_tensors(with_gradient_of, values, map_tensors(_identity, carrier))

    def linear_outputs(self, parameters: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The outputs at other `parameters` ({name: θ}, the model's names), without gradient; θ stays as it is.

        Raises:
            TargetError: a name or a shape does not fit.
        """
        values = self.matching(parameters)
        displacement = {name: values[name] - self._at(self.theta0, name) for name in self.names}
        return self._forward_mode(displacement, args, kwargs)[0]

    @torch.no_grad()
    def start_outputs(self, *args: Any, **kwargs: Any) -> Any:
        """What the model itself returns at θ0, without gradient and without dropout."""
        with evaluation(self.wrapped):
            return functional_call(self.wrapped, self.anchor_state_dict(), args, kwargs)

    def displacement(self) -> dict[str, Tensor]:
        """θ−θ0 under the model's names, without gradient."""
        return {name: (self._at(self.theta, name) - self._at(self.theta0, name)).detach() for name in self.names}

    def distance(self) -> float:
        """`‖θ−θ0‖`, summed in float64."""
        return float(sum(delta.double().square().sum() for delta in self.displacement().values()) ** 0.5)

    def squared_distance(self) -> Tensor:
        """`‖θ−θ0‖²`, differentiable: the proximal term is `(λ/2)` times it, to be added to the loss you train on."""
        return torch.stack(
            [(self._at(self.theta, name) - self._at(self.theta0, name)).square().sum() for name in self.names]
        ).sum()

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """A copy of θ under the wrapped model's names."""
        return {name: self._at(self.theta, name).detach().clone() for name in self.names}

    def anchor_state_dict(self) -> dict[str, Tensor]:
        """A copy of θ0 under the wrapped model's names."""
        return {name: self._at(self.theta0, name).clone() for name in self.names}

    @torch.no_grad()
    def to_adapter(self, model: nn.Module | None = None) -> nn.Module:
        """Writes θ into the trainable parameters of `model` in place and returns it; default: the wrapped model.

        The result is the real (not linearised) model at θ, ready for `save_pretrained` and inference.

        Raises:
            TargetError: `model` has no trainable parameter of a name or shape that is needed.
        """
        model = self.wrapped if model is None else model
        own = dict(unwrapped(model).named_parameters())
        self.matching(own)
        for name in self.names:
            own[name].copy_(self._at(self.theta, name))
        return model

    @torch.no_grad()
    def load_parameters_from(self, source: nn.Module | Mapping[str, Tensor]) -> LinearizedModel:
        """Sets θ to the parameters of another model (the fine-tuned one) or a mapping of the model's names.

        Raises:
            TargetError: a name is missing, or has another shape.
        """
        values = dict(unwrapped(source).named_parameters()) if isinstance(source, nn.Module) else source
        for name, value in self.matching(values).items():
            self._at(self.theta, name).copy_(value)
        return self

    @torch.inference_mode(False)
    def load_dual_coefficients(
        self,
        alpha: Tensor,  # (N, C)
        batches: Iterable[Mapping[str, Any]],
        outputs: Outputs = "logits",
    ) -> LinearizedModel:
        """Sets `θ = θ0 + Jᵀα`: training by solving. `J` is taken of the N examples in `batches`, in their order.

        With `alpha` of `fit_kernel_regression` on kernels of *this* adapter, the linear model then gives the
        regression's predictions. One forward and one backward pass a batch.

        Raises:
            OutputError: `alpha` does not have one row an example and one column an output.
        """
        function = OutputFunction.of(self.wrapped, outputs)
        read = read_batches(batches, self.wrapped, function.output.needs_labels, f"outputs={function.output.name!r}")
        count = sum(batch.size for batch in read)
        if alpha.ndim != 2 or len(alpha) != count:
            raise OutputError(f"alpha must be (N, C) with N={count} examples, got shape {tuple(alpha.shape)}")
        leaves = {name: value.requires_grad_() for name, value in self.anchor_state_dict().items()}
        device = next(iter(leaves.values())).device
        total = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves.values()]
        first = 0
        for batch in read:
            with evaluation(self.wrapped), torch.enable_grad():
                inputs = batch.to(device)
                values = function(functional_call(self.wrapped, leaves, (), inputs.inputs), inputs.labels)
                rows = alpha[first : first + batch.size].to(values)
                if rows.shape != values.shape:
                    raise OutputError(f"alpha has {alpha.shape[1]} columns for {values.shape[1]} outputs an example")
                gradients = torch.autograd.grad(
                    (values * rows).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            total = [sum_ + gradient for sum_, gradient in zip(total, gradients, strict=True)]
            first += batch.size
        displaced = {n: leaf.detach() + delta for (n, leaf), delta in zip(leaves.items(), total, strict=True)}
        return self.load_parameters_from(displaced)

    @property
    def config(self) -> Any:
        """The wrapped model's config."""
        return self.wrapped.config

    @property
    def loss_type(self) -> Any:
        """As the wrapped model has it; the Trainer reads it to count the tokens of a batch."""
        return getattr(base_model(self.wrapped), "loss_type", None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the wrapped model's loss takes `num_items_in_batch`, decided as the Trainer decides it."""
        model = base_model(self.wrapped)
        parameters = inspect.signature(model.forward).parameters.values()
        return bool(getattr(model, "accepts_loss_kwargs", any(p.kind == p.VAR_KEYWORD for p in parameters)))

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.theta.values())
        kind = type(base_model(self.wrapped)).__name__
        return f"LinearizedModel({kind}, {count:,} parameters, distance {self.distance():.4g})"

    def _forward_mode(self, displacement: dict[str, Tensor], args: tuple, kwargs: dict) -> tuple[Any, list[Tensor]]:
        with (
            torch.inference_mode(False),  # which would drop the tangents silently
            evaluation(self.wrapped),
            differentiable_attention(self.wrapped),
            torch.no_grad(),
            forward_ad.dual_level(),
            LinearLosses() as losses,
        ):
            anchors = {name: self._at(self.theta0, name) for name in self.names}
            duals = {n: forward_ad.make_dual(a, displacement[n].to(a, copy=True)) for n, a in anchors.items()}
            with forward_mode_errors(type(base_model(self.wrapped)).__name__):
                output = functional_call(self.wrapped, duals, args, kwargs)
            if not losses.inputs and has_tangent(_loss_of(output)):
                raise OutputError(
                    f"the loss of {type(base_model(self.wrapped)).__name__} cannot be taken of linearised "
                    "logits; leave the labels out and compute the loss from the logits it returns"
                )
            return map_tensors(first_order, output), losses.inputs

    def matching(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `values` that are named as θ, detached.

        Raises:
            TargetError: a name is missing, or has another shape.
        """
        missing = [name for name in self.names if name not in values]
        if missing:
            raise TargetError(
                f"{len(missing)} of {len(self.names)} parameters are missing, first {missing[0]!r}; the other model "
                "needs the same adapter on the same modules"
            )
        for name in self.names:
            shape, expected = tuple(values[name].shape), tuple(self._at(self.theta0, name).shape)
            if shape != expected:
                raise TargetError(f"{name!r} has shape {shape}, expected {expected}; the adapters differ")
        return {name: values[name].detach() for name in self.names}

    def _at(self, store: nn.Module, name: str) -> Tensor:
        return getattr(store, _key(name))

    def _apply(self, fn: Any, recurse: bool = True) -> LinearizedModel:
        self.wrapped._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a parameter's name cannot contain a dot


def _identity(value: Tensor) -> Tensor:
    return value


def _loss_of(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("loss")
    first = output[0] if isinstance(output, (tuple, list)) and output else None
    return first if isinstance(first, Tensor) and first.ndim == 0 else None
