# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The demo: a language model is planned, trained within a budget of forgetting, and compared with plain LoRA."""
