# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The self-check: before the first kernel, what the hooks assemble is compared with what autograd says.

For random signs u the vector `Jᵀu` of every parameter matrix is made twice: of the assembled rows, and by one
backward pass of `Σ u_ia f_a(x_i)` in the parameters themselves (for a new adapter: with one in the module's place, as
peft puts it). They differ where a module is more than `x Wᵀ + b`, where its weight is used elsewhere, where something
changes what goes in or comes out, and, thanks to the signs, where the examples of a batch are mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OutputError, PeftLinearError, TargetError
from ..functional.gram import BatchJacobian
from .batches import Batch, evaluate
from .causes import Alone, cause_of
from .job import Job
from .outputs import OutputFunction
from .parameters import differentiable
from .passes import capturing, not_finite
from .reference_pass import reference_gradients


EXAMPLES, DIRECTIONS = 3, 4
PARTS = 4  # times the tolerance: products of other shapes round differently
# Of the gradient itself; besides, 2·eps of the largest that it could be without cancellation, and eps of the largest
# of all modules: gradients that are small by cancellation have the rounding of large ones.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Found:
    """The result on one batch: the worst matrix, and by how much it is wrong."""

    error: float  # ‖assembled − autograd's‖ / ‖autograd's‖ of the worst, beyond rounding
    rounding: float  # ‖assembled − autograd's‖ / Σ ‖h'‖·‖δ'‖, the largest
    wrong: str | None  # the layer of the worst error above the tolerance
    dtype: torch.dtype  # the least precise that a layer works in
    unchecked: tuple[str, ...]


def self_check(job: Job, mode: str) -> tuple[dict[str, Any], torch.dtype | None]:
    """Checks the first batch ("first") or the first of every structure ("shapes"); for the provenance.

    Returns:
        {"mode", "batches", "error", "unchecked"}, and the least precise dtype that a layer works in (None if "off").

    Raises:
        TargetError: a module's rows are not its gradients; the message names it and the likely cause.
        OutputError: two passes over one batch differ, outputs depend on the other examples of a batch, or gradients
            are not finite.

    Cost: of each structure four forward and two backward passes of a few examples, one of them with the gradients of
    the parameters that would train, and one forward pass of the whole batch without a graph.
    """
    if mode == "off":
        kind = job.device.type
        return {"mode": mode}, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    numbers = [0] if mode == "first" else _first_of_each_structure(job.batches)
    worst, dtypes, unchecked = 0.0, [], set[str]()
    for number in numbers:
        whole = job.batches[number]
        batch = whole.head(EXAMPLES) if whole.uniform else whole
        found = _check(job, batch, number)
        if found.wrong is not None:
            raise TargetError(cause_of(job, found.wrong, found.error, batch, number, _alone(job, batch, number)))
        if batch.size < whole.size:
            _check_parts(job, whole, number, found.dtype)
        worst = max(worst, found.error, found.rounding)
        dtypes.append(found.dtype)
        unchecked |= set(found.unchecked)
    record = {"mode": mode, "batches": numbers, "error": worst, "unchecked": sorted(unchecked)}
    return record, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _alone(job: Job, batch: Batch, number: int) -> Alone:
    """How the check of the batch's first example by itself goes."""
    if batch.size == 1:
        return "wrong"
    if not batch.uniform:
        return "unknown"
    try:
        return "right" if _check(job, batch.head(1), number).wrong is None else "wrong"
    except (PeftLinearError, ValueError, RuntimeError):  # from the model: it needs the other examples
        return "fails"


class _Combined(OutputFunction):
    """One random ±1 combination of the outputs: one backward pass, whose cotangents the reference pass has too.

    But for their signs, exactly: gradients that are small by cancellation are mostly rounding.
    """

    def __init__(self, function: OutputFunction) -> None:
        super().__init__(function.output, shift=function.shift)
        self._function = function

    def __call__(self, model_output: Any, labels: Tensor | None) -> Tensor:
        outputs = self._function(model_output, labels)
        if outputs.ndim != 2 or outputs.shape[1] == 1:
            return outputs
        return outputs @ _signs(outputs.shape[1], 1).to(outputs) / outputs.shape[1] ** 0.5


def _check(job: Job, batch: Batch, number: int) -> Found:
    small = replace(job, batches=(batch,), function=_Combined(job.function))
    sizes: dict[str, tuple[Tensor, torch.dtype]] = {}
    with capturing(small, sizes, number) as capture:
        jacobians, outputs = capture(0)
    matrices = {
        key: matrix for name in job.layers for key, matrix in zip(job.keys(name), job.matrices[name], strict=True)
    }
    directions = {key: _directions(matrix.features) for key, matrix in matrices.items()}
    signs = _signs(*outputs.shape)
    expected, again = reference_gradients(small, directions, signs)
    dtype = max((outputs.dtype, *(of_key for _, of_key in sizes.values())), key=lambda d: torch.finfo(d).eps)
    _check_outputs(outputs, again, dtype, number)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # parts of many models work in float32 always
    largest = max((float(value.norm()) for value in expected.values() if value is not None), default=0.0)
    worst, most, wrong, unchecked, passed_by = 0.0, 0.0, None, [], []
    owners = {key: name for name in job.layers for key in job.keys(name)}
    for key, name in owners.items():
        reference, jacobian = expected[key], jacobians[key]
        called = jacobian is not None or key in sizes or name not in job.candidates
        if reference is not None and not called and bool(reference.any()):
            passed_by.append(name)
        if reference is None or not called:
            unchecked.append(name)
            continue
        assembled = _assembled(jacobian, signs, directions[key], reference)
        if not bool(assembled.isfinite().all()):
            raise not_finite(name, dtype)
        difference, size = float((assembled - reference).norm()), float(reference.norm())
        bound = max(float(sizes[key][0]), size) if key in sizes else size
        most = max(most, difference / max(bound, 1e-300))
        beyond_rounding = max(0.0, difference - eps * (2 * bound + largest))
        error = beyond_rounding / max(size, float(assembled.norm()), 1e-300)
        if error > worst:
            worst, wrong = error, (name if error > TOLERANCE[dtype] else None)
    if passed_by:
        raise TargetError(
            f"the model uses the weight of {', '.join(passed_by)} without calling the module, so hooks see nothing "
            'and an adapter would be without effect; leave it out of `targets`, or use space="lora", which gives it a '
            "kernel of zero"
        )
    return Found(worst, most, wrong, dtype, tuple(unchecked))


