# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The decision as a plain value: which modules to adapt, with the evidence; the config it makes, and its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from ..errors import FileError, PeftLinearError
from ..functional.spectrum import Spectrum
from ..tuners.proximal_lora import ProximalLoraConfig
from .configs import check_exact, exact_fields
from .ranks import distribute_ranks, parse_rank_budget, plain_number, rank_patterns
from .saving import FORMAT, JSON_NAME, read_recommendation, write_recommendation
from .values import ModuleScore, Settings


Self = TypeVar("Self", bound="RecommendationData")


@dataclass(frozen=True, repr=False)
class RecommendationData:
    """The modules to adapt, best first, and everything the decision rests on; `Recommendation` adds the reports.

    Args:
        modules: Full names of the chosen modules, in the order in which the search took them.
        scores: A row for each candidate, best score first.
        predicted: What the linear theory predicts for the choice (keys of `selection.prediction.predict`), and under
            "all_candidates", "always_trained_only" and "before_training" the same for comparison.
        criterion: Name of the criterion.
        budget: As it was asked for.
        ridge: λ, in the unit of the kernel's eigenvalues.
        settings: How the decision was made.
        notes: What a reader must know before trusting it.
        spectra: Eigenvalues of the kernels of "chosen" and "all"; where there is an always-trained block, which both
            contain, also of that block ("always trained") and of the adapters without it ("chosen, adapters", "all,
            adapters").
    """

    modules: tuple[str, ...]
    scores: tuple[ModuleScore, ...]
    predicted: Mapping[str, Any]
    criterion: str
    budget: int | float | str | tuple[int | float | str, ...]
    ridge: float
    settings: Settings = field(default_factory=Settings)
    notes: tuple[str, ...] = ()
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.modules) - {row.name for row in self.scores}
        if unknown or not self.modules:
            raise PeftLinearError(f"a recommendation needs modules that have a score, got {sorted(unknown)} without")
        for name in ("predicted", "spectra"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[Any, ...]:  # mapping proxies cannot be pickled
        values = (getattr(self, f.name) for f in fields(self))
        return type(self), tuple(dict(value) if isinstance(value, Mapping) else value for value in values)

    @property
    def parameters(self) -> int:
        """Adapter parameters of the choice at the rank of the kernels."""
        return sum(row.parameters for row in self.scores if row.chosen)

    @property
    def step_time(self) -> float | None:
        """Time of a training step, as a share of an all-linear LoRA step at the kernels' rank; None: not known."""
        return self.settings.time_share

    @property
    def step_memory(self) -> float | None:
        """Memory of a training step, weights included, as a share of an all-linear LoRA step's; None: not known."""
        return self.settings.memory_share

    @property
    def signal(self) -> bool | None:
        """Whether the ranking of the candidates is more stable under resampling than chance; None: not known."""
        reliability = self.settings.reliability
        return None if reliability is None else reliability.signal

    def __repr__(self) -> str:
        return (
            f"Recommendation({len(self.modules)} of {len(self.scores)} modules, {self.parameters:,} parameters, "
            f"criterion={self.criterion!r}, modules={list(self.modules)})"
        )

    def to_config(
        self,
        r: int | str | None = None,
        lora_alpha: float | None = None,
        *,
        budget: float | str | None = None,
        **kwargs: Any,
    ) -> ProximalLoraConfig:
        """A config with which peft adapts exactly these modules and trains the head that was counted as trained.

        `target_modules` is the list of full names. peft also accepts a suffix as a match, so where a chosen name is
        the end of another module's it is one regular expression instead. `modules_to_save` names what was always
        trained (a classifier, which peft leaves frozen where its task types do not know it), unless it is passed.

        Args:
            r: Rank; default: the rank the kernels were computed for. "adaptive": those of `adaptive_ranks(budget)`,
                written into `rank_pattern`, with an `alpha_pattern` by which every module keeps the scaling (α/r, with
                `use_rslora` α/√r) that the uniform rank would have had.
            lora_alpha: Default: that of the kernels. With "adaptive": α of the uniform rank.
            budget: Of the parameters, with r="adaptive" only; see `adaptive_ranks`.
            **kwargs: Other fields of `ProximalLoraConfig` (`proximal_lambda`, `task_type`, …).

        Raises:
            PeftLinearError: a field is passed that the recommendation decides, or with which peft would adapt other
                modules; a module that peft cannot adapt; a budget without "adaptive"; or `adaptive_ranks` raises it.
        """
        decided = {"target_modules"} | ({"rank_pattern", "alpha_pattern"} if r == "adaptive" else set())
        if given := sorted(decided & set(kwargs)):
            raise PeftLinearError(f"the recommendation sets {', '.join(given)}; build the config by hand to change it")
        if isinstance(r, str) and r != "adaptive":
            raise PeftLinearError(f'r is a rank, "adaptive" or None, got {r!r}')
        if budget is not None and r != "adaptive":
            raise PeftLinearError(f'budget={budget!r} is distributed by r="adaptive"; got r={r!r}')
        candidates = [row.name for row in self.scores]
        kwargs |= exact_fields(self.modules, candidates, self.settings.kernels, kwargs)
        alpha: Any = self.settings.lora_alpha if lora_alpha is None else lora_alpha
        uniform: Any = self.settings.rank if r is None or r == "adaptive" else r
        if r == "adaptive":
            ranks = self.adaptive_ranks(budget)
            rslora = bool(kwargs.get("use_rslora"))
            kwargs["rank_pattern"], kwargs["alpha_pattern"] = rank_patterns(ranks, uniform, alpha, rslora)
        config = ProximalLoraConfig(r=uniform, lora_alpha=plain_number(alpha), **kwargs)
        check_exact(config, self.modules, candidates, self.settings.kernels)
        return config

    def adaptive_ranks(self, budget: float | str | None = None) -> dict[str, int]:
        """A rank for each chosen module, by its share of the effective dimension; see `selection.ranks`.

        Args:
            budget: Adapter parameters: a string ("1.5M", "200k"), a float in (0, 1] (fraction of what all candidates
                have at the uniform rank), or None: what the chosen modules have at the uniform rank. The uniform rank
                is that of the kernels, `settings.rank`.

        Raises:
            PeftLinearError: the recommendation was made by a version that did not keep effective dimensions.
            BudgetError: the budget is none of these, below rank 1 for every module, or above full rank.
        """
        dimensions, shapes = self.settings.effective_dimension, self.settings.shapes
        if not dimensions or not shapes:
            raise PeftLinearError(
                "this recommendation holds no effective dimensions, from which ranks are distributed: it was made by "
                "an earlier version. Recommend again, from the saved kernels if there are any"
            )
        parameters = {name: self.settings.rank * (d_in + d_out) for name, (d_in, d_out) in shapes.items()}
        uniform = sum(parameters[name] for name in self.modules)
        wanted = parse_rank_budget(budget, uniform, sum(parameters.values()))
        return distribute_ranks({name: dimensions[name] for name in self.modules}, shapes, wanted)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the spectra, as JSON-able values."""
        return {"format": FORMAT, **self._values()}

    def save(self, directory: str | os.PathLike) -> None:
        """Writes recommendation.json and spectra.safetensors into `directory` (made if it does not exist).

        The JSON is written last and holds checksums of both, so what was changed since is not loaded.

        Raises:
            FileError: the folder cannot be written, or a value could not be read again.
        """
        write_recommendation(directory, self._values(), self.spectra)

    @classmethod
    def load(cls: type[Self], directory: str | os.PathLike) -> Self:
        """Reads what `save` wrote; the result equals what was saved.

        Raises:
            FileError: the folder holds no recommendation, or one that is damaged or was changed since, or its two
                files do not belong together.
        """
        values = read_recommendation(directory)
        try:
            return cls(**values)
        except PeftLinearError as error:
            raise FileError(f"{Path(directory) / JSON_NAME}: {error}; save the recommendation again") from error

    def _values(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "spectra"}
        values["scores"] = [asdict(row) for row in self.scores]
        values["settings"] = self.settings.to_dict()
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
