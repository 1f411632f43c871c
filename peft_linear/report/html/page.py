# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A `Recommendation` as one self-contained HTML file, to be kept, printed and sent."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import PeftLinearError
from ...functional.simulation import TrainingCurve
from ...recommendation.data import RecommendationData
from ..formatting import budget_words, criterion_label, direction, known
from ..markdown import PREDICTIONS, sentence
from ..training_plots import History
from .charts import spectra_figure, training_figure
from .elements import Markup, breakable, text
from .heat_map import heat_map_html
from .style import SCRIPT, STYLE, content_policy
from .tables import candidates_table, options_table, predictions_table, settings_table, spectra_table


PAPER = "https://arxiv.org/abs/2602.08239"
_LINE = 90  # characters of a list that is not broken
_PREFIXES = ("eval_", "test_")  # what the Trainer puts before the names of what it measures


def recommendation_html(
    recommendation: RecommendationData,
    *,
    measured: Mapping[str, Any] | None = None,
    history: History | None = None,
    curve: TrainingCurve | None = None,
) -> str:
    """The page; see `Recommendation.to_html`."""
    rec = recommendation
    values = measured_values(measured, history)
    if curve is not None and not history:
        raise PeftLinearError("a predicted curve is drawn against what was measured: pass history= beside curve=")
    sections = [
        _headline(rec, values),
        _options(rec) if rec.options else _signal(rec),
        _code(rec),
        "<h2>Scores by layer</h2>",
        f"<p>Each candidate alone, by {text(criterion_label(rec))} ({text(direction(rec))}).</p>",
        heat_map_html(rec),
        _predicted(rec, values) if rec.predicted or values else "",
    ]
    if history:
        sections.append(f'<div class="charts">{training_figure(history, curve, _end_loss(rec, curve))}</div>')
    sections += [
        _spectra(rec),
        "<h2>Every candidate</h2>",
        candidates_table(rec),
        f"<details><summary>Settings, versions and provenance</summary>\n{settings_table(rec)}\n</details>",
    ]
    title = f"{len(rec.modules)} of {len(rec.scores)} modules to adapt, {_model_name(rec)}"
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{text(content_policy())}">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<footer class="soft"><p>Made by peft-linear from the neural tangent kernels of the candidates, before training.
Method: <a href="{PAPER}">Linearization Explains Fine-Tuning in Large Language Models</a>.</p></footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def measured_values(measured: Mapping[str, Any] | None, history: History | None) -> dict[str, float]:
    """What was measured, under the names of what was predicted; the last evaluation of `history` where not given.

    Raises:
        PeftLinearError: `measured` has none of these names.
    """
    known = {key for key, _, _ in PREDICTIONS}
    evaluations = [entry for entry in history or () if "eval_loss" in entry]
    found = {key: value for key, value in _named(evaluations[-1] if evaluations else {}).items() if key in known}
    given = {key: value for key, value in _named(measured or {}).items() if key in known}
    if measured and not given:
        raise PeftLinearError(
            f"measured has {', '.join(map(str, measured))}, none of which was predicted; pass some of "
            f"{', '.join(sorted(known))}, or what Trainer.evaluate() returns"
        )
    return {key: float(value) for key, value in (found | given).items()}


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    names = {key: key for key in values}
    for prefix in _PREFIXES:
        names |= {key: key.removeprefix(prefix) for key in values if key.startswith(prefix)}
    return {names[key]: value for key, value in values.items()}


def _headline(rec: RecommendationData, measured: Mapping[str, float]) -> str:
    total = sum(row.parameters for row in rec.scores)
    share = f"{rec.parameters / total:.0%} of all candidates' {total:,}" if total else ""
    halves, chance = _agreement(rec)
    signal = f"rank correlation {halves}, chance {chance or '?'}" if halves else ""
    facts = [
        ("Modules", f"{len(rec.modules)} of {len(rec.scores)}", f"budget: {budget_words(rec.budget)}"),
        ("Adapter parameters", f"{rec.parameters:,}", f"{share}, counted at rank {rec.settings.rank}"),
    ]
    if rec.options:
        chosen = next(option for option in rec.options if option.chosen)
        facts.append(("Best option in", f"{chosen.best_share:.0%}", "of the resamples of the examples"))
    else:
        said = {True: "yes", False: "no", None: "not known"}[rec.signal]
        facts.append(("Is the ranking better than chance?", said, signal))
    if rec.learning_rate is not None:
        interval = rec.learning_rate_interval
        words = "" if interval is None else f"90 % interval: {interval[0]:.2g} to {interval[1]:.2g}"
        facts.append(("Learning rate", f"{rec.learning_rate:.2g}", words))
    if rec.step_time is not None and rec.step_memory is not None:
        words = f"of an all-linear LoRA step; memory {rec.step_memory:.0%}"
        facts.append(("Time of a training step", f"{rec.step_time:.0%}", words))
    if "loss" in rec.predicted:
        before = rec.predicted.get("before_training", {}).get("loss")
        words = "held out" if before is None else f"held out; {before:.3g} before training"
        facts.append(("Predicted loss", f"{rec.predicted['loss']:.3g}", words))
    if "loss" in measured:
        facts.append(("Measured loss", f"{measured['loss']:.3g}", "held out, after training"))
    entries = "\n".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(words)}</small></dd></div>"
        for name, value, words in facts
    )
    settings = rec.settings
    title = f"Adapt {len(rec.modules)} of {len(rec.scores)} modules"
    if rec.signal is False:
        title = f"{len(rec.modules)} of {len(rec.scores)} modules, without a clear signal"
    return (
        f"<header><h1>{title}</h1>\n"
        f"<p><strong>{text(sentence(rec))}.</strong></p>\n"
        f'<p class="soft">{breakable(_model_name(rec))}. Chosen before training by '
        f"{text(criterion_label(rec))}{_formula(rec)}, {text(known(settings.strategy))} search, "
        f"from {text(known(settings.examples))} examples × {text(known(settings.outputs))} outputs "
        f"({text(known(settings.output_kind))}).{text(_cost(rec))}</p></header>\n"
        f'<dl class="facts">\n{entries}\n</dl>'
    )


