# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Digests of what a computation depends on besides parameters: classes, attributes and hooks of modules, and values.

A function counts by its code, constants, defaults, what it closes over and which globals it names, not by its address.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


DEPTH = 6
LEVELS = 3  # of objects in objects
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# Kept by nn.Module, or counted elsewhere; `training` is the same for all passes.
_OWN = frozenset(vars(nn.Module())) | {"training", "config", "generation_config", "_hf_hook", "_compiled_call_impl"}
_KNOWN = frozenset({"torch", "transformers", "peft", "peft_linear"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def modules_digest(root: nn.Module) -> str:
    """sha256 over every module: name, class with the code of its methods, `extra_repr`, attributes and hooks."""
    parts: list[tuple] = []
    for name, module in root.named_modules():
        attributes = {key: _described(value) for key, value in vars(module).items() if key not in _OWN}
        hooks = [_described(hook) for kind in _HOOKS for hook in getattr(module, kind).values()]
        kind = type(module)
        code = [digest(kind.forward), *_of_class(kind)]
        parts.append((name, kind.__module__, kind.__qualname__, code, module.extra_repr(), sorted(attributes.items())))
        parts.append((name, hooks))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def digest(value: Any, depth: int = DEPTH) -> str | None:
    """Equal for equal values; None where a value cannot be told from others of its type."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if value.numel() else b""
        return f"tensor {value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if depth == 0:
        return None
    if isinstance(value, functools.partial):
        return _joined("partial", [value.func, value.args, value.keywords], depth)
    if isinstance(value, types.MethodType):
        return _joined("method", [value.__func__], depth)
    if isinstance(value, types.FunctionType):
        closed = [content for cell in value.__closure__ or () if not _is_module(content := _content(cell))]
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__, closed]
        described = _joined(f"function {value.__qualname__}", parts, depth)
        return described if described is None or _is_known(value) else f"{described} {_globals(value, depth - 2)}"
    if isinstance(value, types.CodeType):
        return _joined(f"code {value.co_code.hex()} {value.co_names}", list(value.co_consts), depth)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return _joined(type(value).__name__, [part for item in value.items() for part in item], depth)
    if isinstance(value, (list, tuple)):
        return _joined(type(value).__name__, list(value), depth)
    if isinstance(value, (set, frozenset)):
        inner = [digest(part, depth - 1) for part in value]
        return None if None in inner else f"set {sorted(map(str, inner))}"
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):  # a numpy array
        return f"array {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return None


def _described(value: Any, levels: int = LEVELS, seen: frozenset[int] = frozenset()) -> str:
    """`digest`, or of an object its class, methods and attributes, and of containers of objects those of each."""
    described = digest(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if described is not None or levels == 0 or id(value) in seen or isinstance(value, nn.Module):
        return described or kind  # a module of the model is counted by itself

    def inner(part: Any) -> str:
        return _described(part, levels - 1, seen | {id(value)})

    if isinstance(value, Mapping):
        return f"{kind} {[(inner(key), inner(part)) for key, part in value.items()]}"
    if isinstance(value, (list, tuple)):
        return f"{kind} {[inner(part) for part in value]}"
    slots = [name for one in type(value).__mro__ for name in _names(vars(one).get("__slots__", ()))]
    attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(
        value, "__dict__", {}
    )
    return f"{kind} {sorted((str(key), inner(part)) for key, part in attributes.items())} {_of_class(type(value))}"


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else [name for name in slots if not name.startswith("__")]


def _of_class(kind: type) -> list[tuple[str, str | None]]:
    """Methods and attributes of a class and its bases that the user, not a package of known version, has written."""
    found: list[tuple[str, str | None]] = []
    for one in kind.__mro__:
        for name, value in () if _is_known(one) else vars(one).items():
            for part in (value.fget, value.fset) if isinstance(value, property) else (value,):
                part = part.__func__ if isinstance(part, (staticmethod, classmethod)) else part
                if isinstance(part, types.FunctionType) or not name.startswith("__"):
                    found.append((name, digest(part)))
    return found


def _joined(what: str, parts: list[Any], depth: int) -> str | None:
    described = [digest(part, depth - 1) for part in parts]
    if None in described:
        return None
    return f"{what} {hashlib.sha256(repr(described).encode()).hexdigest()}"


def _globals(function: types.FunctionType, depth: int) -> list[tuple[str, str]]:
    """The values and the user's functions among the globals that a function names."""
    if depth <= 0:
        return []
    codes, names = [function.__code__], set[str]()
    for code in codes:
        names.update(code.co_names)
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    found = {name: function.__globals__[name] for name in sorted(names & function.__globals__.keys())}
    ours = {n: v for n, v in found.items() if not (callable(v) and (isinstance(v, type) or _is_known(v)))}
    described = {name: digest(value, depth) for name, value in ours.items()}
    return [(name, text) for name, text in described.items() if text is not None]


def _is_known(value: Any) -> bool:
    """Whether a class or function is of a package whose version is in the fingerprint, or of python."""
    package = str(getattr(value, "__module__", None) or "builtins").partition(".")[0]
    return package in _KNOWN or package in sys.stdlib_module_names - {"__main__"}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _is_module(value: Any) -> bool:
    return isinstance(value, (nn.Module, type))
