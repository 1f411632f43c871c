# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a function on the main process and broadcasts its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch


T = TypeVar("T")


def on_main_process(decide: Callable[[], T], is_main: bool) -> T:
    """What `decide` returns on the main process, on every process; an error there is raised on all of them."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return decide()
    message: list[Any] = [None, None]
    if is_main:
        try:
            message[0] = decide()
        except Exception as error:
            message[1] = error
    torch.distributed.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]
