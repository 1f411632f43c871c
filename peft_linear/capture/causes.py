# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Why a module failed the self-check, in words, and what to do."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from .batches import Batch
from .job import Job
from .layers import is_plain
from .targets import base_model


Alone = Literal["right", "wrong", "fails", "unknown"]  # the module, when an example is passed alone


def cause_of(job: Job, name: str, error: float, batch: Batch, number: int, alone: Alone) -> str:
    """The message of a TargetError about the module `name`."""
    root, layer = base_model(job.model), job.layers[name]
    places = names_of_module(root, layer.module)
    parameter = job.matrices[name][0].parameter
    users = names_of_parameter(root, parameter)
    hooks = _hooks(layer.base, parameter)
    kind = type(layer.base).__name__
    if len(places) > 1:
        return (
            f"{name} is one module under several names ({', '.join(places)}), and peft puts an adapter at the first "
            "of them only; give each place a module of its own, or leave it out of `targets`"
        )
    if len(users) > 1 and parameter is not None:
        shared = "bias" if parameter.ndim == 1 else "weight"
        return (
            f"{name} shares its {shared} with other modules ({', '.join(users)}), so its kernel is not that of one "
            'layer; leave it out, or use space="lora", in which every module has an adapter of its own'
        )
    what = f"{name} ({kind}) would get a wrong kernel: gradients are {error:.1e} off autograd's in batch {number}"
    leave = "leave it out of `targets`, or out of `always_trained`"
    if alone == "right":
        return f"the model mixes the examples of a batch at {name}, so {what}; pass batches of one example"
    if alone == "fails":
        return (
            f"the model mixes the examples of a batch at {name} and takes no example alone, so {what}; its outputs "
            "depend on which examples come together (batch statistics?), so that no example has gradients of its own: "
            "let it use running statistics"
        )
    if alone == "unknown":
        shapes = ", ".join(f"{key} {tuple(v.shape)}" for key, v in batch.inputs.items() if isinstance(v, Tensor))
        return (
            f"the {batch.size} examples of batch {number} cannot be told apart at {name}: the batch's tensors are no "
            f"lists of equal examples ({shapes}), or the model mixes examples; {what}; pass batches of one example"
        )
    if hooks:
        return f"{what}; there are hooks of yours ({len(hooks)}): remove them, or {leave}"
    if not is_plain(layer.base):
        return f"{what}; its forward is not the x Wᵀ + b of a linear layer; {leave}"
    return (
        f"{what}; is its weight used elsewhere than in its own forward, or is the layer kind (`Layer`) or the space "
        f"not what the module computes? If so, {leave}"
    )


def _hooks(module: nn.Module, parameter: Tensor | None) -> list[Any]:
    """Those of a module in both directions, of a parameter's gradient, and of all modules."""
    everywhere = nn.modules.module
    return [
        hook
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
            getattr(parameter, "_backward_hooks", None),
            everywhere._global_forward_hooks,
            everywhere._global_forward_pre_hooks,
            everywhere._global_backward_hooks,
            everywhere._global_backward_pre_hooks,
        )
        for hook in hooks or ()
    ]


def names_of_module(root: nn.Module, module: nn.Module) -> list[str]:
    """Every place of a module, in different parents or under different names of one."""
    found: dict[tuple[int, str], str] = {}
    for prefix, parent in root.named_modules():
        for child, inner in parent._modules.items():
            if inner is module:
                found.setdefault((id(parent), child), f"{prefix}.{child}".removeprefix("."))
    return list(found.values())


def names_of_parameter(root: nn.Module, parameter: Tensor | None) -> list[str]:
    """The modules that hold it as a parameter of their own."""
    return [
        name
        for name, module in root.named_modules()
        if parameter is not None and any(own is parameter for own in module._parameters.values())
    ]
