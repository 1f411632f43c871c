# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import gzip
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from peft_linear.capture.gap import VERDICTS, GapReport, linearization_gap, verdict_of
from peft_linear.capture.linearize import linearize
from peft_linear.capture.lipschitz import sample_model_lipschitz
from peft_linear.errors import OutputError, PeftLinearError, TargetError
from peft_linear.functional.bounds import taylor_remainder_bound
from tests.helpers.linear_models import (
    assert_same,
    build,
    flat,
    moved,
    plain,
    seq2seq_batches,
    snapshot,
    t5_lm,
    with_adapter,
)
from tests.helpers.small_models import bert, causal_batches, llama, text_batches


def fine_tuned(factory=bert, size=0.1, **kwargs):
    """A model, moved from where it was linearised, and its linear model still at the start."""
    model = with_adapter(factory, **kwargs)
    linearized = linearize(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model, linearized


def one_by_one(model, linearized, batch):
    """(real, linear, start) logits of every example alone, from functions that are tested elsewhere."""
    theta = {name: value for name, value in model.named_parameters() if name in linearized.names}
    start = linearized.anchor_state_dict()
    triples = []
    for i in range(len(batch["input_ids"])):
        single = {key: value[i : i + 1] for key, value in batch.items()}
        with torch.no_grad():
            triples.append(
                (
                    model(**single).logits[0],
                    linearized.linear_outputs(theta, **single).logits[0],
                    functional_call(model, start, (), single).logits[0],
                )
            )
    return triples


def test_a_classifiers_report_is_what_its_definitions_say():
    model, linearized = fine_tuned()
    batches = text_batches(sizes=(3, 2))
    report = linearization_gap(model, linearized, batches)
    triples = [triple for batch in batches for triple in one_by_one(model, linearized, plain([batch])[0])]
    labels = torch.cat([batch["labels"] for batch in batches])
    gaps, moves = [], []
    for i, (real, linear, start) in enumerate(triples):
        gap, move = (real - linear).norm(), (real - start).norm()
        assert report.relative_difference[i] == pytest.approx(float(gap / real.norm()))
        assert report.relative_to_movement[i] == pytest.approx(float(gap / move))
        expected = F.kl_div(linear.log_softmax(0), real.log_softmax(0), log_target=True, reduction="sum")
        assert report.kl[i] == pytest.approx(float(expected))
        assert report.agreement[i] == float(real.argmax() == linear.argmax())
        assert report.curvature[i] == pytest.approx(float(2 * gap) / report.distance**2)
        gaps.append(gap)
        moves.append(move)
    assert report.pooled_movement_gap == pytest.approx(float(torch.stack(gaps).norm() / torch.stack(moves).norm()))
    real, linear, _ = (torch.stack(column) for column in zip(*triples, strict=True))
    assert report.accuracy == pytest.approx(float((real.argmax(1) == labels).double().mean()))
    assert report.linear_accuracy == pytest.approx(float((linear.argmax(1) == labels).double().mean()))
    start = linearized.anchor_state_dict()
    own = {name: value.detach() for name, value in model.named_parameters()}
    assert report.distance == pytest.approx(float(flat({key: own[key] - start[key] for key in start}).norm()))
    assert report.evaluated_at == "model" and report.num_examples == 5
    assert linearization_gap(model, linearized, plain(batches)).accuracy is None


@pytest.mark.parametrize("labelled", [True, False])
def test_a_language_models_report_counts_the_right_tokens(labelled):
    model, linearized = fine_tuned(llama, causal=True, size=0.03)
    batches = causal_batches(sizes=(3, 2)) if labelled else plain(causal_batches(sizes=(3, 2)))
    report = linearization_gap(model, linearized, batches)
    example, correct, count = 0, 0, 0
    for batch in batches:
        for i, (real, linear, start) in enumerate(one_by_one(model, linearized, plain([batch])[0])):
            keep = batch["attention_mask"][i].bool()
            if labelled:
                keep = batch["labels"][i] != -100
            at = keep.nonzero()[:, 0]
            at = at[at > 0] - 1  # the logits that predict these tokens
            gap = (real[at] - linear[at]).norm()
            assert report.relative_difference[example] == pytest.approx(float(gap / real[at].norm()), rel=1e-5)
            ratio = float(gap / (real[at] - start[at]).norm())
            assert report.relative_to_movement[example] == pytest.approx(ratio, rel=1e-5)
            kl = F.kl_div(linear[at].log_softmax(1), real[at].log_softmax(1), log_target=True, reduction="sum")
            assert report.kl[example] == pytest.approx(float(kl / len(at)), rel=1e-4)
            same = (real[at].argmax(1) == linear[at].argmax(1)).double().mean()
            assert report.agreement[example] == pytest.approx(float(same))
            if labelled:
                correct += int((real[at].argmax(1) == batch["labels"][i][at + 1]).sum())
                count += len(at)
            example += 1
    assert report.accuracy == (pytest.approx(correct / count) if labelled else None)


def test_an_encoder_decoder_counts_labels_where_they_stand():
    model, linearized = fine_tuned(t5_lm, size=0.02)
    batches = seq2seq_batches()
    report = linearization_gap(model, linearized, batches)
    correct = count = 0
    for batch in batches:
        with torch.no_grad():
            predicted = model(**batch).logits.argmax(2)
        counted = batch["labels"] != -100
        correct += int(((predicted == batch["labels"]) & counted).sum())
        count += int(counted.sum())
    assert report.accuracy == pytest.approx(correct / count)


def test_the_gap_is_second_order_in_the_movement():
    reports = [linearization_gap(*fine_tuned(size=size), text_batches()) for size in (2e-3, 1e-3)]
    ratios = reports[0].relative_difference / reports[1].relative_difference
    assert_close(ratios, torch.full_like(ratios, 4.0), rtol=0.1, atol=0)
    assert reports[0].pooled_movement_gap / reports[1].pooled_movement_gap == pytest.approx(2, rel=0.1)
    assert_close(reports[0].curvature, reports[1].curvature, rtol=0.1, atol=0)


def test_verdicts_follow_the_gap():
    reports = [linearization_gap(*fine_tuned(size=size), text_batches()) for size in (0.0, 1e-4, 1.0)]
    assert reports[0].pooled_movement_gap == 0 and not reports[0].relative_to_movement.any()
    words = [report.verdict for report in reports]
    assert words[0].startswith("not moved")
    assert words[1].startswith("linear: the linear model's logits are within 0.")
    assert words[2].startswith("not linear")
    assert words[1].endswith("losses predicted before training were right to 2% at such gaps")
    assert words[2].endswith("do not trust losses that were predicted before training")
    report = linearization_gap(*fine_tuned(size=1e-4), text_batches())
    nearly = VERDICTS[1]
    assert dataclasses.replace(report, pooled_movement_gap=nearly.gap).verdict.startswith("nearly linear")
    assert dataclasses.replace(report, pooled_movement_gap=nearly.gap * 1.01).verdict.startswith("not linear")
    disagreeing = torch.full_like(report.agreement, nearly.agreement - 0.01)
    assert dataclasses.replace(report, agreement=disagreeing).verdict.startswith("not linear")
    assert list(VERDICTS) == sorted(VERDICTS, key=lambda verdict: verdict.gap)


def test_thresholds_are_those_of_the_measurement():
    """What a verdict says of the predicted loss held in every comparison that was made."""
    path = Path(__file__).parents[2] / "examples/benchmarks/predicted_curves/results.json.gz"
    found = {verdict: [] for verdict in (*VERDICTS, None)}
    for run in json.loads(gzip.decompress(path.read_bytes()))["runs"]:
        predicted = dict(zip(run["predicted"]["recorded"], run["predicted"]["held_out_loss"], strict=True))
        for point in run["points"][1:]:
            error = abs(predicted[point["step"]] - point["held_out_loss"]) / point["held_out_loss"]
            found[verdict_of(point["gap"]["pooled_movement_gap"], point["gap"]["agreement"])].append(error)
    for verdict in VERDICTS:
        assert found[verdict] and max(found[verdict]) <= verdict.loss_error
    assert min(found[None]) > VERDICTS[0].loss_error  # nothing that was predicted as well is called not linear
    assert max(found[None]) > 0.2


def test_a_report_of_known_logits_is_that_of_the_models():
    model, linearized = fine_tuned()
    batches = text_batches(sizes=(3, 2))
    report = linearization_gap(model, linearized, batches)
    triples = [triple for batch in batches for triple in one_by_one(model, linearized, plain([batch])[0])]
    real, linear, start = (torch.stack(column) for column in zip(*triples, strict=True))
    labels = torch.cat([batch["labels"] for batch in batches])
    known = GapReport.of_logits(real, linear, start, labels, distance=report.distance, evaluated_at="model")
    for name, value in report.to_dict().items():
        assert known.to_dict()[name] == (pytest.approx(value) if isinstance(value, float) else value)
    assert_close(known.curvature, report.curvature)
    assert GapReport.of_logits(real, linear, start, distance=1.0).accuracy is None


@pytest.mark.parametrize(
    "linear, message",
    [
        (torch.ones(2, 3), r"all three must be \(examples, classes\)"),
        (torch.full((5, 3), math.inf), "the linear model's logits in batch 0 are NaN or inf"),
    ],
)
def test_known_logits_that_cannot_be_compared_are_refused(linear, message):
    with pytest.raises(OutputError, match=message):
        GapReport.of_logits(torch.ones(5, 3), linear, torch.zeros(5, 3), distance=1.0)


def test_a_linear_model_that_was_trained_is_compared_where_it_stands():
    model, linearized = fine_tuned()
    moved(linearized, 0.02)
    batch = text_batches()[0]
    own = linearization_gap(model, linearized, [batch])
    assert own.evaluated_at == "own" and own.curvature is None
    assert own.distance == pytest.approx(linearized.distance())
    real, linear = model(**batch).logits, linearized(**batch).logits
    assert_close(own.relative_difference, ((real - linear).norm(dim=1) / real.norm(dim=1)).detach())
    at_model = linearization_gap(model, linearized, [batch], at="model")
    assert at_model.evaluated_at == "model"
    assert not torch.allclose(at_model.relative_difference, own.relative_difference)
    linearized.load_parameters_from(model)
    assert_close(linearization_gap(model, linearized, [batch], at="own").kl, at_model.kl)


def test_both_models_are_left_as_they_were_found():
    model, linearized = fine_tuned()
    model.train()
    before, theta = snapshot(model), linearized.adapter_state_dict()
    report = linearization_gap(model, linearized, text_batches())
    assert_same(before, snapshot(model))
    for name, value in linearized.adapter_state_dict().items():
        assert torch.equal(value, theta[name])
    assert_close(
        linearization_gap(model.eval(), linearized, text_batches()).kl, report.kl, rtol=0, atol=0
    )  # no dropout


def test_a_single_output_has_no_predictions():
    model, linearized = fine_tuned(lambda: bert(num_labels=1))
    batch = text_batches()[0] | {"labels": torch.ones(3)}
    report = linearization_gap(model, linearized, [batch])
    assert report.kl is None and report.agreement is None and report.accuracy is None
    assert "agree" not in report.verdict and report.to_dict()["kl"] is None


def test_a_report_can_be_logged_and_printed():
    report = linearization_gap(*fine_tuned(), text_batches())
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    for text in ("5 examples", "kl=", "linear_accuracy=", report.verdict):
        assert text in repr(report)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.distance = 0.0


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.scale * inputs[:, None, None, :]


def all_ignored():
    batch = causal_batches()[0]
    return batch | {"labels": torch.full_like(batch["labels"], -100)}


def with_a_broken_head():
    model, linearized = fine_tuned()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias[0] = math.nan
    return model, linearized


BAD_INPUT = [
    (
        lambda: (*fine_tuned(), text_batches(), "start"),
        PeftLinearError,
        "at must be 'auto', 'model' or 'own', got 'start'",
    ),
    (lambda: (*fine_tuned(), []), PeftLinearError, "`batches` is empty"),
    (lambda: (*fine_tuned(llama, causal=True), [all_ignored()]), OutputError, "batch 0 has no token that counts"),
    (
        lambda: (Image(), linearize(Image()), [{"inputs": torch.ones(2, 3)}]),
        OutputError,
        "neither a classifier's nor one for every token",
    ),
    (
        lambda: (*with_a_broken_head(), text_batches()),
        OutputError,
        "the model's logits in batch 0 are NaN or inf",
    ),
]


@pytest.mark.parametrize("make_arguments, error, message", BAD_INPUT)
def test_bad_input_is_named(make_arguments, error, message):
    arguments = make_arguments()
    with pytest.raises(error, match=message):
        linearization_gap(*arguments)


def test_a_model_with_another_adapter_has_no_gap():
    model, linearized = fine_tuned()
    with pytest.raises(TargetError, match="parameters are missing"):
        linearization_gap(model.base_model.model, linearized, text_batches())


def test_sampled_lipschitz_estimates_of_a_model():
    model, linearized, batch = build("bert")
    theta = linearized.adapter_state_dict()
    radii = [0.01, 0.1]
    slopes, curvatures = sample_model_lipschitz(linearized, [batch], radii, samples=3)
    largest = float(torch.linalg.svdvals(_jacobian(model, linearized, batch))[0])
    assert 0 < float(slopes.maximum[0]) < 1.05 * largest
    assert_close(curvatures.average[0], curvatures.average[1], rtol=0.3, atol=0)  # second differences, nearly constant
    for name, value in linearized.adapter_state_dict().items():
        assert torch.equal(value, theta[name])
    # The estimate is a valid remainder bound for the samples it was made of.
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(
        3, sum(value.numel() for value in theta.values()), generator=generator, dtype=torch.float64
    )
    start = flat(linearized.anchor_state_dict())
    for radius, curvature in zip(radii, curvatures.maximum.tolist(), strict=True):
        point = start + radius * direction[0] / direction[0].norm()
        pieces = point.split([value.numel() for value in theta.values()])
        there = {name: piece.view_as(theta[name]) for name, piece in zip(theta, pieces, strict=True)}
        with torch.no_grad():
            real = functional_call(model, there, (), batch).logits
            remainder = (real - linearized.linear_outputs(there, **batch).logits).norm()
        assert float(remainder) <= taylor_remainder_bound(curvature, radius) * (1 + 1e-6)


def _jacobian(model, linearized, batch):
    start = {name: value.requires_grad_() for name, value in linearized.anchor_state_dict().items()}
    outputs = functional_call(model, start, (), batch).logits.reshape(-1)
    rows = [torch.autograd.grad(value, list(start.values()), retain_graph=True) for value in outputs]
    return torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])
