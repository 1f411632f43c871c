# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The report as one self-contained HTML file."""

from .page import recommendation_html


__all__ = ["recommendation_html"]
