# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`recommend` on planted answers, and the value it returns."""

import copy
import json
import pickle
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from peft_linear.errors import BudgetError, CriterionError, FileError, KernelError, OutputError, PeftLinearError
from peft_linear.functional.regression import leave_one_out_residuals
from peft_linear.selection import CRITERIA, Recommendation, Training, adam_preconditioned, default_ridge, recommend
from peft_linear.selection.criteria import DEFAULT_CRITERION, View
from peft_linear.selection.prediction import before_training, predict
from peft_linear.selection.problem import Problem
from tests.helpers.planted import BERT_NAMES, planted_kernels


@pytest.fixture(scope="module")
def kernels():
    return planted_kernels()


@pytest.fixture(scope="module")
def rec(kernels):
    return recommend(kernels, budget=2)


def test_the_planted_modules_are_recommended(kernels, rec):
    assert set(rec.modules) == {kernels.names[2], kernels.names[5]}
    assert rec.criterion == DEFAULT_CRITERION
    assert [row.name for row in rec.scores[:2] if row.chosen] == [row.name for row in rec.scores[:2]]
    assert all(row.rank > 2 for row in rec.scores if not row.chosen)


def test_a_reversed_criterion_fails_the_plant(kernels, monkeypatch):
    """What would happen if a direction were wrong: the planted modules come last."""
    flipped = replace(CRITERIA["leave_one_out"], higher_is_better=True)
    monkeypatch.setattr("peft_linear.selection.criteria.CRITERIA", {"leave_one_out": flipped})
    rec = recommend(kernels, budget=2, criterion="leave_one_out", ridge=1.0)
    assert not {kernels.names[2], kernels.names[5]} & set(rec.modules)


@pytest.mark.parametrize("budget", [3, 0.375, "3k"])
@pytest.mark.parametrize("strategy", ["greedy", "top"])
def test_budgets_and_strategies(kernels, budget, strategy):
    rec = recommend(kernels, budget, strategy=strategy)
    assert len(rec.modules) == 3
    assert rec.parameters == 3000
    assert {kernels.names[2], kernels.names[5]} <= set(rec.modules)
    assert rec.budget == budget and type(rec.budget) is type(budget)
    assert rec.settings.strategy == strategy


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion_gives_a_whole_recommendation(kernels, criterion):
    rec = recommend(kernels, 3, criterion)
    assert rec.criterion == criterion
    assert len(rec.modules) == 3
    assert [row.rank for row in rec.scores] == list(range(1, 9))
    assert {row.name for row in rec.scores if row.chosen} == set(rec.modules)
    ordered = [CRITERIA[criterion].utility(row.score) for row in rec.scores]
    assert ordered == sorted(ordered, reverse=True)
    assert all(row.condition_number >= 1 for row in rec.scores)
    assert rec.settings.higher_is_better == CRITERIA[criterion].higher_is_better
    json.dumps(rec.to_dict(), allow_nan=False)


def test_every_reason_is_a_sentence_with_the_numbers(kernels):
    rec = recommend(kernels, 2, "leave_one_out")
    for row in rec.scores:
        assert f"{row.score:.4g}" in row.reason
        assert f"rank {row.rank} of 8" in row.reason
        assert row.reason.startswith("pick" if row.chosen else "not chosen")
    first = next(row for row in rec.scores if row.name == rec.modules[0])
    start = CRITERIA["leave_one_out"](kernels.base, Problem.of(kernels, rec.ridge))
    change = f"by {start - first.score:.2g} (from {start:.4g} to {first.score:.4g})"
    assert f"pick 1 of 2: lowers the leave-one-out error {change}" in first.reason
    rejected = next(row for row in rec.scores if not row.chosen)
    assert "in place of the last pick it would give leave-one-out error" in rejected.reason
    assert "worse than the pick" in rejected.reason


