# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The Trainer, TRL and model cards: callbacks and what they need."""
