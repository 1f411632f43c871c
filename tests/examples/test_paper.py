# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The paper's experiments: what is trained, what is predicted, what is concluded; on a tiny model."""

import json
import math

import pytest
import torch
from cli.tiny import save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_data import as_on_the_hub, modules_of
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig, GPT2Config, RobertaConfig

from peft_linear import ModuleKernels, linearize
from peft_linear.functional.regression import simulate_training


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("paper/run.py")


@pytest.fixture(scope="module")
def paper(script):
    return modules_of(script)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def task(paper, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    as_on_the_hub("sst2").save_to_disk(folder / "sst2")
    return paper.tasks.load_paper_task(tiny, "sst2", str(folder / "sst2"), max_length=8)


@pytest.fixture(scope="module")
def layers(paper, task):
    return paper.training.projections_by_layer(task.new_model(0))


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (BertConfig(num_attention_heads=2, intermediate_size=8), "bert.encoder.layer.0.attention.self.query"),
        (RobertaConfig(num_attention_heads=2, intermediate_size=8), "roberta.encoder.layer.0.attention.self.query"),
        (DistilBertConfig(n_heads=2, hidden_dim=8, dim=8), "distilbert.transformer.layer.0.attention.q_lin"),
        (GPT2Config(n_head=2, n_embd=8), "transformer.h.0.attn.c_attn"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "vocab_size") else "",
)
def test_projections_are_found_by_layer(paper, config, first):
    config.vocab_size, config.hidden_size, config.num_hidden_layers = 16, 8, 3
    found = paper.training.projections_by_layer(AutoModelForSequenceClassification.from_config(config))
    assert list(found) == [0, 1, 2] and found[0][0] == first
    assert {len(names) for names in found.values()} == {1 if isinstance(config, GPT2Config) else 3}
    with pytest.raises(SystemExit, match="has no layers with modules called"):
        paper.training.projections_by_layer(torch.nn.Linear(2, 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.data())
def test_choices_of_layers_differ_and_balance_sizes(paper, count, data):
    wanted = data.draw(st.integers(1, min(2**count - 1, 60)))
    choices = paper.predictors.layer_choices(range(count), wanted)
    assert len(set(choices)) == wanted == len(choices)
    assert all(choice == tuple(sorted(set(choice))) and set(choice) <= set(range(count)) for choice in choices)
    of_size = [sum(len(choice) == size for choice in choices) for size in range(1, count + 1)]
    exhausted = [n == math.comb(count, size) for size, n in enumerate(of_size, start=1)]
    assert all(n >= max(of_size) - 1 or full for n, full in zip(of_size, exhausted, strict=True))
    assert choices == paper.predictors.layer_choices(range(count), wanted)


def test_too_many_choices_are_refused(paper):
    assert len(paper.predictors.layer_choices([0, 1, 2], 7)) == 7
    with pytest.raises(SystemExit, match="3 layers have 7 non-empty sets; cannot choose 8"):
        paper.predictors.layer_choices([0, 1, 2], 8)


def test_the_pull_on_factors_is_that_of_proximal_lora(paper, task, layers):
    """Two ways to one run: the adapter type's hooks, and the pull that the linear model and the head get."""
    protocol = paper.training.Protocol(epochs=2, rank=2)
    names = [name for of_layer in layers.values() for name in of_layer]
    ends = []
    for pull in (30.0, None):
        model = paper.training.adapted(task.new_model(0), names, protocol, pull)
        optimizer = paper.training.make_optimizer(paper.training.trained_parameters(model), "adamw", 4e-3)
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if pull is None:
            anchors = {name: p.detach().clone() for name, p in own.items()}
            term = paper.strength.attach(optimizer, own, anchors, "factors", 30.0)
        paper.training.fit(model, task, 0, protocol, optimizer, "cross_entropy")
        ends.append({name: p.detach().clone() for name, p in own.items()})
    for name, end in ends[0].items():
        torch.testing.assert_close(ends[1][name], end, rtol=1e-5, atol=1e-8)
    assert term.steps == protocol.steps(task) and 0 < term.firing_rate < 1


@pytest.mark.parametrize("pulled", ["always", "everything", "factors", "nothing"])
def test_near_the_start_both_models_are_trained_alike(paper, task, layers, pulled):
    """To first order the linear model's run is the real one's: same batches, rates, optimizer and proximal term."""
    protocol = paper.training.Protocol(epochs=2, rank=2, learning_rate=1e-7)
    names = [name for of_layer in layers.values() for name in of_layer]
    pull = 0.0 if pulled == "nothing" else 3e6  # ηλ up to 0.3
    model = paper.training.adapted(task.new_model(0).double(), names, protocol, pull if pulled == "factors" else None)
    model.double()
    linearized = linearize(model)
    anchors = linearized.anchor_state_dict()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = paper.training.make_optimizer(list(own.values()), "adamw", protocol.learning_rate)
    if pulled in ("always", "everything"):
        paper.strength.attach(optimizer, own, anchors, pulled, pull)
    paper.training.fit(model, task, 0, protocol, optimizer, "cross_entropy")
    paper.strength.fit_linear(linearized, task, 0, protocol, pulled, pull)
    moved, compared = linearized.displacement(), 0
    for name, parameter in own.items():
        real = parameter.detach() - anchors[name]
        if "lora_A" in name:
            assert not moved[name].any()  # B = 0: f does not depend on A to first order
        elif float(real.norm()) > 0:
            assert float((moved[name] - real).norm()) < 0.02 * float(real.norm()), name
            compared += 1
    assert compared >= 8  # B of two layers' q, k, v, and the head's weight and bias


def test_a_strong_pull_holds_what_is_pulled_and_no_more(paper, task, layers):
    protocol = paper.training.Protocol(epochs=3, rank=2)
    kinds = ("nothing", "always", "everything", "factors")
    runs = {
        kind: paper.strength.run(task, layers[0], kind, 0.0 if kind == "nothing" else 1e9, 0, protocol)
        for kind in kinds
    }
    for field in ("distance", "linear_distance"):
        factors = {kind: run[field]["factors"] for kind, run in runs.items()}
        head = {
            kind: math.sqrt(run[field]["everything"] ** 2 - run[field]["factors"] ** 2) for kind, run in runs.items()
        }
        assert factors["always"] < 1e-6 and head["always"] < 1e-6
        assert factors["everything"] < 0.6 * factors["nothing"] and head["everything"] < 0.6 * head["nothing"]
        assert factors["factors"] < 0.85 * factors["nothing"] and head["factors"] > 0.9 * head["nothing"]
    assert runs["always"]["firing_rate"] == runs["always"]["linear_firing_rate"] == 1.0
    assert all(0 < runs[kind]["firing_rate"] < 1 for kind in ("everything", "factors"))
    assert runs["nothing"]["firing_rate"] is None is runs["nothing"]["linear_firing_rate"]


def test_a_head_trained_first_leaves_the_rest_as_it_was(paper, task):
    protocol = paper.training.Protocol(epochs=1)
    plain, trained = (paper.training.with_trained_head(task, 0, protocol, epochs) for epochs in (0, 3))
    changed = [
        name for name, p in trained.named_parameters() if not torch.equal(p, dict(plain.named_parameters())[name])
    ]
    assert set(changed) == {"classifier.weight", "classifier.bias"}
    losses = [paper.training.evaluate(model, task, task.train, "cross_entropy").loss for model in (plain, trained)]
    assert losses[1] < losses[0]


def test_squared_loss_and_cross_entropy_are_means(paper):
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
    assert float(paper.training.loss_of(logits, labels, "squared")) == pytest.approx((0.5 * 1 + 0.5 * 10) / 2)
    expected = -(logits.log_softmax(1)[:, 0]).mean()
    assert float(paper.training.loss_of(logits, labels, "cross_entropy")) == pytest.approx(float(expected))


def test_micro_batches_change_nothing(paper, task, layers):
    ends = []
    for micro in (16, 5):
        protocol = paper.training.Protocol(epochs=1, rank=2, micro_batch=micro)
        model = paper.training.adapted(task.new_model(0).double(), layers[1], protocol).double()
        optimizer = paper.training.make_optimizer(paper.training.trained_parameters(model), "sgd", 0.5)
        paper.training.fit(model, task, 0, protocol, optimizer, "squared")
        ends.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_run_that_diverges_is_scored_as_the_worst(paper, task, layers):
    protocol = paper.training.Protocol(epochs=2, rank=2)
    model = paper.training.adapted(task.new_model(0), layers[0], protocol)
    optimizer = paper.training.make_optimizer(paper.training.trained_parameters(model), "sgd", 1e30)
    paper.training.fit(model, task, 0, protocol, optimizer, "squared")
    assert paper.training.evaluate(model, task, task.train, "squared").loss == float("inf")


@pytest.fixture(scope="module")
def start(paper, task, layers):
    protocol = paper.training.Protocol(rank=2, lora_alpha=6)
    return paper.predictors.look(task, layers, 0, protocol, 12), protocol


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_the_kernel_is_of_the_adapters_that_are_trained(paper, task, layers, start, loss):
    """Gradient energy, from the kernel, is the squared gradient of the loss in what a run on these layers trains."""
    looked, protocol = start
    model = paper.training.adapted(task.new_model(0), layers[1], protocol)
    model = paper.training.start_from(model, looked.matrices).double().eval()
    (batch,) = task.calibration(12, seed=0)
    labels = batch.pop("labels")
    paper.training.loss_of(model(**batch).logits, labels, loss).backward()
    energy = sum(float(p.grad.square().sum()) for p in model.parameters() if p.requires_grad)
    assert paper.predictors.predictors(looked, layers[1], loss)["gradient_energy"] == pytest.approx(energy, rel=1e-9)
    matrices = [(name, p) for name, p in model.named_parameters() if "lora_A" in name]
    assert len(matrices) == 3 and all(torch.equal(p.float(), looked.matrices[name]) for name, p in matrices)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_the_rate_of_sgd_never_raises_the_linear_models_loss(paper, layers, start, loss):
    kernels = start[0].kernels
    rate = paper.predictors.stable_rate(kernels, loss)
    for names in (layers[0], kernels.names):
        gram = kernels.subset(names)
        curve = simulate_training(gram, kernels.outputs, kernels.labels, learning_rate=rate, steps=30, loss=loss)
        assert bool((curve.train_loss.diff() <= 1e-12).all()) and curve.train_loss[-1] < curve.train_loss[0]


def planted(scale=1.0):
    """Kernels of 2 examples with 2 outputs and known eigenvalues; the head's block is the identity."""
    blocks = {"one": torch.tensor([8.0, 4.0, 2.0, 1.0]).diag(), "two": torch.tensor([0.0, 4.0, 0.0, 1.0]).diag()}
    return ModuleKernels(
        blocks={name: scale * block.double() for name, block in blocks.items()},
        base=torch.eye(4, dtype=torch.float64),
        outputs=torch.zeros(2, 2, dtype=torch.float64),
        labels=torch.tensor([0, 1]),
        num_parameters=dict.fromkeys(blocks, 4),
        shapes=dict.fromkeys(blocks, (2, 2)),
        rank=1,
    )


def test_condition_numbers_are_those_of_their_names(paper):
    start = paper.predictors.Start({}, planted(), planted())
    found = paper.predictors.conditions(start, ["one"])
    assert found["κ, σ = 1e-4"] == pytest.approx((8 + 1e-4) / (1 + 1e-4), rel=1e-12)
    assert found["κ, no ridge"] == pytest.approx(8.0)
    assert found["κ with head, no ridge"] == pytest.approx(9 / 2)
    assert paper.predictors.conditions(start, ["two"])["κ, no ridge"] == float("inf")
    small = paper.predictors.conditions(paper.predictors.Start({}, planted(1e-6), planted(1e-6)), ["one"])
    assert small["κ, σ = 1e-4"] < 1.1 and small["κ, no ridge"] == pytest.approx(8.0)  # what a fixed ridge does
    relative = "κ, σ = 1e-4·tr(K)/n"
    assert small[relative] == pytest.approx(found[relative], rel=1e-9)


def planted_runs(paper, better, condition, seeds=(0,)):
    """Runs whose final loss falls with `better(choice)` and whose condition number is `condition(choice)`."""
    runs = []
    for seed in seeds:
        for choice in paper.predictors.layer_choices(range(6), 24):
            for loss, optimizer in paper.condition.ARMS:
                numbers = {paper.predictors.PAPER: condition(choice), "number of layers": float(len(choice))}
                numbers |= dict.fromkeys(("gradient_energy", "trace", "leave_one_out"), 1.0)
                score = {"loss": 1 / (1 + better(choice)), "accuracy": better(choice) / 1000}
                run = {"choice": choice, "loss": loss, "optimizer": optimizer, "seed": seed, "learning_rate": 0.1}
                runs.append({**run, "train": score, "test": score, "predictors": numbers})
    return runs


def depth(choice):
    return sum(2.0**layer for layer in choice)


@pytest.mark.parametrize(
    ("condition", "word"),
    [
        (lambda choice: 1 / depth(choice), "held"),
        (depth, "the contrary was measured"),
        (lambda choice: 1.0, "not shown"),
    ],
)
def test_claims_about_the_condition_number_follow_from_the_numbers(paper, condition, word):
    tables = paper.condition.analyse(planted_runs(paper, depth, condition))
    claims = paper.condition.claims(tables, 24)
    assert len(claims) == 8 and {claim.verdict for claim in claims} == {word}


def test_at_an_equal_number_of_layers_their_number_predicts_nothing(paper):
    runs = planted_runs(paper, lambda choice: 100.0 * len(choice) + depth(choice), lambda choice: -float(len(choice)))
    arm = paper.condition.ARMS[0]
    plain = paper.condition.analyse(runs)["final training loss"][arm][paper.predictors.PAPER]
    within = paper.condition.analyse(runs, within=True)["final training loss"][arm][paper.predictors.PAPER]
    assert plain.mean > 0.9 and within.mean == 0.0
    runs = planted_runs(paper, lambda choice: 100.0 * len(choice) + depth(choice), lambda choice: -depth(choice))
    within = paper.condition.analyse(runs, within=True)["final training loss"][arm][paper.predictors.PAPER]
    assert within.mean > 0.9


def strengths(field, columns, pulled="everything"):
    """Runs over λ = 0, 1, 2, 3; a column is one seed's values of a field."""
    kinds = ["nothing", *[pulled] * 3]
    return [
        {"pulled": kinds[pull], "pull": float(pull), "seed": seed, field: value}
        for seed, column in enumerate(columns)
        for pull, value in enumerate(column)
    ]


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ([[4, 3, 2, 1], [5, 3, 2, 1]], "held"),
        ([[1, 2, 3, 4], [1, 2, 3, 5]], "the contrary was measured"),
        ([[4, 3, 2, 1], [1, 2, 3, 4]], "not shown"),
        ([[4, 3, 2, 1], [4, 5, 6, 3]], "not shown"),
        ([[4, 1, 5, 3], [4, 1, 5, 3]], "not shown"),
    ],
)
def test_a_trend_with_the_strength_must_show_in_every_seed(paper, columns, word):
    claim = paper.strength_report.falls(strengths("x", columns), "x", "x is", "x falls")
    assert claim.verdict == word
    of_others = paper.strength_report.pulled_by(strengths("x", columns, "factors"), "everything")
    assert {run["pull"] for run in of_others} == {0.0}


