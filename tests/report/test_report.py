# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
import re
import sys
from dataclasses import replace
from html import unescape

import matplotlib
import pytest
import torch
from matplotlib.colors import to_hex

from peft_linear.errors import PeftLinearError
from peft_linear.functional.spectrum import Spectrum
from peft_linear.report import (
    plot_recommendation,
    recommendation_figure,
    recommendation_markdown,
    score_table,
    update_model_card,
    with_model_card_section,
    write_report,
)
from peft_linear.report.markdown import PREDICTIONS, format_number, markdown_table
from peft_linear.report.plots import CHOSEN, REST
from peft_linear.selection import CRITERIA, Recommendation, Settings, recommend
from tests.helpers.pages import check_page, made
from tests.helpers.planted import BERT_NAMES, planted_kernels


@pytest.fixture(scope="module")
def rec():
    return recommend(planted_kernels(names=[*BERT_NAMES[:12], "bert.pooler.dense"], informative=(3, 8)), 3)


def tables(markdown):
    """The tables as lists of rows of cells."""
    found, rows = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            found.append(rows)
            rows = []
    return found


def test_markdown_has_every_candidate_and_well_formed_tables(rec):
    text = recommendation_markdown(rec)
    choice, predictions, candidates, settings = tables(text)
    for table in (choice, predictions, candidates, settings):
        assert len({len(row) for row in table}) == 1, "a row has another number of cells than the header"
        assert set(table[1]) <= {"---", "---:"}
    assert [row[1] for row in choice[2:]] == [f"`{name}`" for name in rec.modules]
    assert [row[1] for row in candidates[2:]] == [f"`{row.name}`" for row in rec.scores]
    assert [row[5] for row in candidates[2:]] == ["yes" if row.chosen else "" for row in rec.scores]
    assert predictions[0] == ["prediction", "the choice", "all candidates", "head only", "before training"]
    shown = {row[0]: row[1] for row in predictions[2:]}
    assert shown["held-out accuracy of simulated training"] == f"{rec.predicted['accuracy']:.1%}"
    assert shown["leave-one-out squared loss"] == f"{rec.predicted['leave_one_out_squared_loss']:.4f}"
    assert ["kernels: model", "planted"] in settings
    assert not any(row[0] == "candidates" for row in settings)


def test_notes_are_there_only_if_there_are_any(rec):
    assert "Warnings" not in recommendation_markdown(replace(rec, notes=()))
    text = recommendation_markdown(replace(rec, notes=("too few examples",)))
    assert "## Warnings\n\n- too few examples" in text


def test_the_terminal_table_is_aligned(rec):
    lines = score_table(rec).splitlines()
    rules = [i for i, line in enumerate(lines) if set(line) == {"-"}]
    rows = lines[rules[0] + 1 : rules[1]]
    assert len(rows) == 3 and len({len(line) for line in [lines[rules[0] - 1], *rows]}) == 1
    assert [line.split()[1] for line in rows] == list(rec.modules)
    assert "predicted held-out accuracy" in score_table(rec)
    assert "note: beware" in score_table(replace(rec, notes=("beware",)))


def test_the_terminal_table_leaves_out_the_tail():
    rec = recommend(planted_kernels(names=BERT_NAMES, examples=6), 2, "trace")
    assert "… and 22 more candidates in .scores" in score_table(rec)
    everything = recommend(planted_kernels(names=BERT_NAMES[:3], informative=(0,), examples=6), 3, "trace")
    assert "more candidates" not in score_table(everything)