def test_reasons_tell_when_a_pick_harms_and_when_a_tie_or_the_price_decides():
    kernels = planted_kernels()
    harm = recommend(kernels, 6, "leave_one_out", ridge=0.05)
    assert any("(worse; the best module that still fits)" in row.reason for row in harm.scores if row.chosen)
    same = replace(kernels, blocks=dict.fromkeys(kernels.names, kernels[kernels.names[2]]))
    tie = recommend(same, 1, "trace")
    assert all(
        "tied with the pick, which is earlier in the model" in row.reason for row in tie.scores if not row.chosen
    )
    eye = torch.eye(108, dtype=torch.float64)
    priced = planted_kernels(names=BERT_NAMES[:5], informative=(), sizes=[100, 100, 100, 150, 150], head=0.0)
    gains = zip(priced.names, (2.0, 2.0, 2.0, 2.1, 2.1), strict=True)
    dear = replace(priced, blocks={name: gain * eye for name, gain in gains})
    rec = recommend(dear, "350", "risk_reduction", ridge=1.0)
    assert rec.modules == BERT_NAMES[:3]
    assert sum("better than the pick, but worse per parameter" in r.reason for r in rec.scores) == 2
    blind = replace(
        kernels,
        base=torch.zeros_like(kernels.base),
        blocks=dict.fromkeys(kernels.names[1:], 0 * eye) | {kernels.names[0]: eye},
    )
    flat = recommend(replace(blind, blocks={n: blind.blocks[n] for n in kernels.names}), 2, "trace")
    assert any("leaves the trace at 108" in row.reason for row in flat.scores if row.chosen)


def test_reasons_tell_what_did_not_fit():
    kernels = planted_kernels(names=BERT_NAMES[:4], informative=(1,), sizes=[100, 150, 5000, 120])
    rec = recommend(kernels, budget="300", criterion="gradient_energy")
    large = next(row for row in rec.scores if row.parameters == 5000)
    assert "its 5,000 parameters do not fit beside the choice" in large.reason
    assert "do not fit" not in "".join(row.reason for row in rec.scores if row.chosen)
    top = recommend(kernels, budget=1, criterion="gradient_energy", strategy="top")
    assert any("not chosen: gradient energy alone" in row.reason for row in top.scores)


def test_predictions_are_of_the_choice_and_of_the_rest(kernels, rec):
    problem = Problem.of(kernels, rec.ridge)
    plain = View(kernels, problem)
    training = {"learning_rate": rec.settings.learning_rate, "steps": rec.settings.steps}
    seen = adam_preconditioned(kernels)
    trained = View(seen, Problem.of(seen, rec.settings.criterion_ridge, **training))
    for key, value in predict(plain, rec.modules, trained).items():
        assert rec.predicted[key] == value
    assert rec.predicted["all_candidates"] == predict(plain, kernels.names, trained)
    assert rec.predicted["always_trained_only"] == predict(plain, [], trained)
    assert rec.predicted["before_training"] == before_training(problem)
    assert rec.predicted["parameters"] == 2000
    assert rec.predicted["adapter_distance"] < rec.predicted["distance"]
    assert rec.predicted["accuracy"] > rec.predicted["before_training"]["accuracy"]


def test_predicted_distance_loss_and_accuracy_by_other_means(kernels, rec):
    gram, ridge = kernels.subset(rec.modules), rec.ridge
    problem = Problem.of(kernels, ridge)
    factor = torch.linalg.cholesky(gram + 1e-12 * torch.eye(len(gram)))  # a Jacobian with this kernel
    theta = torch.linalg.solve(factor.T @ factor + ridge * torch.eye(len(gram)), factor.T @ problem.residual)
    assert rec.predicted["distance"] == pytest.approx(float(theta.norm()), rel=1e-6)
    fitted = kernels.outputs + (factor @ theta).view_as(kernels.outputs)
    expected = float((problem.targets - fitted).square().sum(1).mean())
    assert rec.predicted["training_squared_loss"] == pytest.approx(expected, rel=1e-6)
    left_out = leave_one_out_residuals(gram, problem.residual, ridge, 3).view_as(problem.targets)
    hits = (problem.targets - left_out).argmax(1) == kernels.labels
    assert rec.predicted["leave_one_out_accuracy"] == pytest.approx(float(hits.double().mean()))