def _options(rec: RecommendationData) -> str:
    notes = "".join(f"<li>{text(note)}</li>" for note in rec.notes)
    listed = f"<ul>{notes}</ul>" if notes else ""
    return f'<section class="box unknown"><h2>Options</h2>{options_table(rec)}{listed}</section>'


def _signal(rec: RecommendationData) -> str:
    css, title, words = {
        True: (
            "yes",
            "✓ The ranking of the candidates is stable",
            "The ranking is stable under resampling of the examples. That does not say whether this criterion "
            "predicts the loss of a real run.",
        ),
        False: (
            "no",
            "⚠ No signal: this ranking could be chance",
            "Another sample of the same size may choose other modules. Prefer all candidates at a lower rank, or "
            "pass more examples.",
        ),
        None: (
            "unknown",
            "? Not known whether the ranking is stable",
            "The test needs at least 8 examples, 3 candidates, and kernels in memory.",
        ),
    }[rec.signal]
    halves, chance = _agreement(rec)
    if halves:
        against = f"; chance gives up to {chance}" if chance else ""
        words = f"Two halves of the examples rank the candidates with a correlation of {halves}{against}. {words}"
    notes = "".join(f"<li>{text(note)}</li>" for note in rec.notes)
    before = f"<p><strong>Warnings</strong></p><ul>{notes}</ul>" if notes else ""
    return f'<section class="box {css}"><h2>{text(title)}</h2><p>{text(words)}</p>{before}</section>'


def _agreement(rec: RecommendationData) -> tuple[str, str]:
    """The rank correlation between halves of the examples, and what chance gives."""
    found = rec.settings.reliability
    return ("", "") if found is None else (f"{found.halves:.2f}", f"{found.threshold:.2f}")


def _code(rec: RecommendationData) -> str:
    config = rec.to_config()
    names = ("r", "lora_alpha", *rec.rule.config_fields(), "modules_to_save")
    lines = [f"    {name}={_source(value)},\n" for name in names if (value := getattr(config, name)) is not None]
    code = f"from peft_linear import ProximalLoraConfig\n\nconfig = ProximalLoraConfig(\n{''.join(lines)})\n"
    return (
        "<h2>Use it</h2>\n<p><code>peft.LoraConfig</code> takes the same arguments; add "
        "<code>task_type</code> and other fields that your task needs.</p>\n"
        f'<div class="code"><pre tabindex="0"><code>{text(code)}</code></pre></div>'
    )


def _source(value: Any) -> str:
    """A field as Python writes it; a list of more than a line has an entry a line."""
    if isinstance(value, Collection) and not isinstance(value, str | Mapping):
        value = value if isinstance(value, list | tuple) else sorted(value)
        parts = [json.dumps(entry, ensure_ascii=False) for entry in value]
        short = f"[{', '.join(parts)}]"
        return short if len(short) <= _LINE else "[\n" + "".join(f"        {part},\n" for part in parts) + "    ]"
    return json.dumps(dict(value) if isinstance(value, Mapping) else value, ensure_ascii=False)


def _predicted(rec: RecommendationData, measured: Mapping[str, float]) -> str:
    predicted = any(key in rec.predicted for key, _, _ in PREDICTIONS[1:])
    said = (
        "Predictions are of the linearised model on the calibration examples: they rank choices better than they "
        "forecast the numbers of a real run."
        if predicted
        else "These outputs have no labels, so only the parameter count is known."
    )
    if predicted and "loss" in measured and rec.settings.examples:
        said += f" This one trained on {rec.settings.examples} examples; a run on more examples ends lower."
    title = "Predicted and measured" if measured else "Predictions"
    return f"<h2>{title}</h2>\n<p>{text(said)}</p>\n{predictions_table(rec, measured)}"


def _spectra(rec: RecommendationData) -> str:
    if not rec.spectra:
        return ""
    return f'<h2>Spectra of the kernels</h2>\n<div class="charts">{spectra_figure(rec)}\n{spectra_table(rec)}</div>'


def _model_name(rec: RecommendationData) -> str:
    about = rec.settings.kernels
    return str(about.get("model_class") or about.get("model") or "a model")


def _formula(rec: RecommendationData) -> Markup:
    formula = rec.settings.formula
    return Markup(f" ({text(formula)})") if formula else Markup("")


def _cost(rec: RecommendationData) -> str:
    about = rec.settings.kernels
    seconds = [about[key] for key in ("seconds_passes", "seconds_gram") if isinstance(about.get(key), (int, float))]
    return f" The kernels took {sum(seconds):.1f} s on {about.get('device', 'one device')}." if seconds else ""


def _end_loss(rec: RecommendationData, curve: TrainingCurve | None) -> float | None:
    return rec.predicted.get("loss") if curve is None else None