LLAMA = [
    f"model.layers.{i}.{kind}_proj"
    for i in range(30)
    for kind in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


def with_ranks(names, ranks):
    """A recommendation for a model of these modules, the earlier the better, at these ranks."""
    rec = made(names, picks=1, notes=("one", "two"))
    rows = tuple(replace(row, chosen=row.name in ranks) for row in rec.scores)
    about = replace(rec.settings, candidates=tuple(names), kernels={"peft": {"same_type": names}})
    predicted = {key: 0.5 for key, _, _ in PREDICTIONS}
    predicted |= {"all_candidates": dict(predicted), "before_training": {"loss": 1.0}}
    return replace(
        rec, modules=tuple(ranks), scores=rows, settings=about, module_ranks=ranks, predicted=predicted, budget=0.5
    )


@pytest.fixture(scope="module")
def large():
    return with_ranks(LLAMA, {name: 2 + 2 * name.endswith("down_proj") for name in LLAMA if "mlp" in name})


def test_a_report_of_210_candidates_fits_a_screen(large):
    text = large.to_markdown()
    assert len(text.splitlines()) <= 60
    rule = "gate_proj and up_proj of all 30 layers at rank 2; down_proj of all 30 layers at rank 4"
    assert text.splitlines()[2] == f"**Adapt {rule}.**"
    heat = tables(text)[0]
    types = [f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    assert heat[0] == ["layer", *types, "sum"] and len(heat) == 2 + 30 + 1
    assert {len(row) for row in heat} == {9}
    for layer in range(30):
        cells = heat[2 + layer][1:8]
        assert [cell.split()[2:] for cell in cells] == [[], [], [], [], ["r2"], ["r2"], ["r4"]]
        scores = [row.score for row in large.scores[7 * layer : 7 * layer + 7]]
        assert [float(cell.split()[1]) for cell in cells] == pytest.approx(scores, abs=0.006)
        assert float(heat[2 + layer][8]) == pytest.approx(sum(scores), abs=0.006)
    of_type = [sum(row.score for row in large.scores[start::7]) for start in range(7)]
    assert [float(cell) for cell in heat[-1][1:8]] == pytest.approx(of_type, rel=0.05)
    assert float(heat[-1][8]) == pytest.approx(sum(of_type), rel=0.05)
    assert heat[2][1].startswith("█") and heat[31][7].startswith("·"), "shades follow the scores"
    assert len(str(large).splitlines()) <= 50 and f"Adapt {rule}." in str(large)
    full = large.to_markdown(full=True)
    assert all(f"`{name}`" in full for name in LLAMA) and "## Settings" in full


def test_the_page_of_210_candidates_shows_ranks_and_sums(large):
    page = large.to_html()
    heat = next(table for table in check_page(page).tables if table[0][0] == "layer")
    assert [row[0] for row in heat] == ["layer", *map(str, range(30)), "sum"]
    assert heat[0][1:] == [*(name.removeprefix("model.layers.0.") for name in LLAMA[:7]), "sum"]
    for row in heat[1:-1]:
        assert [re.search(r"r = (\d)$", cell) and cell[-1] for cell in row[1:8]] == [None] * 4 + ["2", "2", "4"]
    assert "Adapt gate_proj and up_proj of all 30 layers at rank 2; down_proj of all 30 layers at rank 4." in page
    variables = {}
    exec(unescape(re.findall(r"<pre[^>]*><code>(.*?)</code>", page, re.DOTALL)[0]), variables)
    config = variables["config"]
    assert (config.target_modules, config.r) == ({"gate_proj", "up_proj", "down_proj"}, 2)
    assert (config.rank_pattern, config.lora_alpha) == ({"down_proj": 4}, 16)


def test_many_layers_are_shown_in_blocks():
    names = [f"model.layers.{i}.{kind}" for i in range(80) for kind in ("a", "b")]
    rec = with_ranks(names, dict.fromkeys(names[:4], 4))
    heat = tables(rec.to_markdown())[0]
    assert [row[0] for row in heat[2:4]] == ["0–2", "3–5"] and len(heat) == 2 + 27 + 1
    assert heat[2][1].endswith(" r4 2/3") and not heat[3][1].endswith("/3")


def test_what_is_outside_of_layers_stays_in_the_report():
    names = [*LLAMA, "lm_head", "vision.proj"]
    text = with_ranks(names, {LLAMA[0]: 2, "lm_head": 4}).to_markdown()
    assert re.search(r"^lm_head: score [\d.]+, r4; vision.proj: score [\d.]+$", text, re.MULTILINE)


@pytest.mark.parametrize("form", ["part{}x.fc", "a{}", "layers.0.{}x"])
def test_candidates_without_layers_or_with_many_types_are_a_list(form):
    names = [form.format(index) for index in range(50)]
    text = with_ranks(names, {names[0]: 2}).to_markdown()
    assert all(f"`{name}`" in text for name in names)


def test_a_model_card_of_many_modules_has_the_rule(large, rec):
    card = with_model_card_section("", large)
    assert "Recommended: gate_proj and up_proj of all 30 layers at rank 2" in card and LLAMA[4] not in card
    assert all(f"`{name}`" in with_model_card_section("", rec) for name in rec.modules)


def test_markdown_table_escapes_pipes():
    assert tables(markdown_table(("a", "b"), [("x|y", "z")]))[0][2] == [r"x\|y", "z"]
    assert (format_number(float("inf")), format_number(1234.56)) == ("∞", "1235")


@pytest.mark.parametrize("card", ["", "# My model\n\nText.\n", "---\nlicense: mit\n---\n# My model"])
def test_model_card_section_is_appended_once_and_replaced(rec, card):
    once = with_model_card_section(card, rec)
    assert once.startswith(card.rstrip("\n"))
    assert once.count("## Which modules are adapted") == 1
    assert with_model_card_section(once, rec) == once
    below = once + "\n## Later section\n"
    other = replace(rec, notes=("another",))
    updated = with_model_card_section(below, other)
    assert updated.count("## Which modules are adapted") == 1
    assert "- another" in updated and updated.endswith("\n## Later section\n")
    assert with_model_card_section(updated, rec) == below
    assert all(f"`{name}`" in once for name in rec.modules)


def test_update_model_card(rec, tmp_path):
    path = tmp_path / "README.md"
    update_model_card(path, rec)
    first = path.read_text(encoding="utf-8")
    update_model_card(path, rec)
    assert path.read_text(encoding="utf-8") == first == with_model_card_section("", rec)


def test_figure_marks_the_choice(rec):
    figure = recommendation_figure(rec)
    spectra, heat, _, scores = figure.axes  # the third is the colour bar
    assert heat.images[0].get_array().shape == (3, 7)
    assert [text.get_text() for text in heat.texts] == ["8", "8", "8"]
    assert heat.get_yticklabels()[-1].get_text().startswith("– (")
    colors = [to_hex(bar.get_facecolor()) for bar in scores.patches]
    assert colors == [CHOSEN if row.chosen else REST for row in rec.scores]
    labels = [text.get_text() for text in scores.get_yticklabels()]
    assert labels[0] == rec.scores[0].name.removeprefix("bert.encoder.layer.").replace(".", " · ", 1)
    assert spectra.get_yscale() == "log"
    assert len(spectra.get_legend().get_texts()) == 3


def test_bars_are_longer_for_better_modules(rec):
    widths = [bar.get_width() for bar in recommendation_figure(rec).axes[3].patches]
    assert widths == sorted(widths, reverse=True)
    utility = CRITERIA[rec.criterion].utility
    assert widths[0] == pytest.approx(utility(rec.scores[0].score) - utility(rec.settings.start_score))
    for criterion in ("trace", "condition_number"):
        other = recommend(planted_kernels(), 2, criterion)
        widths = [bar.get_width() for bar in recommendation_figure(other).axes[3].patches]
        assert widths == sorted(widths, reverse=True)


def test_the_heat_map_shows_ranks(rec):
    image = recommendation_figure(rec).axes[1].images[0].get_array()
    best = rec.scores[0].name
    layer, kind = divmod(BERT_NAMES.index(best), 6)
    assert image[layer, kind] == image.max() == len(rec.scores) - 1
    assert image.mask.sum() == 3 * 7 - 13, "cells without a module are empty"


def test_figures_of_all_kinds_are_written_without_touching_pyplot(tmp_path):
    before = dict(matplotlib.rcParams)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plain = planted_kernels(names=("fc1", "fc2"), informative=(), examples=4, head=0.0)
    many = planted_kernels(names=[f"h.{i}.{k}" for i in range(20) for k in "qkvo"], informative=(7, 70), examples=4)
    uneven = planted_kernels(names=BERT_NAMES[:6], examples=6)
    uneven = replace(uneven, blocks={n: 10.0 ** (-i) * uneven[n] for i, n in enumerate(uneven.names)})
    for number, kernels in enumerate((plain, many, uneven)):
        recommend(kernels, 1, "trace").plot(tmp_path / f"figure{number}.png")
        assert (tmp_path / f"figure{number}.png").read_bytes().startswith(b"\x89PNG")
    axes = recommendation_figure(recommend(many, 2, "gradient_energy")).axes[3]
    assert len(axes.patches) == 60 and "20 more not shown" in axes.get_title(loc="left")
    assert recommendation_figure(recommend(uneven, 1, "trace")).axes[3].get_xscale() == "log"
    recommend(plain, 1, "trace").plot(tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert dict(matplotlib.rcParams) == before
    assert had_pyplot or "matplotlib.pyplot" not in sys.modules


def test_a_recommendation_without_spectra_or_start_is_drawn(rec, tmp_path):
    bare = replace(rec, spectra={}, settings=Settings(higher_is_better=False))
    plot_recommendation(bare, tmp_path / "bare.png")
    flat = Spectrum(torch.tensor([1.0, 1e-15, 0.0], dtype=torch.float64))
    tiny = {"chosen": flat, "all": flat}
    figure = recommendation_figure(replace(rec, spectra=tiny, ridge=1e-15))
    assert any("noise floor" in text.get_text() for text in figure.axes[0].texts)


def test_figures_refuse(rec, tmp_path, monkeypatch):
    with pytest.raises(PeftLinearError, match=r"cannot write a figure as 'figure.xyz': the suffix must be one of"):
        rec.plot(tmp_path / "figure.xyz")
    monkeypatch.setattr("peft_linear.report.plots.matplotlib_available", lambda: False)
    with pytest.raises(PeftLinearError, match=r"figures need matplotlib; install it with: pip install"):
        rec.plot(tmp_path / "figure.png")


def test_a_whole_report(rec, tmp_path, monkeypatch):
    markdown, html, figure = write_report(rec, tmp_path)
    assert Recommendation.load(tmp_path) == rec
    assert markdown.read_text(encoding="utf-8").endswith("![Spectra and scores](recommendation.png)\n")
    assert figure.is_file() and html.read_text(encoding="utf-8") == rec.to_html()
    monkeypatch.setattr("peft_linear.report.writer.matplotlib_available", lambda: False)
    assert [path.name for path in write_report(rec, tmp_path / "plain")] == ["recommendation.md", "report.html"]
    assert "recommendation.png" not in (tmp_path / "plain" / "recommendation.md").read_text(encoding="utf-8")
