# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Published selectors that use the network itself: its weights, their input features, the gradient of the loss.

Each gives a score a module, larger is better, from the formula of its source; `model_order` is the order of the
candidates that it makes. The baselines that need no network are in `by_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

from ...capture.batches import read_batches
from ...capture.recorder import recording
from ...capture.targets import Targets, base_model, resolve_always_trained, resolve_targets
from ...errors import CriterionError
from .model_statistics import ModelStatistics, weight_matrix, weight_parameter


_IQR_OF_A_NORMAL = 1.3489795003921634  # width of the middle half of a standard normal distribution


Score = Callable[[ModelStatistics], dict[str, float]]


def gradient_norm(model: ModelStatistics) -> dict[str, float]:
    """`‖Ḡ‖_F`."""
    return {name: float(gradient.norm()) for name, gradient in model.gradients().items()}


def page(model: ModelStatistics) -> dict[str, float]:
    """`s²·r/(3·d_in)·‖Ḡ‖²`, s = lora_alpha/r: the expected squared norm of LoRA's gradient at its start.

    The gradient in B is s·Ḡ·Aᵀ, and A has r rows with independent entries of variance 1/(3·d_in).
    """
    scaling = model.lora_alpha / model.rank
    return {
        name: scaling**2 * model.rank / (3 * gradient.shape[1]) * float(gradient.square().sum())
        for name, gradient in model.gradients().items()
    }


def relative_gradient_norm(model: ModelStatistics) -> dict[str, float]:
    """`‖Ḡ‖_F / ‖W‖_F`."""
    return {
        name: float(gradient.norm() / weight_matrix(model.modules[name]).norm())
        for name, gradient in model.gradients().items()
    }


def gora(model: ModelStatistics) -> dict[str, float]:
    """`mean |W ⊙ Ḡ|`: the importance by which GoRA (arXiv 2502.12171) distributes ranks."""
    return {
        name: float((weight_matrix(model.modules[name]) * gradient).abs().mean())
        for name, gradient in model.gradients().items()
    }


def fisher(model: ModelStatistics) -> dict[str, float]:
    """`Σ g²` over examples and weights: the trace of the empirical Fisher information of the weights, times N.

    The squared norms of the examples' gradients are the diagonal of the kernel of the loss in all weights, so one
    forward and one backward pass a batch give them.
    """
    total = dict.fromkeys(model.modules, 0.0)
    for batch in model.batches:
        for name, part in model.squared_gradients(batch).items():
            total[name] += part
    return total


def plop(model: ModelStatistics) -> dict[str, float]:
    """`mean‖W ẑ‖ / mean‖W û‖` over inputs ẑ and random û, both of norm 1 (PLoP, arXiv 2506.20629).

    Large where a module is aligned with its inputs. The source adapts the modules of the smallest numbers;
    `plop_low` is that order, and this is the other.
    """
    generator = torch.Generator().manual_seed(model.seed)
    scores = {}
    for name, calls in model.inputs().items():
        weight = weight_matrix(model.modules[name])
        features = torch.cat(calls).cpu().double() if calls else torch.zeros(1, weight.shape[1], dtype=torch.float64)
        features = nn.functional.normalize(features[features.norm(dim=1) > 0], dim=1)
        directions = torch.randn(256, weight.shape[1], generator=generator, dtype=torch.float64)
        directions = nn.functional.normalize(directions, dim=1)
        of_data = (features @ weight.T).norm(dim=1).mean() if len(features) else torch.zeros(())
        scores[name] = float(of_data / (directions @ weight.T).norm(dim=1).mean())
    return scores


def plop_low(model: ModelStatistics) -> dict[str, float]:
    """The order of PLoP itself: ascending alignment."""
    return {name: -score for name, score in plop(model).items()}


def signal_to_noise(model: ModelStatistics) -> dict[str, float]:
    """Spectrum's ratio (arXiv 2406.06623): singular values of W above a Marchenko–Pastur threshold, over those below.

    The threshold is `σ·(1 + sqrt(β))`, β the lesser dimension over the greater, σ the interquartile range of the
    singular values over 1.349; the ratio of sums is divided by the largest singular value. It uses no data.
    """
    scores = {}
    for name, module in model.modules.items():
        values = torch.linalg.svdvals(weight_matrix(module))
        low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64))
        shape = sorted(weight_matrix(module).shape)
        threshold = float(high - low) / _IQR_OF_A_NORMAL * (1 + (shape[0] / shape[1]) ** 0.5)
        signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
        largest = float(values[0])
        ratio = float(signal / noise) if noise > 0 else float("inf")
        scores[name] = ratio / largest if largest > 0 else 0.0
    return scores


def eva(model: ModelStatistics) -> dict[str, float]:
    """The ranks that peft's own EVA (arXiv 2410.07170) distributes by explained variance of the inputs, rho = 2."""
    names = list(model.modules)
    config = LoraConfig(
        r=model.rank,
        lora_alpha=model.lora_alpha,  # type: ignore[arg-type]
        target_modules=names,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )
    root = base_model(model.model)
    with recording(root, {}), torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        found = get_eva_state_dict(
            root,
            [batch.to(model.device).inputs for batch in model.batches],
            config,
            prepare_model_inputs_fn=lambda inputs, _: inputs.get("attention_mask"),
            prepare_layer_inputs_fn=_unpadded,
            show_progress_bar=False,
        )
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in found.items()}
    return {name: float(ranks.get(name, 0)) for name in names}


MODEL_BASELINES: Mapping[str, Score] = MappingProxyType(
    {
        "weight_gradient_norm": gradient_norm,
        "page": page,
        "relative_gradient_norm": relative_gradient_norm,
        "gora": gora,
        "fisher": fisher,
        "plop": plop,
        "plop_low": plop_low,
        "signal_to_noise": signal_to_noise,
        "eva": eva,
    }
)


def model_scores(
    name: str,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: Targets = "all-linear",
    rank: int = 8,
    lora_alpha: float = 16.0,
    seed: int = 0,
) -> dict[str, float]:
    """The scores of the selector `name`, larger is better, by module in model order.

    Args:
        name: one of `MODEL_BASELINES`.
        model, batches, targets, rank, lora_alpha: as in `compute_ntk`; batches need labels where the selector takes
            a gradient. The model is left as it was found.
        seed: of random directions.

    Raises:
        CriterionError: an unknown name.
        TargetError: targets that are unusable, or whose weights are no matrix of numbers (quantised ones), or of
            which none takes a gradient.
        OutputError: labels are needed and missing.
    """
    if name not in MODEL_BASELINES:
        raise CriterionError(f"unknown selector {name!r}; there are: {', '.join(MODEL_BASELINES)}")
    modules = resolve_targets(model, targets, reserved=resolve_always_trained(model, None))
    for module_name, module in modules.items():
        weight_parameter(module_name, module)
    needs_labels = name not in ("plop", "plop_low", "signal_to_noise", "eva")
    read = read_batches(batches, model, needs_labels, f"the selector {name!r}")
    return MODEL_BASELINES[name](ModelStatistics(model, modules, read, rank, lora_alpha, seed))


def model_order(name: str, model: nn.Module, batches: Iterable[Mapping[str, Any]], **kwargs: Any) -> tuple[str, ...]:
    """The candidates by descending `model_scores`, best first; ties in model order."""
    scores = model_scores(name, model, batches, **kwargs)
    return tuple(sorted(scores, key=lambda module: -scores[module]))


def _unpadded(layer_input: Any, mask: Tensor | None, layer_name: str) -> Tensor:
    """The positions (·, d_in) of a layer's input that are not padding, where there is a mask of its shape."""
    inputs = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if mask is not None and mask.shape == inputs.shape[:-1]:
        return inputs[mask.bool()]
    return inputs.reshape(-1, inputs.shape[-1]).contiguous()  # peft views it as a vector
