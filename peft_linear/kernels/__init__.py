# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Value objects over the pure functions: kernels of a model's modules, and what is solved with them."""

from .module_kernels import ModuleKernels


__all__ = ["ModuleKernels"]
