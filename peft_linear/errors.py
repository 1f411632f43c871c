# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The package's own errors. Every message says what is wrong, where, what was got, and what to do."""


class PeftLinearError(ValueError):
    """Base of every error that peft_linear raises itself; a `ValueError`, so callers need not know the package."""


class TargetError(PeftLinearError):
    """The requested modules do not exist, are not linear layers, or take no gradient."""


class OutputError(PeftLinearError):
    """The model's outputs (or the labels they need) are missing, of the wrong shape, or not finite."""


class KernelError(PeftLinearError):
    """A kernel is not symmetric positive semidefinite, or kernels that are combined do not belong together."""


class BudgetError(PeftLinearError):
    """A budget that selects nothing, or more than there is."""


class CriterionError(PeftLinearError):
    """A criterion, search strategy or baseline that does not exist, or that the kernels at hand do not allow."""


class FileError(PeftLinearError):
    """A file or folder that is not what it should be."""


class ProcessError(PeftLinearError):
    """Another process of a run of several failed, died, or did not answer."""