def test_log_likelihoods():
    kernels = planted_kernels(output_kind="log_likelihood")
    rec = recommend(kernels, 2)
    assert rec.criterion == "leave_one_out"
    assert "loss" not in rec.predicted
    assert rec.predicted["before_training"]["loss"] == pytest.approx(-float(kernels.outputs.mean()))
    assert rec.predicted["distance"] > 0
    loss = replace(kernels, output_kind="loss", outputs=-kernels.outputs)
    assert recommend(loss, 2).predicted["before_training"] == rec.predicted["before_training"]
    assert recommend(loss, 2).modules == rec.modules


def test_unlabelled_kernels_allow_what_needs_no_labels(kernels):
    unlabelled = replace(kernels, labels=None)
    rec = recommend(unlabelled, 2, "trace")
    assert rec.predicted["before_training"] == {}
    assert rec.ridge == pytest.approx(float(kernels.subset().trace()) / len(kernels.base))
    assert recommend(unlabelled, 2).criterion == "trace"
    with pytest.raises(OutputError, match="cannot be computed from logits without labels"):
        recommend(unlabelled, 2, "gradient_energy")


def test_without_always_trained_parameters(kernels):
    rec = recommend(replace(kernels, base=torch.zeros_like(kernels.base)), 2)
    assert set(rec.spectra) == {"chosen", "all"}
    assert "always_trained_only" not in rec.predicted
    assert rec.predicted["adapter_distance"] == pytest.approx(rec.predicted["distance"])


def test_the_default_ridge_minimises_the_leave_one_out_error_and_follows_the_scale(kernels):
    ridge = default_ridge(kernels)
    problem, gram = Problem.of(kernels, 1.0), kernels.subset()

    def error(value):
        return float(leave_one_out_residuals(gram, problem.residual, value, 3).square().sum())

    mean = float(gram.trace()) / len(gram)
    assert 1e-3 * mean <= ridge <= 10.001 * mean
    assert all(error(ridge) <= error(f * ridge) for f in (0.3, 3.0) if 1e-3 * mean <= f * ridge <= 10 * mean)
    scaled = replace(kernels, blocks={n: 9.0 * kernels[n] for n in kernels.names}, base=9.0 * kernels.base)
    assert default_ridge(scaled) == pytest.approx(9 * ridge)


def test_same_seed_same_answer_and_order_of_examples_does_not_matter(kernels, rec):
    assert recommend(kernels, 2) == rec
    shuffled = kernels.select_examples(torch.randperm(36, generator=torch.Generator().manual_seed(1)))
    for criterion in ("default-by-evidence", "leave_one_out"):
        one, other = (recommend(of, 2, criterion, training=Training(optimizer="adamw")) for of in (kernels, shuffled))
        assert one.modules == other.modules
        for ours, theirs in zip(one.scores, other.scores, strict=True):
            assert ours.score == pytest.approx(theirs.score, rel=1e-8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 0}, BudgetError, "a budget of 0 modules"),
        ({"budget": 9}, BudgetError, "a budget of 9 modules, but there are 1 to 8"),
        ({"budget": "many"}, BudgetError, "cannot read the budget"),
        ({"criterion": "best"}, CriterionError, "unknown criterion 'best'"),
        ({"strategy": "best"}, CriterionError, "unknown strategy 'best'"),
        ({"ridge": 0.0}, KernelError, "ridge must be a finite number > 0"),
        ({"ridge": float("nan")}, KernelError, "ridge must be a finite number > 0"),
    ],
)
def test_refused_before_work(kernels, arguments, error, message, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("work was done before the arguments were checked")

    module = sys.modules["peft_linear.selection.recommend"]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "score_modules", work)
    monkeypatch.setattr(module, "Views", work)
    with pytest.raises(error, match=message):
        recommend(kernels, **{"budget": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, PeftLinearError, "steps ≥ 1"),
        ({"learning_rate": -1.0}, PeftLinearError, "a finite learning rate > 0, got"),
        ({"learning_rate": float("nan")}, PeftLinearError, "a finite learning rate > 0, got"),
        ({"batch_size": 0}, PeftLinearError, "batch_size of the training must be at least 1, got 0"),
        ({"optimizer": "lion"}, CriterionError, "unknown optimizer 'lion'; there are: sgd, adamw"),
    ],
)
def test_a_training_that_cannot_be_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Training(**arguments)


