# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Ranks by effective dimension against a uniform rank and EVA's."""
