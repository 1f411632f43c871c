# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The language bench: which modules, ranks and rates suit LoRA on two real language models.

Run as `python -m examples.benchmarks.language`; README.md beside this file says what is measured.
"""
