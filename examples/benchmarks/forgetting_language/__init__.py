# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a language model forgets while LoRA teaches it a task, and what different ways to hold it back cost."""
