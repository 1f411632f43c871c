# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Candidates that are scored, but not chosen while others can use the budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear import ModuleKernels, recommend, recommend_modules
from peft_linear.errors import PeftLinearError, TargetError
from peft_linear.recommendation.budget import Budget
from peft_linear.selection.exclusion import excluded_candidates
from peft_linear.selection.search.search import STRATEGIES
from tests.helpers.planted import BERT_NAMES, planted_kernels
from tests.helpers.small_models import bert, seeded, text_batches


POOLER = "bert.pooler.dense"
NAMES = (*BERT_NAMES[:5], POOLER)


@pytest.fixture(scope="module")
def kernels():
    """The pooler is the best by far, then one of the layers."""
    planted = planted_kernels(names=NAMES, informative=(2, 5))
    return replace(planted, blocks={n: planted[n] * (4.0 if n == POOLER else 1.0) for n in planted.names})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("criterion", ["gradient_energy", "leave_one_out", "risk_reduction"])
@pytest.mark.parametrize("budget", [1, 3, 5, 0.5, "2k"])
def test_the_choice_is_that_among_the_others(kernels, strategy, criterion, budget):
    rec = recommend(kernels, budget, criterion, strategy=strategy)
    others = kernels.select_modules(BERT_NAMES[:5])
    budget = budget if isinstance(budget, int) else f"{rec.settings.budget_parameters}"
    alone = recommend(others, budget, criterion, ridge=rec.ridge, strategy=strategy)
    assert rec.modules == alone.modules and POOLER not in rec.modules
    assert rec.settings.excluded == (POOLER,) and alone.settings.excluded == ()
    assert [row.name for row in rec.scores if row.name != POOLER] == [row.name for row in alone.scores]
    (row,) = (row for row in rec.scores if row.name == POOLER)
    assert not row.chosen and "excluded by `exclude`" in row.reason


def test_without_a_signal_all_are_advised_but_it_where_examples_are_few():
    planted = planted_kernels(names=(*BERT_NAMES, POOLER), seed=1, examples=40, informative=())
    (note,) = (note for note in recommend(planted, 9).notes if note.startswith("No signal"))
    assert note.endswith("which has about as many parameters; with few examples leave out bert.pooler.dense.")
    (note,) = (note for note in recommend(planted, 9, exclude=()).notes if note.startswith("No signal"))
    assert note.endswith("which has about as many parameters.")


def test_it_says_so_and_can_be_told_not_to(kernels):
    rec = recommend(kernels, 2, "gradient_energy")
    assert rec.scores[0].name == POOLER
    assert any(note.startswith(f"{POOLER}: excluded by `exclude`") for note in rec.notes)
    told = recommend(kernels, 2, "gradient_energy", exclude=())
    assert told.modules[0] == POOLER and not any("excluded by `exclude`" in note for note in told.notes)
    assert recommend(kernels, 2, "gradient_energy", exclude=["query"]).settings.excluded == (BERT_NAMES[0],)
    assert recommend(kernels, 2, "gradient_energy", exclude="query").settings.excluded == (BERT_NAMES[0],)
    weak = replace(kernels, blocks={n: kernels[n] * (1e-3 if n == POOLER else 1.0) for n in kernels.names})
    assert not any("excluded by `exclude`" in note for note in recommend(weak, 2, "gradient_energy").notes)


@pytest.mark.parametrize("budget", [6, 1.0, "6000"])
def test_a_budget_for_all_takes_all(kernels, budget):
    rec = recommend(kernels, budget, "gradient_energy")
    assert set(rec.modules) == set(NAMES) and rec.settings.excluded == ()


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    poolers=st.lists(st.integers(1, 9), max_size=3),
    modules=st.integers(1, 8),
    parameters=st.integers(1, 80),
)
def test_it_is_none_where_the_others_cannot_use_the_budget(sizes, poolers, modules, parameters):
    others = {f"layer.{i}": size for i, size in enumerate(sizes)}
    everything = others | {f"x.{i}.pooler": size for i, size in enumerate(poolers)}
    for budget in (Budget(modules, None), Budget(None, parameters)):
        found = excluded_candidates(everything, budget)
        assert set(found) <= set(everything) - set(others)
        all_fit = budget.fits(len(everything), sum(everything.values()))
        usable = modules <= len(others) if budget.modules else min(sizes) <= parameters
        assert bool(found) == (bool(poolers) and not all_fit and usable)
        assert not found or len(found) == len(poolers)


def test_from_a_model():
    model, batches = seeded(bert), text_batches()
    rec = recommend_modules(model, batches, 3, progress=False)
    assert rec.settings.excluded == (POOLER,) and POOLER not in rec.modules
    assert recommend_modules(model, batches, 3, exclude=(), progress=False).settings.excluded == ()


@pytest.mark.parametrize("exclude", [3, None, [1], (None,)])
def test_what_names_nothing_is_refused(kernels, exclude, monkeypatch):
    with pytest.raises(PeftLinearError, match="exclude must be components of module names"):
        recommend(kernels, 2, "gradient_energy", exclude=exclude)
    model = seeded(bert)
    monkeypatch.setattr(model, "forward", None)  # it is refused before any pass
    with pytest.raises(PeftLinearError, match="exclude must be components of module names"):
        recommend_modules(model, text_batches(), 3, exclude=exclude)


def test_selected_modules_are_the_same_blocks(kernels, tmp_path):
    some = kernels.select_modules([POOLER, NAMES[1]])
    assert some.names == (NAMES[1], POOLER) and some.num_parameters == {NAMES[1]: 1000, POOLER: 1000}
    assert torch.equal(some[POOLER], kernels[POOLER]) and torch.equal(some.base, kernels.base)
    kernels.save(tmp_path / "kernels.safetensors")
    lazy = ModuleKernels.load(tmp_path / "kernels.safetensors", lazy=True).select_modules(some.names)
    assert lazy.lazy and torch.equal(lazy.subset(), some.subset())
    with pytest.raises(TargetError, match="no kernel of a module 'other'"):
        kernels.select_modules(["other"])
