# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What is forgotten at the same gain: ProximalLoRA against simpler ways to regularise an adapter."""