def test_a_zero_kernel_is_refused(kernels):
    zero = torch.zeros_like(kernels.base)
    with pytest.raises(KernelError, match="has trace 0: the outputs do not depend on them"):
        recommend(replace(kernels, blocks=dict.fromkeys(kernels.names, zero), base=zero), 2)


def test_notes(kernels, rec):
    few = recommend(kernels.select_examples(range(12)), 2)
    assert any(note.startswith("Only 12 examples") for note in few.notes)
    assert not any(note.startswith("Only") for note in rec.notes)
    same = replace(kernels, blocks=dict.fromkeys(kernels.names, kernels[kernels.names[2]]))
    assert any("hardly better than a random one" in note for note in recommend(same, 2, "leave_one_out").notes)
    assert not any("hardly better" in note for note in rec.notes)
    spread = replace(kernels, spread={kernels.names[0]: 0.5, kernels.names[1]: 0.01})
    assert any("The kernels of 1 of 8 modules differ by more than 30%" in note for note in recommend(spread, 2).notes)
    wide = recommend(kernels, 6, "leave_one_out", ridge=0.05)
    assert any("is best with the first" in note and "A smaller budget may be enough" in note for note in wide.notes)
    noise = planted_kernels(names=BERT_NAMES[:1], informative=(), head=1e-4)
    assert any(
        "predicts no gain on unseen examples" in n for n in recommend(noise, 1, "leave_one_out", ridge=1e-3).notes
    )
    low_rank = {n: torch.outer(v, v) for n, v in zip(kernels.names, torch.eye(108, dtype=torch.float64), strict=False)}
    singular = replace(kernels, blocks=low_rank, base=torch.zeros_like(kernels.base))
    notes = recommend(singular, 2, "condition_number").notes
    assert any("numerical rank 2 of 108: its condition number is λ1/ridge + 1" in note for note in notes)
    uneven = {n: (1.0 if i < 2 else 1e-5) * kernels[n] for i, n in enumerate(kernels.names)}
    notes = recommend(replace(kernels, blocks=uneven), 2, "trace").notes
    assert any(note.startswith("6 of 8 candidates, each alone, change the trace by less than 1%") for note in notes)


def test_saved_and_loaded_it_is_equal(rec, tmp_path):
    rec.save(tmp_path / "new" / "folder")
    loaded = Recommendation.load(tmp_path / "new" / "folder")
    assert loaded == rec
    assert loaded.spectra["chosen"] == rec.spectra["chosen"]
    assert str(loaded) == str(rec) and loaded.to_markdown() == rec.to_markdown()
    other = replace(rec, ridge=2 * rec.ridge)
    assert other != rec
    other.save(tmp_path / "new" / "folder")  # over the first
    assert Recommendation.load(tmp_path / "new" / "folder") == other
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "recommendation.json",
        "spectra.safetensors",
    ]


def test_it_is_a_value(rec):
    with pytest.raises(FrozenInstanceError):
        rec.modules = ()
    with pytest.raises(FrozenInstanceError):
        rec.settings.seed = 3
    with pytest.raises(TypeError):
        rec.predicted["loss"] = 0.0
    assert pickle.loads(pickle.dumps(rec)) == rec
    assert copy.deepcopy(rec) == rec
    assert "Recommendation(2 of 8 modules, 2,000 parameters" in repr(rec)


def test_loading_what_is_not_one(rec, tmp_path):
    with pytest.raises(FileError, match=r"there is no recommendation.json"):
        Recommendation.load(tmp_path)
    rec.save(tmp_path)
    spectra = tmp_path / "spectra.safetensors"
    spectra.write_bytes(spectra.read_bytes()[:-1])
    with pytest.raises(FileError, match="is missing or not the one saved with recommendation.json"):
        Recommendation.load(tmp_path)
    spectra.unlink()
    with pytest.raises(FileError, match="is missing or not the one"):
        Recommendation.load(tmp_path)
    (tmp_path / "recommendation.json").write_text('{"format": "other"}')
    with pytest.raises(FileError, match="holds .other., expected the format 'peft_linear.Recommendation/3'"):
        Recommendation.load(tmp_path)
    (tmp_path / "recommendation.json").write_text("[]")
    with pytest.raises(FileError, match="holds a list of 0, expected"):
        Recommendation.load(tmp_path)
    (tmp_path / "recommendation.json").write_text("{")
    with pytest.raises(FileError, match="is not valid JSON"):
        Recommendation.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="a parent in the path is a file"):
        rec.save(tmp_path / "file")


