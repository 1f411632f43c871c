# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The package's own errors. Every message says what is wrong, where, what was got, and what to do."""


class PeftLinearError(ValueError):
    """Base of every error that peft_linear raises itself; a `ValueError`, so callers need not know the package."""


class TargetError(PeftLinearError):
    """The requested modules do not exist, carry no linear map, or take no gradient."""


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
