# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""One ProximalLoRA adapter of one model: its factors, their anchors, its step counts."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from ...errors import PeftLinearError
from ...functional.second_moment import SecondMoment, stacked
from .anchors import ANCHOR_NAME, AnchorSource, FactorAnchor
from .config import ProximalLoraConfig
from .counts import Statistics
from .guard import MovementGuard
from .reference import REFERENCE_NAME, ProximalReference
from .strength import Strengths


class Factors(NamedTuple):
    """The two factors of one module, with their anchor."""

    name: str
    layer: LoraLayer
    a: nn.Parameter
    b: nn.Parameter
    anchor: FactorAnchor


class TrackedAdapter:
    """One ProximalLoRA adapter of one model."""

    def __init__(self, name: str, config: ProximalLoraConfig, layers: dict[str, LoraLayer]) -> None:
        self.name = name
        self.config = config
        self.strengths = Strengths(config, layers)
        self.statistics = Statistics()
        self.stepped = False  # whether an optimizer step has included this adapter
        # EVA sets A by a separate call after the adapter is made
        self.provisional = config.init_lora_weights == "eva"
        self._made_here = True  # not loaded from anywhere
        self._guessed = False  # the true anchor is unknown; this one is a guess (`FactorAnchor.continuing`)
        self._layers = {key: weakref.ref(layer) for key, layer in layers.items()}
        self._anchors: dict[str, FactorAnchor] = {}
        self._source: AnchorSource | None = None
        self._reference: ProximalReference | None = None
        self._stacks: dict[tuple, tuple[SecondMoment, list[float]]] = {}
        self._reference_source: AnchorSource | None = None  # where the reference is, before it is needed
        self._guard = MovementGuard(name, self.strengths)
        self.capture()
        self.arm()

    def layers(self) -> Iterator[tuple[str, LoraLayer, nn.Parameter, nn.Parameter]]:
        """The modules that have the adapter at present: name, layer, A, B."""
        for name, reference in self._layers.items():
            layer = reference()
            if layer is None:
                continue
            if self.name in layer.lora_A:
                a, b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
                yield name, layer, a, b  # type: ignore[misc]
            elif self.name in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A[self.name], layer.lora_embedding_B[self.name]
                yield name, layer, getattr(a, "weight", a), getattr(b, "weight", b)

    def factors(self) -> Iterator[Factors]:
        """The modules that have the adapter at present, with anchors on the factors' device and in their dtype.

        Raises:
            PeftLinearError: a factor does not have the shape of its anchor.
        """
        anchors = self.anchors()
        for name, layer, a, b in self.layers():
            anchor = anchors[name]
            anchor.follow(a, b)
            for letter, value, start in (("A", a, anchor.a), ("B", b, anchor.b)):
                if start is not None and start.shape != value.shape:
                    raise PeftLinearError(
                        f"lora_{letter} of {name!r} (adapter {self.name!r}) has shape {tuple(value.shape)}, its "
                        f"anchor {tuple(start.shape)}: the rank was changed after the adapter was made (then call "
                        "reset_proximal_anchor(model) of peft_linear.tuners.proximal_lora), or the parameters are "
                        "sharded (not supported)"
                    )
            yield Factors(name, layer, a, b, anchor)

    def anchors(self) -> dict[str, FactorAnchor]:
        """The anchors of the modules that have the adapter at present; shapes are not checked."""
        self._ensure_anchors()
        for name, layer, a, b in self.layers():
            if name not in self._anchors:  # it was on the meta device when the adapter was made
                self._anchors[name] = FactorAnchor.continuing(a, b, self._default_anchor(layer, a, b))
        return {name: self._anchors[name] for name, *_ in self.layers()}

    @property
    def worth_saving(self) -> bool:
        """Whether the anchor should be saved: some λ > 0, and the anchor is known or has been trained with."""
        return self.strengths.active() and (self.stepped or not self._guessed)

    def before_step(self) -> None:
        """To be called before every optimizer step that includes the adapter; the first call fixes the anchor."""
        self._ensure_anchors()
        if self.stepped:
            return
        if self.config.proximal_space == "function" and self.strengths.active():
            self.reference()
        if self._made_here:
            self._start_here_if_untrained()
        self.stepped = True

    def step_begins(self, parameters: list[nn.Parameter], begins: bool = True) -> None:
        """To be called before every optimizer step of these factors, and with `begins=False` if it raised."""
        self._guard.step_begins(parameters, begins)

    def step_ended(self, parameters: list[nn.Parameter]) -> None:
        """To be called after every optimizer step that included these factors."""
        if not self._guard.watches(parameters):  # replaced since: loaded with assign=True, sharded
            self.arm()
        if self._guard.watches(parameters):
            self._guard.stepped(parameters)

    def has_reference(self) -> bool:
        """Whether there is one, in memory or beside the weights that were loaded."""
        return self._reference is not None or (
            self._reference_source is not None and self._reference_source.path_of(REFERENCE_NAME) is not None
        )

    def reference(self) -> ProximalReference:
        """What function space measures distance by.

        Raises:
            PeftLinearError: there is none.
            FileError: it was saved with the adapter, and the file cannot be read or was changed.
        """
        if self._reference is None and self._reference_source is not None:
            path = self._reference_source.path_of(REFERENCE_NAME)
            if path is not None:
                self.set_reference(ProximalReference.load(path))
        if self._reference is None:
            raise PeftLinearError(
                f"adapter {self.name!r} has no reference, which proximal_space='function' measures distance by: call "
                "set_proximal_reference(model, collect_reference(model, batches)) of peft_linear after the adapter is "
                "made, or use proximal_space='delta'"
            )
        return self._reference

    def set_reference(self, reference: ProximalReference) -> None:
        """Checks and keeps it.

        Raises:
            PeftLinearError: it has no statistics of a module of the adapter, or the module is no linear layer.
        """
        wrong = [name for name, layer, a, b in self.layers() if not _is_linear(layer, a, b)]
        if wrong:
            raise PeftLinearError(
                f"function space is defined for linear layers, and adapter {self.name!r} has others: "
                f"{', '.join(wrong[:3])}; leave them out of target_modules, or use proximal_space='delta'"
            )
        reference.check({name: a.shape[1] for name, _, a, _ in self.layers()}, self.name)
        self._reference, self._stacks = reference, {}

    def moments(self, names: tuple[str, ...], like: Tensor) -> tuple[SecondMoment, list[float]]:
        """C of these modules, stacked, on the device and in the dtype of `like`, and g of each in units of λ.

        In these units the mean of g·tr(C)/d_in over the adapter's modules is 1.

        Kept between steps: one stack a set of modules.
        """
        reference = self.reference()
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        key = (names, like.device, dtype)
        if key not in self._stacks:
            moments = stacked([reference.moment(name).to(like.device, dtype) for name in names])
            unit = reference.unit([name for name, *_ in self.layers()]) or 1.0  # 0: no module of it has an influence
            self._stacks[key] = moments, [reference.scales[name] / unit for name in names]
        return self._stacks[key]

    def capture(self) -> None:
        """Makes the factors as they are now the anchor."""
        self._source, self._guessed = None, False
        self._anchors = {n: FactorAnchor.of(a, b) for n, _, a, b in self.layers() if not (a.is_meta or b.is_meta)}

    def capture_continuing(self) -> None:
        """Guesses the anchor of weights that were trained elsewhere (see `FactorAnchor.continuing`)."""
        self._source, self._guessed, self._made_here = None, True, False
        self._anchors = {
            name: FactorAnchor.continuing(a, b, self._anchors.get(name) or self._default_anchor(layer, a, b))
            for name, layer, a, b in self.layers()
        }

    def loaded_from(self, source: AnchorSource, trainable: bool) -> None:
        """To be called after weights were loaded: their anchor is the one saved with them, read when first needed."""
        self.provisional = self._made_here = False
        if self.stepped and not source.exists():
            return  # weights of this same run (λ = 0 saves no anchor): the anchor stays
        self._source = source
        self._reference_source = source if self._reference is None else None
        if trainable or not self.config.inference_mode:
            self._ensure_anchors()
            self.arm()
            return
        self._source = source.seen_now()
        for name, _, a, b in self.layers():  # for inference: keep which anchor is zero, and no copy of the other
            anchor = self._anchors.get(name)
            if anchor is not None and (anchor.a is None or anchor.b is None):
                anchor.a = None if anchor.a is None else a.detach()
                anchor.b = None if anchor.b is None else b.detach()

    def _start_here_if_untrained(self) -> None:
        """If the factors that start at zero still are, the present values of the others become their anchor.

        Between making the adapter and its first step, DDP and accelerate's FSDP2 copy the factors of rank 0 to all
        ranks: where ranks were seeded differently, the anchor taken before is not the start of training. Where no
        factor starts at zero, this case cannot be distinguished from loaded weights, and the anchor stays. Gathers
        sharded factors: all ranks must call it.
        """
        now = {name: FactorAnchor.of(a, b) for name, _, a, b in self.layers()}
        starts = {name: self._anchors[name] for name in now if name in self._anchors}
        if all(now[n].a is None or s.a is not None for n, s in starts.items()) and all(
            now[n].b is None or s.b is not None for n, s in starts.items()
        ):
            self._anchors |= {n: now[n] for n, s in starts.items() if s.a is None or s.b is None}

    def _default_anchor(self, layer: LoraLayer, a: Tensor, b: Tensor) -> FactorAnchor:
        return FactorAnchor(None, b) if self.name in layer.lora_embedding_A else FactorAnchor(a, None)

    def arm(self) -> None:
        """Guards the factors against updates that bypass the optimizer hooks."""
        pairs = [(f"lora_{x} of {n}", p) for n, _, a, b in self.layers() for x, p in (("A", a), ("B", b))]
        self._guard.watch([(n, p) for n, p in pairs if p.is_leaf and not (p.is_meta or p.is_inference())])

    def disarm(self) -> None:
        """Removes the guard."""
        self._guard.remove()

    def _ensure_anchors(self) -> None:
        if self._source is None:
            if self.provisional and not self.stepped:
                self.capture()
            return
        source = self._source
        stored = source.read({name: (a.shape, b.shape) for name, _, a, b in self.layers()})
        if stored is None:
            self.capture_continuing()
            if self.strengths.active() and (self.config.proximal_space == "factors" or self.config.proximal_selective):
                warnings.warn(
                    f"{source.path} has no {ANCHOR_NAME}: adapter {self.name!r} is pulled toward zero in the factor "
                    "that starts at zero (usually B), and toward its loaded value in the other"
                )
            return
        self._anchors, self._source, self._guessed = stored, None, False

    def __getstate__(self) -> dict[str, Any]:
        layers = {key: layer for key, reference in self._layers.items() if (layer := reference()) is not None}
        return {**self.__dict__, "_layers": layers, "_guard": None, "_stacks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layers = state.pop("_layers")
        self.__dict__.update(state, _layers={key: weakref.ref(layer) for key, layer in layers.items()})
        self._guard = MovementGuard(self.name, self.strengths)
        self.arm()


def _is_linear(layer: LoraLayer, a: Tensor, b: Tensor) -> bool:
    embedding = bool(layer.lora_embedding_A)
    return not (isinstance(layer, ParamWrapper) or embedding) and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