@pytest.mark.parametrize(
    ("accuracies", "word"),
    [([0.9, 0.9, 0.9, 0.6], "held"), ([0.6, 0.7, 0.8, 0.9], "the contrary was measured"), ([0.9] * 4, "not shown")],
)
def test_accuracy_must_change_beyond_its_error(paper, accuracies, word):
    runs = strengths("gap_at_own", [[{"accuracy": value} for value in accuracies]])
    assert paper.strength_report.accuracy_falls(runs, 100, "").verdict == word
    assert paper.strength_report.accuracy_falls(runs, 4, "").verdict == "not shown"


def test_records_survive_a_kill_and_refuse_another_setting(paper, tmp_path):
    path, setting = tmp_path / "runs.jsonl", {"steps": 3, "shape": (1, 2)}
    records = paper.records.Records(path, setting, ("choice", "seed"))
    for seed in range(3):
        records.add({"choice": (0, seed), "seed": seed, "value": seed})
    path.write_bytes(path.read_bytes()[:-9])  # killed while the last line was written
    again = paper.records.Records(path, setting, ("choice", "seed"))
    assert ((0, 1), 1) in again and ([0, 1], 1) in again and ((0, 2), 2) not in again
    again.add({"choice": (0, 2), "seed": 2, "value": 5})
    assert paper.records.Records(path, setting, ("choice", "seed")).select([((0, 2), 2)])[0]["value"] == 5
    with pytest.raises(SystemExit, match=r"another setting \(steps: 3 there, 4 here\); choose another --output"):
        paper.records.Records(path, {**setting, "steps": 4}, ("choice", "seed"))


