# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: each is a package, run as `python -m examples.benchmarks.<name>`."""