def _check_outputs(one: Tensor, other: Tensor, dtype: torch.dtype, number: int) -> None:
    difference = float((one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-300))
    if difference > TOLERANCE[dtype]:
        raise OutputError(
            f"two passes over batch {number} gave outputs that differ by {difference:.1e} (relative), in eval mode: "
            "the model draws random numbers, or changes itself, in its forward pass, so its kernel is not defined. "
            "Does it call F.dropout without training=self.training? Switch that off"
        )


def _check_parts(job: Job, whole: Batch, number: int, dtype: torch.dtype) -> None:
    """The first and the last examples have the same outputs without the others."""

    def outputs_of(part: Batch) -> Tensor:
        with differentiable(job.model, []), torch.no_grad():
            return evaluate(job.model, part.to(job.device), job.function, number).double()

    outputs, first, last = map(outputs_of, (whole, whole.head(EXAMPLES), whole.tail(EXAMPLES)))
    for one, other in ((outputs[:EXAMPLES], first), (outputs[-EXAMPLES:], last)):
        difference = float((one - other).norm() / one.norm().clamp_min(1e-300))
        if difference > PARTS * TOLERANCE[dtype]:
            _check_outputs(outputs, outputs_of(whole), dtype, number)
            raise OutputError(
                f"the outputs of {EXAMPLES} examples of batch {number} differ by {difference:.1e} (relative) when "
                "they are passed without the others: the model mixes the examples of a batch; pass batches of "
                "one example"
            )


def _assembled(jacobian: BatchJacobian | None, signs: Tensor, directions: Tensor, like: Tensor) -> Tensor:  # (p, l)
    """`Rᵀ Jᵀu` of the assembled Jacobian."""
    if jacobian is None:
        return torch.zeros_like(like)
    if isinstance(jacobian, Tensor):
        rows = torch.einsum("n,nkl->kl", signs.reshape(-1).to(jacobian), jacobian)
        return (directions.to(rows).T @ rows).double().cpu()
    inputs, cotangents = jacobian
    combined = torch.einsum("bc,bctl->btl", signs.to(cotangents), cotangents).flatten(0, 1)
    return ((inputs.flatten(0, 1) @ directions.to(inputs)).T @ combined).double().cpu()


def _first_of_each_structure(batches: Sequence[Batch]) -> list[int]:
    first: dict[Any, int] = {}
    for number, batch in enumerate(batches):
        first.setdefault(_structure(batch, number), number)
    return list(first.values())


def _structure(batch: Batch, number: int) -> tuple:
    """Equal where a model takes the same way: keys, dimensions, types, which first dimensions agree, one example.

    Beside token ids, a tensor of floating-point numbers, such as images, may belong to the examples in any way, so
    each such batch of several examples is a structure of its own.
    """
    lengths: list[int] = [batch.size]
    parts: list[tuple] = []
    for key, value in sorted(batch.inputs.items(), key=lambda item: str(item[0])):
        if not isinstance(value, Tensor) or not value.ndim:
            parts.append((str(key), type(value).__name__, repr(value)[:200]))
            continue
        if len(value) not in lengths:
            lengths.append(len(value))
        parts.append((str(key), value.ndim, str(value.dtype), lengths.index(len(value))))
    return *parts, batch.size == 1, number if batch.size > 1 and _has_media(batch.inputs) else -1


def _has_media(inputs: Mapping[str, Any]) -> bool:
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and "mask" not in str(key)}
    floats = [key for key, value in tensors.items() if value.is_floating_point() and value.ndim > 1]
    return "input_ids" in tensors and bool(floats)


def _directions(features: int) -> Tensor:  # (k, p)
    """R, of E[R Rᵀ] = 1; the identity where it is small."""
    if features <= DIRECTIONS:
        return torch.eye(features, dtype=torch.float64)
    generator = torch.Generator().manual_seed(features)
    return torch.randn(features, DIRECTIONS, generator=generator, dtype=torch.float64) / DIRECTIONS**0.5


def _signs(rows: int, columns: int) -> Tensor:
    """±1; the first two rows differ in every column, so that two examples are never told apart by chance."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    signs = torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.float64) * 2 - 1
    if rows > 1:
        signs[1] = -signs[0]
    return signs
