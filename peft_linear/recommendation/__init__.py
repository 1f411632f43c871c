# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The decision as plain values: what is chosen, why, and how it is saved."""
