# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The criteria: one number for a subset kernel `K_S = K_0 + Σ_{m∈S} K_m`, so that each ranks modules and sets alike.

`K_0` is the block of the always-trained parameters. Notation: λ the ridge, λ1 ≥ … ≥ λn the
eigenvalues, r0 the residual and e the loss gradient of `Problem`. Sources: the spectrum of the restricted kernel as a
predictor of fine-tuning is the paper's (*Linearization Explains Fine-Tuning in Large Language Models*, arXiv
2602.08239, section 4); the docstring of each function has its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..errors import CriterionError, OutputError
from ..functional.outputs import kinds_providing
from ..functional.regression import leave_one_out_residuals, solve_ridge
from ..kernels.module_kernels import ModuleKernels
from .cross_validation import cross_validate
from .problem import Problem


# What `criterion="default-by-evidence"` means: the first of these whose need the outputs provide. The evidence is rank
# correlations with the real test loss of fine-tuned modules and sets: docs/measurements/selection.
DEFAULTS_BY_NEED = {"logits": "gradient_energy", "residual": "leave_one_out", "kernel": "trace"}
DEFAULT_CRITERION = DEFAULTS_BY_NEED["logits"]
DEFAULT_NAME = "default-by-evidence"

CriterionFunction = Callable[[Tensor, Problem], float]


@dataclass(frozen=True, eq=False)
class View:
    """Kernels and the learning problem used to score them."""

    kernels: ModuleKernels
    problem: Problem


@dataclass(frozen=True)
class Criterion:
    """A number for a kernel, and how to read it.

    Args:
        name: In the registry.
        function: (K_S (n, n) float64, Problem) -> float.
        label: What the number is, in words.
        formula: As shown in reports.
        higher_is_better: Direction.
        needs: What the outputs must provide ("kernel" is always there); see `Problem.provides`.
        additive: The score of a set is the score of K_0 plus one term per module, so the best set consists of the
            best modules.
        extensive: The value grows with the number of examples (a sum, not a mean).
    """

    name: str
    function: CriterionFunction
    label: str
    formula: str
    higher_is_better: bool
    needs: str = "kernel"
    additive: bool = False
    extensive: bool = False

    def __call__(self, gram: Tensor, problem: Problem) -> float:
        return self.function(gram, problem)

    def utility(self, score: float) -> float:
        """The score with the sign that makes higher better."""
        return score if self.higher_is_better else -score


_REGISTRY: dict[str, Criterion] = {}


def _criterion(label: str, formula: str, **properties: Any) -> Callable[[CriterionFunction], CriterionFunction]:
    def register(function: CriterionFunction) -> CriterionFunction:
        name = function.__name__
        _REGISTRY[name] = Criterion(name, function, label, formula, **properties)
        return function

    return register


@_criterion("condition number", "(λ1 + λ)/(λn + λ)", higher_is_better=False)
def condition_number(gram: Tensor, problem: Problem) -> float:
    """`(λ1 + λ)/(λn + λ)`, the paper's predictor (arXiv 2602.08239, section 4); lower is better. O(n³).

    With more rows than the adapter has parameters λn is 0 and the number is `λ1/λ + 1`: a large kernel, which learns
    fast, looks bad.
    """
    return problem.spectrum(gram).condition_number(problem.ridge)


@_criterion("trace", "Σ λi", higher_is_better=True, additive=True, extensive=True)
def trace(gram: Tensor, problem: Problem) -> float:
    """`tr K = Σ λi = ‖J‖_F²`: how far all outputs move for a unit step in all parameters; higher is better. O(n)."""
    return float(gram.trace())


@_criterion("gradient energy", "eᵀ K e", higher_is_better=True, needs="error", additive=True)
def gradient_energy(gram: Tensor, problem: Problem) -> float:
    """`eᵀ K e = ‖Jᵀ e‖²`, the squared norm of the loss gradient in the trained parameters; higher is better. O(n²)."""
    return float(problem.error @ gram @ problem.error)


@_criterion(
    "effective dimension",
    "Σ λi/(λi + λ)",
    higher_is_better=True,
    extensive=True,
)
def effective_dimension(gram: Tensor, problem: Problem) -> float:
    """`Σ λi/(λi + λ) = n − λ·tr (K + λI)⁻¹`: directions that ridge regression can fit; higher is better. O(n³)."""
    return problem.spectrum(gram).effective_dimension(problem.ridge)


@_criterion("effective rank", "(Σ λi)²/Σ λi²", higher_is_better=True)
def effective_rank(gram: Tensor, problem: Problem) -> float:
    """Participation ratio `(Σ λi)²/Σ λi² = (tr K)²/‖K‖_F²`, blind to the labels; higher is better. O(n²)."""
    norm = float(gram.square().sum())
    return float(gram.trace()) ** 2 / norm if norm > 0 else 0.0


