# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`collect_reference`: the statistics that function space measures distance by, from one pass over reference data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..capture.batches import Batch, progress_bar, read_batches
from ..capture.conditions import check_present, device_of, gradient_errors, unwrapped
from ..capture.layers import Layer, layer_of
from ..capture.outputs import label_shift, logits_of
from ..capture.recorder import Recorder, recording
from ..capture.shared_inputs import identity, workable
from ..capture.targets import Targets, base_model, resolve_targets
from ..errors import OutputError, PeftLinearError
from ..functional.second_moment import MomentSketch
from ..tuners.proximal_lora.reference import ProximalReference
from .reference_data import adapters_off, counted_predictions, tokenised


LARGEST_SHARE, SMALL = 0.05, 10**7  # of the model's own size, and bytes, beyond which its user is told
ALIKE = 0.1  # share of positions in which modules that share a second moment may differ
SAMPLED = 256  # predictions whose probabilities are in memory at once


def collect_reference(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | Iterable[str],
    targets: Targets = "all-linear",
    *,
    tokenizer: Any = None,
    rank: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> ProximalReference:
    """What the pretrained model does on data that must not be forgotten, for `proximal_space="function"`.

    For every module: C, the second moment of its inputs, and g, the mean square of the cotangents of its outputs for
    log p with labels that are sampled from the model (so no labels are needed). Positions without influence on a
    prediction, such as padding, do not count. Modules with one input share its C, if they have influence at nearly the
    same positions of the first batch.

    Args:
        model: The pretrained model, or a PeftModel of it, whose adapters are off meanwhile. Left as it was found.
        batches: Dict batches of tensors, as a DataLoader gives them; or texts, with `tokenizer`. Where batches have
            token labels, only those other than -100 are predictions that count. In a run of several processes, all
            must get the same.
        targets: The modules, as for `compute_ntk`; must hold those that the adapter will have.
        tokenizer: Of texts, which are cut off after 512 tokens.
        rank: Of the low-rank part of C; what it leaves is on a diagonal of 16 values. Of SmolLM2-135M the default
            takes 13 MB.
        seed: Of the sampled labels, and of the random directions by which the low-rank part is found.
        progress: Whether to show a progress bar.

    Returns:
        The statistics, for `set_proximal_reference`; `print` says how large they are and what the rank holds.

    Raises:
        PeftLinearError: no batches, texts without a tokenizer, or an invalid rank.
        TargetError: unknown or unusable targets, a merged adapter, or a model without weights.
        OutputError: the model has no logits, they are not finite, or no prediction counts.

    Cost: one forward and one backward pass a batch, without gradients of parameters, in the memory of a LoRA step.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise PeftLinearError(f"rank must be a positive integer, got {rank!r}")
    model = unwrapped(model)
    check_present(model)
    layers = {name: layer_of(name, module) for name, module in resolve_targets(model, targets).items()}
    prepared = tokenised(batches, tokenizer)
    with adapters_off(model), torch.inference_mode(False):
        collector = _Collector(model, layers, rank, seed)
        read = read_batches(prepared, model, False, "a reference")
        with recording(model, layers) as recorder:
            for number, batch in enumerate(progress_bar(read, progress, "reference")):
                collector.add(recorder, batch, number)
        return collector.reference()


class _Collector:
    """Sums over the batches."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer], rank: int, seed: int) -> None:
        self._model, self._layers, self._rank = model, layers, rank
        self._labels = torch.Generator().manual_seed(seed)
        self._directions = torch.Generator().manual_seed(seed)
        self._shift = label_shift(base_model(model))
        self._inputs: dict[str, str] = {}  # module → the first module with its input
        self._addresses: dict[str, tuple] = {}  # of the inputs, in the present batch
        self._positions: dict[str, Tensor] = {}  # with influence, in the first batch that a module is used in
        self._sketches: dict[str, MomentSketch] = {}
        self._squares = dict.fromkeys(layers, 0.0)  # Σ ‖δ‖²
        self._tokens = 0

    def add(self, recorder: Recorder, batch: Batch, number: int) -> None:
        loss, tokens = self._sampled_loss(recorder, batch, number)
        if recorder.copy_changed_inputs():
            loss, tokens = self._sampled_loss(recorder, batch, number)
        self._tokens += tokens
        self._note_inputs(recorder)

        def take(name: str, call: int, cotangent: Tensor) -> None:
            self._take(recorder, name, call, cotangent)

        with gradient_errors():
            recorder.backward(loss, False, take)
        self._positions.clear()
        recorder.clear()

    def reference(self) -> ProximalReference:
        """What there is after the last batch."""
        if not self._tokens:
            raise OutputError(
                "no prediction of the reference counts: every text is one token, or every label is -100; pass longer "
                "texts"
            )
        unused = [name for name in self._layers if name not in self._inputs]
        scales = {name: self._squares[name] / self._layers[name].shape[1] / self._tokens for name in self._layers}
        for name in unused:
            self._inputs[name] = name
            self._sketches[name] = MomentSketch(self._layers[name].shape[0], 1, torch.device("cpu"), self._directions)
        found = {key: sketch.moment() for key, sketch in self._sketches.items()}
        if len(unused) == len(scales):
            raise OutputError("no module of the reference has an influence on a prediction; check `targets`")
        if unused:
            warnings.warn(
                f"{len(unused)} modules have no influence on a prediction of the reference ({unused[0]}, …): nothing "
                "will pull them"
            )
        dtype = torch.float64 if self._is_double() else torch.float32
        moments = {key: moment.to(dtype) for key, (moment, _) in found.items()}
        shares = {key: share for key, (_, share) in found.items()}
        reference = ProximalReference(
            moments, {name: self._inputs[name] for name in scales}, scales, shares, self._tokens, self._rank
        )
        size = sum(p.numel() * p.element_size() for p in base_model(self._model).parameters())
        if reference.num_bytes > max(LARGEST_SHARE * size, SMALL):
            warnings.warn(
                f"the reference takes {reference.num_bytes / 1e6:.1f} MB, {reference.num_bytes / size:.0%} of the "
                "model, in memory and beside every saved adapter; a smaller `rank` takes less"
            )
        return reference

    def _is_double(self) -> bool:
        parameters = (p for p in self._model.parameters() if p.is_floating_point())
        return next((p.dtype == torch.float64 for p in parameters), False)

    def _sampled_loss(self, recorder: Recorder, batch: Batch, number: int) -> tuple[Tensor, int]:
        """−log p of a label that is sampled at every prediction that counts, summed, and their number."""
        recorder.clear()
        batch = batch.to(device_of(self._model))
        logits = logits_of(self._model(**batch.inputs))
        counts = counted_predictions(logits, batch, self._shift)
        logits = (logits[:, :-1] if self._shift else logits)[counts]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if not bool(torch.isfinite(logits.detach()).all()):
            raise OutputError(f"the model's outputs in batch {number} of the reference are NaN or inf")
        if not len(logits):
            return logits.sum(), 0
        labels = [
            torch.multinomial(part.softmax(-1).cpu(), 1, generator=self._labels).squeeze(1)
            for part in logits.detach().split(SAMPLED)
        ]
        return cross_entropy(logits, torch.cat(labels).to(logits.device), reduction="sum"), len(logits)

    def _note_inputs(self, recorder: Recorder) -> None:
        """Which modules have one input: all recorded inputs are in memory now, so that addresses tell."""
        for name, calls in recorder.calls.items():
            self._addresses[name] = tuple(identity(call.inputs) for call in calls)

    def _take(self, recorder: Recorder, name: str, number: int, cotangent: Tensor) -> None:
        layer, call = self._layers[name], recorder.calls[name][number]
        cotangent = workable(layer.cotangents(cotangent, 1)[0])
        self._squares[name] += float(cotangent.double().square().sum())
        counted = (cotangent != 0).any(-1)
        if self._leader(name, counted) != name:
            return
        inputs = workable(layer.inputs(call.inputs, 1)[0])[counted]
        if name not in self._sketches:
            self._sketches[name] = MomentSketch(layer.shape[0], self._rank, inputs.device, self._directions)
        self._sketches[name].add(inputs)

    def _leader(self, name: str, counted: Tensor) -> str:
        """The module whose second moment this one shares: the first with its input and its positions, or itself.

        A few positions may differ: the first query of a causal model has no influence, its key has.
        """
        if name not in self._inputs:
            alike = (
                other
                for other, positions in self._positions.items()
                if self._addresses[other] == self._addresses[name]
                and int((positions != counted).sum()) <= ALIKE * int(counted.sum())
            )
            self._inputs[name] = next(alike, name)
            self._positions[name] = counted
        return self._inputs[name]
