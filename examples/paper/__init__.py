# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The experiments of "Linearization Explains Fine-Tuning in Large Language Models" (arXiv 2602.08239), run again."""
