# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The conditions of every pass: those of training (no cache, no fused inference paths), without dropout, uncompiled.

A model in eval mode takes other ways than in training: it fills a cache of keys and values, which changes the mask
of packed rows, and `nn.TransformerEncoder` calls a fused kernel that passes its layers by. Compiled code does not
call hooks that are added later on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import TargetError


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Inside, `model` runs as in a training step but for dropout, which is off; everything is restored after."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    caching = [config for config in configs(model) if getattr(config, "use_cache", False) is True]
    compiled = [(module, call) for module in modules if (call := getattr(module, "_compiled_call_impl", None))]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, training in modes:
            if training:
                module.training = False
        for config in caching:
            config.use_cache = False
        for module, _ in compiled:
            module._compiled_call_impl = None
        torch.backends.mha.set_fastpath_enabled(False)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            if "torch._dynamo.eval_frame" in sys.modules:  # else nothing is compiled; the import takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, call in compiled:
            module._compiled_call_impl = call
        for config in caching:
            config.use_cache = True
        for module, training in modes:
            module.training = training


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in `torch.compile(model)`, DataParallel, DistributedDataParallel and AveragedModel; others as is.

    Raises:
        TargetError: it is no module.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise TargetError(
                f"the model is a {type(model).__name__}, not a torch.nn.Module; pass the module itself"
                + (" (torch.compile of a compiled model returns a function)" if callable(model) else "")
            )
        if is_compiled(model):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(vars(model).get("_orig_mod"), nn.Module):  # accelerate's, whose blocks are compiled each
            model = vars(model)["_orig_mod"]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or _is_average(model):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` returned; asked without importing the compiler, which takes seconds."""
    return "_orig_mod" in module._modules and type(module).__name__ == "OptimizedModule"


def configs(model: nn.Module) -> list[Any]:
    """The configs of a model and of its parts, those for text, vision, encoder and decoder in them, once each."""
    found: dict[int, Any] = {}
    waiting = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    while waiting:
        config = waiting.pop()
        if id(config) in found:
            continue
        found[id(config)] = config
        waiting += [inner for inner in getattr(config, "__dict__", {}).values() if hasattr(inner, "to_dict")]
    return list(found.values())


def check_present(model: nn.Module) -> None:
    """Raises TargetError where the weights of a model are not there, or take no gradients."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not _is_offloaded(model):
            raise _on_meta(f"{name} of {type(model).__name__}")
        if parameter.is_meta:
            raise TargetError(
                f"{name} of {type(model).__name__} is offloaded by accelerate, which gives no gradients through it; "
                "load the model without offloading: on fewer layers, quantised, or with device_map='cpu'"
            )
        if parameter.is_inference():
            raise TargetError(
                f"{name} of {type(model).__name__} was made inside torch.inference_mode(), so it takes no gradient; "
                "load or copy the model outside of it"
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta and not _is_offloaded(model):
            raise _on_meta(f"{name} of {type(model).__name__}")
        if buffer.is_inference() and buffer.is_floating_point():
            raise TargetError(
                f"{name} of {type(model).__name__} was made inside torch.inference_mode(), so no gradient passes it; "
                "load or copy the model outside of it"
            )


def _on_meta(what: str) -> TargetError:
    return TargetError(
        f"{what} has no values (it is on the meta device); load the weights, for example with from_pretrained"
    )


def check_no_global_hooks() -> None:
    """Raises TargetError where forward hooks are registered for all modules: an adapter's own would run them too."""
    modules = torch.nn.modules.module
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        raise TargetError(
            "forward hooks are registered for all modules (torch.nn.modules.module.register_module_forward_hook or "
            "_pre_hook); the modules of a LoRA adapter would run them too, which is not computed here. Remove them, "
            'or take kernels in space="weight"'
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def gradient_errors() -> Iterator[None]:
    """Says what to do where a model's own code takes no part in `torch.autograd.grad`."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise TargetError(
            "the model calls torch.utils.checkpoint with use_reentrant=True in eval mode, through which no gradients "
            "of intermediate values can be taken; pass use_reentrant=False there, or switch its checkpointing off"
        ) from error


def _is_offloaded(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _is_average(model: nn.Module) -> bool:
    return isinstance(model, torch.optim.swa_utils.AveragedModel)