def test_defaults_are_the_papers_for_its_data_and_small_for_the_shipped_ones(script):
    papers, small = script.parse(["--model", "roberta-base", "--task", "cola"]), script.parse([])
    assert (papers.max_length, papers.limits, papers.protocol.batch_size) == (512, (None, None, None), 64)
    assert papers.protocol.dropout and papers.protocol.rank == 8 and papers.protocol.epochs == 10
    assert (small.max_length, small.limits, small.protocol.batch_size) == (48, (128, 8, 300), 16)
    assert not small.protocol.dropout and small.task == "topics2" and small.examples == 32
    changed = script.parse(["--limits", "all", "5", "6", "--epochs", "3", "--dropout"])
    assert changed.limits == [None, 5, 6] and changed.protocol.epochs == 3 and changed.protocol.dropout


@pytest.fixture(scope="module")
def output(script, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    as_on_the_hub("cola").save_to_disk(folder / "cola")
    arguments = ["--quick", "--model", tiny, "--task", "cola", "--data", str(folder / "cola"), "--max-length", "8"]
    arguments += ["--output", str(folder / "out"), "--date", "2026-01-01"]
    assert script.main(arguments) == 0
    return folder / "out", arguments


def test_the_script_writes_both_experiments(output):
    folder, _ = output
    for name, verdicts, fields in (("paper_lambda", 15, "by_pull"), ("paper_condition_number", 8, "spearman")):
        results = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
        assert len(results["claims"]) == verdicts and fields in results and results["date"] == "2026-01-01"
        assert {claim["verdict"] for claim in results["claims"]} <= {"held", "not shown", "the contrary was measured"}
        report = (folder / name / "README.md").read_text(encoding="utf-8")
        assert "--quick" in report and "2026-01-01" in report and "seeds | [0] |" in report
        assert (folder / name / "figure.png").stat().st_size > 20_000
    runs = [json.loads(line) for line in (folder / "paper_condition_number" / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 1 + 3 * 4 and {tuple(run["choice"]) for run in runs[1:]} == {(0,), (1,), (0, 1)}
    runs = [json.loads(line) for line in (folder / "paper_lambda" / "runs.jsonl").read_text().splitlines()]
    assert [(run["pulled"], run["pull"]) for run in runs[1:]] == [
        ("nothing", 0.0),
        ("always", 50.0),
        ("everything", 50.0),
        ("factors", 50.0),
    ]


def test_finished_runs_are_not_repeated_and_torn_ones_are(script, paper, output, monkeypatch):
    folder, arguments = output
    path = folder / "paper_condition_number" / "runs.jsonl"
    before = path.read_text(encoding="utf-8")
    path.write_text(before[:-20], encoding="utf-8")
    done = []

    def train(*_):
        done.append(1)

    monkeypatch.setattr(paper.condition, "fit", train)
    monkeypatch.setattr(paper.strength, "fit", None)
    assert script.main(arguments) == 0
    assert done == [1] and path.read_text(encoding="utf-8").splitlines()[:-1] == before.splitlines()[:-1]
    with pytest.raises(SystemExit, match="holds results of another setting"):
        script.main([*arguments, "--epochs", "2"])


def test_unknown_layers_are_refused(script, tiny, output, tmp_path):
    _, arguments = output
    with pytest.raises(SystemExit, match=r"the model has no layers \[7\]; there are \[0, 1\]"):
        script.main([*arguments, "--output", str(tmp_path), "--experiment", "lambda", "--layers", "1", "7"])
