# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of `compute_ntk` against its lower bound and other implementations."""
