# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Decisions that the main process takes for all."""

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
