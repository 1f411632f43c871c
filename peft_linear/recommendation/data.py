# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The decision as a plain value: which modules to adapt, with the evidence; the config it makes, and its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import FileError, PeftLinearError
from ..functional.spectrum import Spectrum
from ..tuners.proximal_lora import ProximalLoraConfig
from .configs import check_exact, rule_of, rule_options, saved_fields
from .ranks import distribute_ranks, parse_rank_budget, plain_number, rank_patterns
from .rules import Rule
from .saving import FORMAT, JSON_NAME, read_recommendation, write_recommendation
from .tools import Plan, tool_yaml, training_arguments
from .values import ModuleScore, OptionScore, Settings


if TYPE_CHECKING:
    from transformers import TrainingArguments

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
        ridge: λ, in the unit of the kernel's eigenvalues; None where no kernel was computed.
        settings: How the decision was made.
        notes: What a reader must know before trusting it.
        spectra: Eigenvalues of the kernels of "chosen" and "all"; where there is an always-trained block, which both
            contain, also of that block ("always trained") and of the adapters without it ("chosen, adapters", "all,
            adapters").
        module_ranks: {chosen module: rank}, read as `ranks`; empty: the rank of the kernels for each.
        learning_rate: For training this choice at these ranks; None: none was recommended.
        learning_rate_interval: Between which the best rate lies; None: not known.
        options: The sets that were weighed as a whole, for language models; all linear modules are the first.
    """

    modules: tuple[str, ...]
    scores: tuple[ModuleScore, ...]
    predicted: Mapping[str, Any]
    criterion: str
    budget: int | float | str | tuple[int | float | str, ...]
    ridge: float | None
    settings: Settings = field(default_factory=Settings)
    notes: tuple[str, ...] = ()
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    module_ranks: Mapping[str, int] = field(default_factory=dict)
    learning_rate: float | None = None
    learning_rate_interval: tuple[float, float] | None = None
    options: tuple[OptionScore, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.modules) - {row.name for row in self.scores}
        if unknown or not self.modules:
            raise PeftLinearError(f"a recommendation needs modules that have a score, got {sorted(unknown)} without")
        ranks = self.module_ranks
        if ranks and (set(ranks) != set(self.modules) or any(rank < 1 for rank in ranks.values())):
            raise PeftLinearError(f"module_ranks need a rank of at least 1 for each chosen module, got {dict(ranks)}")
        for name in ("predicted", "spectra", "module_ranks"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[Any, ...]:  # mapping proxies cannot be pickled
        values = (getattr(self, f.name) for f in fields(self))
        return type(self), tuple(dict(value) if isinstance(value, Mapping) else value for value in values)

    @property
    def parameters(self) -> int:
        """Adapter parameters of the choice at its ranks."""
        return sum(self._parameters(row) for row in self.scores if row.chosen)

    @property
    def ranks(self) -> dict[str, int]:
        """{chosen module: rank}, in the order of `modules`."""
        return {name: self.module_ranks.get(name, self.settings.rank) for name in self.modules}

    @cached_property
    def rule(self) -> Rule:
        """The choice and its ranks as the simplest rule of peft: `print(rec.rule)` says it in a sentence."""
        return rule_of(self.ranks, self.candidates, self.settings.kernels)

    @property
    def target_modules(self) -> str | list[str]:
        """What the rule says of modules: "all-linear", types, a regular expression or names.

        A rule of some layers needs `rec.rule.layers_to_transform` beside it; `to_config` has all of it.
        """
        targets = self.rule.target_modules
        return targets if isinstance(targets, str) else list(targets)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of all candidates, in model order where it is known."""
        names = [row.name for row in self.scores]
        place = {name: index for index, name in enumerate(self.settings.candidates)}
        return tuple(sorted(names, key=lambda name: place.get(name, len(place))))

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

        `target_modules` and what restricts it is the simplest exact rule (`rec.rule`). `modules_to_save` names what
        was always trained (a classifier, which peft leaves frozen where its task types do not know it), unless it is
        passed.

        Args:
            r: Rank of all modules; default: `rec.ranks`. "adaptive": those of `adaptive_ranks(budget)`,
                written into `rank_pattern`, with an `alpha_pattern` by which every module keeps the scaling (α/r, with
                `use_rslora` α/√r) that the uniform rank would have had.
            lora_alpha: Default: that of the kernels. With "adaptive": α of the uniform rank.
            budget: Of the parameters, with r="adaptive" only; see `adaptive_ranks`.
            **kwargs: Other fields of `ProximalLoraConfig` (`proximal_lambda`, `task_type`, …).

        Raises:
            PeftLinearError: a field is passed that the recommendation decides, or with which peft would adapt other
                modules; a module that peft cannot adapt; a budget without "adaptive"; or `adaptive_ranks` raises it.
        """
        rule = self.rule if r is None else self._uniform_rule
        ranked = {"rank_pattern", "alpha_pattern"} if r == "adaptive" else {"rank_pattern"} & set(rule.config_fields())
        if given := sorted(({"target_modules"} | ranked) & set(kwargs)):
            raise PeftLinearError(f"the recommendation sets {', '.join(given)}; build the config by hand to change it")
        if isinstance(r, str) and r != "adaptive":
            raise PeftLinearError(f'r is a rank, "adaptive" or None, got {r!r}')
        if budget is not None and r != "adaptive":
            raise PeftLinearError(f'budget={budget!r} is distributed by r="adaptive"; got r={r!r}')
        saved = saved_fields(self.modules, self.candidates, self.settings.kernels, kwargs)
        kwargs = {**rule.config_fields(), **saved, **kwargs}
        alpha: Any = self.settings.lora_alpha if lora_alpha is None else lora_alpha
        uniform: Any = rule.rank if r is None or r == "adaptive" else r
        if r == "adaptive":
            ranks = self.adaptive_ranks(budget)
            rslora = bool(kwargs.get("use_rslora"))
            kwargs["rank_pattern"], kwargs["alpha_pattern"] = rank_patterns(ranks, uniform, alpha, rslora)
        config = ProximalLoraConfig(r=uniform, lora_alpha=plain_number(alpha), **kwargs)
        check_exact(config, self.modules, self.candidates, self.settings.kernels)
        return config

    def to_yaml(self, tool: str) -> str:
        """The adapter part of a tool's file: modules, ranks, α, what is trained in full, the learning rate.

        What the tool has no field for is said in another form, and a comment says so.

        Args:
            tool: "axolotl", "llamafactory" or "trl".

        Raises:
            PeftLinearError: the tool is unknown, or would train something else (TRL and LLaMA-Factory have one rank).
        """
        provenance = self.settings.kernels
        saved = saved_fields(self.modules, self.candidates, provenance, {}).get("modules_to_save", ())
        plan = Plan(
            ranks=self.ranks,
            candidates=self.candidates,
            options=rule_options(self.candidates, provenance),
            rule=self.rule,
            lora_alpha=self.settings.lora_alpha,
            saved=saved,
            learning_rate=self.learning_rate,
            interval=self.learning_rate_interval,
        )
        return tool_yaml(tool, plan)

    def to_training_arguments(self, output_dir: str | os.PathLike, **kwargs: Any) -> TrainingArguments:
        """`transformers.TrainingArguments` with what is known: learning rate, planned optimizer, batch size and steps.

        Args:
            output_dir: As for `TrainingArguments`.
            **kwargs: Other arguments, and those that are to be different. With `num_train_epochs` the steps are left
                out.

        Raises:
            PeftLinearError: no learning rate was recommended, and none is passed.
        """
        return training_arguments(output_dir, self.settings, self.learning_rate, kwargs)

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

    def _parameters(self, row: ModuleScore) -> int:
        rank, shape = self.module_ranks.get(row.name, self.settings.rank), self.settings.shapes.get(row.name)
        return row.parameters if rank == self.settings.rank or shape is None else rank * sum(shape)

    @property
    def _uniform_rule(self) -> Rule:
        ranks = dict.fromkeys(self.modules, self.settings.rank)
        return rule_of(ranks, self.candidates, self.settings.kernels)

    def _values(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "spectra"}
        values["scores"] = [asdict(row) for row in self.scores]
        values["options"] = [asdict(option) for option in self.options]
        values["settings"] = self.settings.to_dict()
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
