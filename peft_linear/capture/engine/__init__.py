# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How a kernel computation runs: stores, memory, processes, resuming. Private."""
