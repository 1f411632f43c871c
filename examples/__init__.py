# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Examples, benchmarks and the replication of the paper; run from the root of the repository."""
