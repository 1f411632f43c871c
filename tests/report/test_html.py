# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The HTML report: what is in it, that nothing in a name can break it, and that it is self-contained."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html import unescape

import pytest
import torch

from peft_linear.errors import PeftLinearError
from peft_linear.functional.simulation import simulate_training
from peft_linear.report.html.style import SCRIPT
from peft_linear.selection import ModuleScore, Recommendation, Reliability, Settings, recommend
from tests.helpers.pages import HISTORY, MODELS, Page, check_page, made
from tests.helpers.planted import BERT_NAMES, planted_kernels


@pytest.fixture(scope="module")
def rec():
    return recommend(planted_kernels(names=MODELS["bert"], informative=(3, 8)), 3)


@pytest.fixture(scope="module")
def page(rec):
    return rec.to_html()


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page)


def run_code(page):
    """The variables that the code of the page makes."""
    (code,) = re.findall(r"<pre[^>]*><code>(.*?)</code>", page, re.DOTALL)
    variables = {}
    exec(unescape(code), variables)
    return variables


def test_the_page_is_whole_and_loads_nothing(page, parsed):
    check_page(page)
    assert any(attrs.get("name") == "viewport" for attrs in parsed.attributes("meta"))
    assert len(page) < 200_000
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script == [SCRIPT]
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = next(a["content"] for a in parsed.attributes("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy


def test_a_reader_finds_the_choice_the_doubts_and_the_code(rec, page, parsed):
    assert "3 of 13 modules" in parsed.texts["h1"]
    assert "3 of 13" in parsed.texts["dd"] and f"{rec.parameters:,}" in parsed.texts["dd"]
    config = rec.to_config()
    written = run_code(page)
    assert written["config"].target_modules == config.target_modules
    assert (written["config"].r, written["config"].lora_alpha) == (config.r, config.lora_alpha)
    doubtful = replace(rec, notes=("Only 4 examples", "second"))
    assert Page(doubtful.to_html()).texts["li"] == "Only 4 examplessecond"


def test_code_of_ambiguous_names_is_a_regular_expression():
    rec = made(["proj", "inner.proj", "x.fc"], picks=1)
    written = run_code(rec.to_html())
    assert written["config"].target_modules == rec.to_config().target_modules == "proj"


@pytest.mark.parametrize(
    ("reliability", "words"),
    [
        (Reliability(0.8, 10, dict.fromkeys(MODELS["bert"], (1, 2))), "✓ The ranking of the candidates is stable"),
        (Reliability(0.1, 10, dict.fromkeys(MODELS["bert"], (1, 9))), "⚠ No signal: this ranking could be chance"),
        (None, "? Not known whether the ranking is stable"),
    ],
)
def test_whether_there_is_a_signal_is_said_in_words(rec, reliability, words):
    page = replace(rec, settings=replace(rec.settings, reliability=reliability), notes=()).to_html()
    assert words in page
    wavering = ", without a clear signal</h1>" in page
    assert wavering == (reliability is not None and not reliability.signal)
    assert ("rank the candidates with a correlation of 0." in page) == (reliability is not None)
    check_page(page)


@pytest.mark.parametrize("model", MODELS)
def test_every_candidate_has_a_cell_in_the_heat_map_and_a_row(model):
    names = MODELS[model]
    rec = made(names, picks=1)
    page = rec.to_html()
    parsed = check_page(page)
    candidates = next(table for table in parsed.tables if "module" in table[0])
    assert [row[1] for row in candidates[1:]] == names
    cells = [attrs for tag, attrs in parsed.elements if tag == "td" and "--q" in attrs.get("style", "")]
    assert sorted(attrs["title"].split(":")[0] for attrs in cells) == sorted(names)
    assert [attrs["title"].split(":")[0] for attrs in cells if attrs.get("class") == "hit"] == names[:1]
    widest = max(len(row) for table in parsed.tables for row in table)
    assert widest <= 14, "tables of many types are turned"


def test_the_heat_map_reads_as_a_table(rec, parsed):
    heat, outside = (t for t in parsed.tables if t[0][0] == "layer")
    assert heat[0] == ["layer", *(name.removeprefix("bert.encoder.layer.0.") for name in BERT_NAMES[:6]), "sum"]
    assert [row[0] for row in heat[1:]] == ["0", "1", "sum"]
    assert outside[0] == ["layer", "bert.pooler.dense"]
    by_name = {row.name: row for row in rec.scores}
    gains = {name: row.score - rec.settings.start_score for name, row in by_name.items()}
    for layer in (0, 1):
        of_layer = BERT_NAMES[6 * layer : 6 * layer + 6]
        assert float(heat[1 + layer][-1]) == pytest.approx(sum(gains[name] for name in of_layer), rel=0.06)
        of_type = gains[BERT_NAMES[layer]] + gains[BERT_NAMES[6 + layer]]
        assert float(heat[3][1 + layer]) == pytest.approx(of_type, rel=0.06)
        for column, name in enumerate(BERT_NAMES[6 * layer : 6 * layer + 6], start=1):
            found = heat[1 + layer][column]
            assert f"rank {by_name[name].rank}" in found
            pick = f"pick {rec.modules.index(name) + 1}" if name in rec.modules else ""
            assert found.endswith(f"r = 8{pick}" if pick else "") and ("pick" in found) == bool(pick)
            gain = gains[name]
            shown = float(re.match(r"[−\d.e]+", found)[0].split("rank")[0].replace("−", "-"))
            assert shown == pytest.approx(gain, rel=0.06)


def test_stacks_have_tables_of_their_own():
    parsed = Page(made(MODELS["t5"]).to_html())
    captions = parsed.texts["code"]
    assert "encoder.block" in captions and "decoder.block" in captions
    encoder, decoder = (t for t in parsed.tables if t[0][0] == "layer")
    assert (len(encoder[0]), len(decoder[0])) == (5, 6)
    assert "no such module" not in str(encoder)


def test_cells_without_a_module_say_so():
    parsed = Page(made(["h.0.q", "h.0.k", "h.1.q"]).to_html())
    heat = next(t for t in parsed.tables if t[0][0] == "layer")
    assert heat[2][2] == "·no such module"


def test_five_hundred_candidates():
    names = [f"model.layers.{i}.{k}" for i in range(100) for k in ("q", "k", "v", "o", "mlp")]
    page = made(names, picks=20).to_html()
    check_page(page)
    assert len(page) < 700_000


HOSTILE = "layer.0.</script><script>alert(1)</script><img src=x onerror=\"alert('2')\">&amp;"


def test_no_name_gets_out_of_its_place():
    rows = (ModuleScore(HOSTILE, 1.0, 1, 10, True, HOSTILE, 1.0), ModuleScore("layer.1.q", 0.5, 2, 10, False, "", 1.0))
    settings = Settings(
        criterion_label=HOSTILE,
        formula=HOSTILE,
        strategy=HOSTILE,
        output_kind=HOSTILE,
        examples=HOSTILE,
        rank=4,
        kernels={"model_class": HOSTILE, "device": HOSTILE, HOSTILE: HOSTILE, "seconds_gram": 1.0},
        reliability=Reliability(2.0, 10, {HOSTILE: (1, 2)}),
    )
    rec = Recommendation((HOSTILE,), rows, {}, HOSTILE, HOSTILE, 0.1, settings, (HOSTILE,))
    plain = check_page(replace(rec, settings=Settings(rank=4), notes=()).to_html())
    page = rec.to_html()
    parsed = check_page(page)
    assert page.count("<script") == 1 and not parsed.attributes("img")
    assert not any(key.startswith("on") for _, attrs in parsed.elements for key in attrs)
    assert {tag for tag, _ in parsed.elements} - {tag for tag, _ in plain.elements} <= {"ul", "li", "strong", "i"}
    assert parsed.texts["li"] == HOSTILE
    assert json.dumps(HOSTILE) in parsed.texts["code"]


def test_predictions_beside_what_was_measured(rec):
    page = rec.to_html(measured={"eval_loss": 0.1234, "eval_runtime": 3.0, "accuracy": 0.75})
    parsed = check_page(page)
    table = next(t for t in parsed.tables if t[0][0] == "prediction")
    assert table[0][:3] == ["prediction", "the choice", "measured"]
    rows = {row[0]: row[1:3] for row in table[1:]}
    assert rows["held-out cross-entropy of simulated training"] == [f"{rec.predicted['loss']:.4f}", "0.1234"]
    assert rows["held-out accuracy of simulated training"][1] == "75.0%"
    assert rows["leave-one-out squared loss"][1] == ""
    said = f"trained on {rec.settings.examples} examples; a run on more"
    assert "Measured loss" in page and said in page and "runtime" not in page
    assert "Measured loss" not in rec.to_html() and said not in rec.to_html()


def test_a_history_is_drawn_and_its_last_evaluation_is_what_was_measured(rec):
    curve = simulate_training(torch.eye(4), torch.zeros(2, 2), torch.tensor([0, 1]), learning_rate=0.1, steps=20)
    page = rec.to_html(history=HISTORY, curve=curve)
    parsed = check_page(page)
    assert len(parsed.attributes("svg")) == 2
    table = next(t for t in parsed.tables if t[0][0] == "prediction")
    assert {row[2] for row in table[1:]} >= {"1.2500", "62.5%"}
    assert "training, predicted" in page and "predicted for the end" not in page
    without = rec.to_html(history=HISTORY, measured={"loss": 1.5})
    table = next(t for t in Page(without).tables if t[0][0] == "prediction")
    assert {row[2] for row in table[1:]} >= {"1.5000", "62.5%"}
    assert f"predicted for the end: {rec.predicted['loss']:.3g}" in without


def test_what_cannot_be_shown_is_refused(rec, monkeypatch):
    curve = simulate_training(torch.eye(2), torch.zeros(1, 2), torch.tensor([0]), learning_rate=0.1, steps=1)
    with pytest.raises(PeftLinearError, match=r"measured has eval_runtime, none of which was predicted; pass some"):
        rec.to_html(measured={"eval_runtime": 1.0})
    with pytest.raises(PeftLinearError, match=r"a predicted curve is drawn against what was measured: pass history="):
        rec.to_html(curve=curve)
    monkeypatch.setattr("peft_linear.report.html.charts.matplotlib_available", lambda: False)
    with pytest.raises(PeftLinearError, match=r"the history holds no loss: pass trainer.state.log_history"):
        rec.to_html(history=[{"learning_rate": 0.1, "step": 1}])


def test_without_matplotlib_the_rest_is_there_and_the_page_says_so(rec, monkeypatch):
    monkeypatch.setattr("peft_linear.report.html.charts.matplotlib_available", lambda: False)
    page = rec.to_html(history=HISTORY)
    parsed = check_page(page)
    assert page.count("matplotlib was not installed") == 2 and not parsed.attributes("svg")
    assert any(t[0][0] == "kernel of" for t in parsed.tables)


def test_charts_follow_the_page_and_are_described(page, parsed):
    (svg,) = parsed.attributes("svg")
    assert svg["role"] == "img" and svg["aria-label"].startswith("Eigenvalues of the kernels")
    drawing = page[page.index("<svg") : page.index("</svg>")]
    assert "<text" in drawing and "var(--chosen)" in drawing
    assert not re.search(r"#[0-9a-f]{6}\b", drawing), "a colour that does not follow the page's"


def test_without_labels_there_is_no_prediction_and_the_page_says_so():
    rec = recommend(planted_kernels(names=MODELS["gpt2"][:6], output_kind="random_projection", examples=6), 2, "trace")
    page = rec.to_html()
    check_page(page)
    assert "no labels, so only the parameter count is known" in page and "Predicted loss" not in page


def test_language_models_and_budgets_in_parameters():
    rec = recommend(planted_kernels(names=MODELS["llama"], output_kind="log_likelihood", examples=9), "3k")
    page = rec.to_html()
    check_page(page)
    assert "budget: 3k parameters" in page
    assert "budget: 25% of the candidates&#x27; adapter parameters" in replace(rec, budget=0.25).to_html()
    assert "budget: 1 module<" in replace(rec, budget=1).to_html()


def test_a_loaded_recommendation_has_the_same_page(rec, page, tmp_path):
    rec.save(tmp_path)
    assert Recommendation.load(tmp_path).to_html() == page == rec.to_html()


def test_a_bare_recommendation_has_a_page():
    rec = made(["h.0.q", "h.0.k"])
    page = rec.to_html()
    check_page(page)
    assert "Spectra of the kernels" not in page and "rank, 90 % interval" not in page
    flat = replace(rec, scores=tuple(replace(row, score=0.0, condition_number=float("inf")) for row in rec.scores))
    assert 'data-sort="Infinity"' in flat.to_html() and "∞" in flat.to_html()