def test_inconsistent_recommendations(rec):
    with pytest.raises(PeftLinearError, match=r"modules that have a score, got \['x'\] without"):
        replace(rec, modules=("x",))
    with pytest.raises(PeftLinearError, match="needs modules that have a score"):
        replace(rec, modules=())


def test_config_defaults_and_overrides(rec):
    config = rec.to_config()
    assert (config.r, config.lora_alpha, config.peft_type.value) == (8, 16, "PROXIMAL_LORA")
    assert set(config.target_modules) == set(rec.modules)
    other = rec.to_config(r=4, lora_alpha=4, proximal_lambda=0.5, task_type="SEQ_CLS")
    assert (other.r, other.lora_alpha, other.proximal_lambda, other.task_type) == (4, 4, 0.5, "SEQ_CLS")
    with pytest.raises(PeftLinearError, match="the recommendation sets target_modules"):
        rec.to_config(target_modules=["q"])


class Nested(nn.Module):
    """Names that end alike: `proj`, `inner.proj` and `inner.inner.proj`."""

    def __init__(self, depth=2):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.xproj = nn.Linear(4, 4)
        if depth:
            self.inner = Nested(depth - 1)


@pytest.mark.parametrize("chosen", [["proj"], ["inner.proj"], ["proj", "inner.inner.xproj"], ["inner.inner.proj"]])
def test_the_config_matches_exactly_the_chosen_modules(chosen, tmp_path):
    names = [name for name, module in Nested().named_modules() if isinstance(module, nn.Linear)]
    kernels = planted_kernels(names=names, informative=[names.index(name) for name in chosen])
    rec = recommend(kernels, len(chosen), "gradient_energy")
    assert set(rec.modules) == set(chosen)
    rec.to_config().save_pretrained(tmp_path)
    model = get_peft_model(Nested(), PeftConfig.from_pretrained(tmp_path))
    assert set(model.base_model.targeted_module_names) == set(chosen)


def test_many_candidates_stay_quick():
    """36 candidates, 8 of them, n = 256 rows: one factorisation a candidate and round."""
    kernels = planted_kernels(names=BERT_NAMES, informative=range(8), examples=64, classes=4)
    rec = recommend(kernels, 8, "leave_one_out", ridge=30.0)
    assert set(rec.modules) == set(BERT_NAMES[:8])
    assert rec.settings.evaluations == 1 + sum(range(29, 37))


@pytest.mark.parametrize("criterion", ["condition_number", "effective_dimension", "default-by-evidence"])
def test_products_in_float32_are_rounding_and_no_error(criterion):
    """Low rank and rounded entries: eigenvalues that are 0 come out negative, by more than float64 would explain."""
    kernels = planted_kernels(examples=60)

    def rounded(gram, seed):
        noise = torch.randn(gram.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return gram + 1e-8 * float(gram.diagonal().max()) * (noise + noise.T)

    blocks = {name: rounded(block, seed) for seed, (name, block) in enumerate(kernels.blocks.items())}
    provenance = {"dtype": "torch.float32", "product_dtype": "torch.float32"}
    noisy = replace(kernels, blocks=blocks, base=rounded(kernels.base, 99), provenance=provenance)
    assert torch.linalg.eigvalsh(noisy.subset([BERT_NAMES[0]]))[0] < -1e-9
    rec = recommend(noisy, 2, criterion)
    assert rec.modules == recommend(kernels, 2, criterion).modules
    with pytest.raises(KernelError, match="not positive semidefinite"):
        recommend(replace(noisy, provenance={}), 2, criterion)
