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
"""What the figures of the benchmarks have in common."""

from __future__ import annotations

from matplotlib.axes import Axes


INK, GRID = "#22303c", "#e3e8eb"


def finish(axes: Axes, title: str) -> None:
    """Title at the left, a light grid behind, no frame at the top and the right."""
    axes.set_title(title, loc="left", fontsize=12.5, color=INK, fontweight="bold", pad=10)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