@_criterion("kernel-target alignment", "r0ᵀ K r0/(‖K‖_F ‖r0‖²)", higher_is_better=True, needs="residual")
def alignment(gram: Tensor, problem: Problem) -> float:
    """`r0ᵀ K r0/(‖K‖_F ‖r0‖²)` (Cristianini et al. 2001), blind to the kernel's scale; higher is better. O(n²)."""
    residual = problem.residual
    norm = float(gram.norm()) * float(residual.square().sum())
    return float(residual @ gram @ residual) / norm if norm > 0 else 0.0


@_criterion("leave-one-out error", "mean_i ‖y_i − f̄_{−i}(x_i)‖²", higher_is_better=False, needs="residual")
def leave_one_out(gram: Tensor, problem: Problem) -> float:
    """Mean over examples of `‖y_i − f̄_{−i}(x_i)‖²`; lower is better. O(n³), one factorisation.

    f̄_{−i} is the linearised model (kernel ridge regression with K_S and λ from f_θ0) fitted without example i.
    """
    errors = leave_one_out_residuals(gram, problem.residual, problem.ridge, block_size=problem.num_outputs)
    return float(errors.square().sum()) / problem.num_examples


@_criterion(
    "risk reduction",
    "1 − λ r0ᵀ(K + λI)⁻¹r0/‖r0‖²",
    higher_is_better=True,
    needs="residual",
)
def risk_reduction(gram: Tensor, problem: Problem) -> float:
    """`1 − λ·Q_K/‖r0‖²` with `Q_K = r0ᵀ(K + λI)⁻¹r0`; in [0, 1), higher is better. O(n³).

    (λ/2)·Q_K is the least value of `½‖r0 − Jδ‖² + (λ/2)‖δ‖²`, so this is the share of the penalised training risk
    that the linearised model removes. Adding a module can only raise it: `K ⪯ K + S` and inversion reverses ⪯.
    """
    residual = problem.residual
    total = float(residual.square().sum())
    return 1.0 - problem.ridge * float(residual @ solve_ridge(gram, residual, problem.ridge)) / total if total else 0.0


@_criterion("predicted held-out loss", "cross-entropy of simulated training", higher_is_better=False, needs="logits")
def predicted_loss(gram: Tensor, problem: Problem) -> float:
    """Held-out cross-entropy of training simulated in kernel space, K-fold over examples; lower is better.

    Full-batch gradient descent `f ← f − (η/N) K (softmax(f) − onehot(y))` on each fold's complement. One learning rate
    for every subset, so that a kernel that learns faster gets further. O(folds·steps·n²).
    """
    return cross_validate(gram, problem).loss


CRITERIA: Mapping[str, Criterion] = MappingProxyType(_REGISTRY)


def applicable_criteria(problem: Problem) -> tuple[str, ...]:
    """Names of the criteria that these outputs and labels allow."""
    allowed = problem.provides | {"kernel"}
    return tuple(name for name, criterion in CRITERIA.items() if criterion.needs in allowed)


def resolve_criterion(name: str, problem: Problem) -> Criterion:
    """The criterion called `name`, or the default for these outputs.

    Raises:
        CriterionError: there is no such criterion.
        OutputError: the outputs do not provide what it needs.
    """
    applicable = applicable_criteria(problem)
    if name == DEFAULT_NAME:
        provided = problem.provides | {"kernel"}
        name = next(name for need, name in DEFAULTS_BY_NEED.items() if need in provided)
    if name not in CRITERIA:
        raise CriterionError(f"unknown criterion {name!r}; there are: {', '.join([DEFAULT_NAME, *CRITERIA])}")
    if name not in applicable:
        kinds = kinds_providing(CRITERIA[name].needs)
        raise OutputError(
            f"criterion {name!r} cannot be computed from {problem.what}; it needs labels and outputs of kind "
            f"{' or '.join(kinds)}. These outputs allow: {', '.join(applicable)}"
        )
    return CRITERIA[name]


def score_modules(view: View, criterion: Criterion) -> dict[str, float]:
    """The score of every candidate alone, `K_S = K_0 + K_m`."""
    kernels = view.kernels
    return {name: criterion(kernels.base + kernels[name], view.problem) for name in kernels.names}


def rank_by_score(scores: Mapping[str, float], criterion: Criterion) -> tuple[str, ...]:
    """Names, best first; equal scores stay in model order."""
    return tuple(sorted(scores, key=lambda name: -criterion.utility(scores[name])))
