# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The chosen modules of every selector, trained on tasks sampled with fixed seeds."""
