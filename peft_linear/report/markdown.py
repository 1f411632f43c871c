# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A `Recommendation` as text: a table for the terminal, a Markdown report."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..recommendation.data import RecommendationData
from ..recommendation.values import ModuleScore
from .escaping import cell, code, plain
from .formatting import budget_words, criterion_label, direction, known, step_words
from .heat import HeatMap, heat_maps, legend, outside_of_layers
from .options import EXPLAINED, option_header, option_rows


# Key in `Recommendation.predicted`, words, format.
PREDICTIONS = (
    ("parameters", "adapter parameters", "{:,.0f}"),
    ("loss", "held-out cross-entropy of simulated training", "{:.4f}"),
    ("accuracy", "held-out accuracy of simulated training", "{:.1%}"),
    ("training_loss", "training cross-entropy of simulated training", "{:.4f}"),
    ("training_accuracy", "training accuracy of simulated training", "{:.1%}"),
    ("leave_one_out_squared_loss", "leave-one-out squared loss", "{:.4f}"),
    ("leave_one_out_accuracy", "leave-one-out accuracy", "{:.1%}"),
    ("training_squared_loss", "training squared loss", "{:.4f}"),
    ("distance", "distance from the pretrained weights ‖θ̄*−θ0‖", "{:.4g}"),
    ("adapter_distance", "distance, adapters only", "{:.4g}"),
)
_HELD_OUT = ("loss", "accuracy", "leave_one_out_squared_loss", "leave_one_out_accuracy")  # where room is short
_SHOWN_REJECTED = 12
_SHORT = 12  # entries of a nested setting that are still listed


def score_table(recommendation: RecommendationData) -> str:
    """The choice as a rule, scores by layer and type or the best candidates, predictions, notes."""
    rec = recommendation
    maps = heat_maps(rec)
    table = _heat_lines(rec, maps) if maps else _listed(rec)
    options = [*_aligned([option_header(rec), *option_rows(rec)], left=(0,)), ""] if rec.options else []
    lines = [
        f"{sentence(rec)}.",
        _headline(rec),
        *filter(None, [step_words(rec)]),
        _how(rec),
        "",
        *options,
        *table,
        "",
    ]
    for key, words, form in PREDICTIONS[1:]:
        if key in rec.predicted and (key in _HELD_OUT or not maps):
            everything = rec.predicted.get("all_candidates", {}).get(key)
            beside = "" if everything is None else f"   (all candidates: {form.format(everything)})"
            lines.append(f"predicted {words}: {form.format(rec.predicted[key])}{beside}")
    lines += [f"note: {note}" for note in rec.notes]
    return "\n".join(lines)


def recommendation_markdown(recommendation: RecommendationData, full: bool = False) -> str:
    """The report: the choice as a rule, scores by layer and type, predictions, notes.

    With few candidates, without layers, and with `full`: every candidate with its reason, and the settings.
    """
    rec = recommendation
    opening = ["# Recommended modules", f"**{plain(sentence(rec))}.**"]
    notes = "\n".join(f"- {plain(note)}" for note in rec.notes)
    maps = () if full else heat_maps(rec)
    if maps:
        sections = [
            *opening,
            " ".join(plain(line) for line in (_headline(rec), step_words(rec), _how(rec)) if line),
            *_option_sections(rec),
            *_heat_sections(rec, maps),
            *([prediction_table(rec.predicted, ("parameters", *_HELD_OUT))] if rec.predicted else []),
            *([notes] if notes else []),
            "Every candidate with its reason: `report.html`, `recommendation.json`, or `to_markdown(full=True)`.",
        ]
        return "\n\n".join(sections) + "\n"
    sections = [
        *opening,
        "\n\n".join(plain(line) for line in (_headline(rec), step_words(rec), _how(rec)) if line),
        *_option_sections(rec),
        "## The choice",
        choice_table(rec),
        *_prediction_sections(rec),
        *(["## Warnings", notes] if notes else []),
        "## Every candidate",
        _score_words(rec),
        _candidates_table(rec.scores),
        "## Settings",
        _settings_table(rec),
    ]
    return "\n\n".join(sections) + "\n"


def _option_sections(rec: RecommendationData) -> list[str]:
    if not rec.options:
        return []
    rows = [tuple(map(plain, row)) for row in option_rows(rec)]
    return ["## Options", EXPLAINED, markdown_table(option_header(rec), rows, right=(1, 2, 3, 4, 5))]


def _prediction_sections(rec: RecommendationData) -> list[str]:
    if not rec.predicted:
        return []
    said = (
        "Predictions are of the linearised model on the calibration examples; they rank choices better than they "
        "forecast the numbers of a real run."
    )
    return ["## Predictions", said, prediction_table(rec.predicted)]


def _score_words(rec: RecommendationData) -> str:
    if rec.options:
        return f"Score: {plain(criterion_label(rec))} of the module alone ({direction(rec)})."
    return (
        f"Score: {plain(criterion_label(rec))} of the module alone, with the always-trained parameters "
        f"({direction(rec)}), with a 90 % resampling interval. The condition number is (λ1 + ridge)/(λn + ridge) of "
        "the same kernel."
    )


def sentence(recommendation: RecommendationData) -> str:
    """The rule in words, with the learning rate where one is recommended."""
    rec = recommendation
    rate = "" if rec.learning_rate is None else f", learning rate {rec.learning_rate:.2g}"
    return f"Adapt {rec.rule.text}{rate}"


def _listed(rec: RecommendationData) -> list[str]:
    """The choice and the best rejected candidates in fixed-width columns."""
    by_name = {row.name: row for row in rec.scores}
    rejected = [row for row in rec.scores if not row.chosen]
    rows = [(str(place), by_name[name]) for place, name in enumerate(rec.modules, start=1)]
    rows += [("", row) for row in rejected[:_SHOWN_REJECTED]]
    cells = [("pick", "module", rec.criterion, "rank", "parameters", "cond. number")]
    cells += [
        (pick, r.name, f"{r.score:.4g}", str(r.rank), f"{r.parameters:,}", format_number(r.condition_number))
        for pick, r in rows
    ]
    lines = _aligned(cells, left=(1,))
    rule = "-" * len(lines[0])
    lines[1 + len(rec.modules) : 1 + len(rec.modules)] = [rule] if rejected else []
    if len(rejected) > _SHOWN_REJECTED:
        lines.append(f"      … and {len(rejected) - _SHOWN_REJECTED} more candidates in .scores")
    return [lines[0], rule, *lines[1:]]


def _heat_lines(rec: RecommendationData, maps: Sequence[HeatMap]) -> list[str]:
    lines = [legend(rec)]
    for each in maps:
        rows = _aligned([each.header, *each.rows, each.sums], left=range(1, len(each.header) - 1))
        lines += [each.stack] if len(maps) > 1 else []
        lines += [rows[0], "-" * len(rows[0]), *rows[1:]]
    return [*lines, *_outside(rec)]


def _heat_sections(rec: RecommendationData, maps: Sequence[HeatMap]) -> list[str]:
    sections = ["## Scores and ranks by layer and type", plain(legend(rec))]
    for each in maps:
        sections += [code(each.stack)] if len(maps) > 1 else []
        sections.append(markdown_table(tuple(map(plain, each.header)), [*each.rows, each.sums], right=(0,)))
    outside = "; ".join(map(plain, _outside(rec)))
    return [*sections, outside] if outside else sections


def _outside(rec: RecommendationData) -> list[str]:
    by_name = {row.name: row for row in rec.scores}
    names = outside_of_layers(rec)
    shown = [
        f"{name}: score {by_name[name].score:.4g}" + (f", r{rec.ranks[name]}" if name in rec.ranks else "")
        for name in names[:_SHOWN_REJECTED]
    ]
    more = [f"… and {len(names) - len(shown)} more modules outside of the layers"] if len(names) > len(shown) else []
    return [*shown, *more]


def _aligned(cells: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Rows of fixed-width columns; the columns `left` are aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]


def choice_table(recommendation: RecommendationData) -> str:
    """Markdown table of the chosen modules, in the order in which they were taken."""
    by_name = {row.name: row for row in recommendation.scores}
    return markdown_table(
        ("#", "module", "parameters", "why"),
        [
            (str(place), code(name), f"{by_name[name].parameters:,}", plain(by_name[name].reason))
            for place, name in enumerate(recommendation.modules, start=1)
        ],
        right=(0, 2),
    )


def prediction_table(predicted: Mapping[str, Any], keys: Collection[str] | None = None) -> str:
    """Markdown table of the predictions: the choice beside all candidates, the head alone and the untrained model.

    Args:
        predicted: As in a recommendation.
        keys: Which of `PREDICTIONS`; default: all.
    """
    columns = prediction_columns(predicted)
    rows = [
        (words, *(form.format(values[key]) if key in values else "" for _, values in columns))
        for key, words, form in PREDICTIONS
        if (keys is None or key in keys) and any(key in values for _, values in columns)
    ]
    header = ("prediction", *(title for title, _ in columns))
    return markdown_table(header, rows, right=range(1, len(header)))


def prediction_columns(predicted: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(title, predictions) of the choice and of what there is to compare it with."""
    compared = (
        ("all_candidates", "all candidates"),
        ("always_trained_only", "head only"),
        ("before_training", "before training"),
    )
    return [("the choice", predicted), *((title, predicted[key]) for key, title in compared if predicted.get(key))]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A GitHub-flavoured table of Markdown cells; `right` are the columns aligned to the right.

    Pipes and line ends in cells are escaped; texts that are not Markdown go through `escaping.plain` before.
    """
    line = "| " + " | ".join(map(cell, header)) + " |"
    rule = "|" + "|".join("---:" if column in right else "---" for column in range(len(header))) + "|"
    body = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join([line, rule, *body])


def format_number(value: float | None) -> str:
    """Four digits; ∞ as such, – for None."""
    return "–" if value is None else "∞" if math.isinf(value) else f"{value:.4g}"


def _headline(rec: RecommendationData) -> str:
    total = sum(row.parameters for row in rec.scores)
    return (
        f"{len(rec.modules)} of {len(rec.scores)} modules, {rec.parameters:,} of {total:,} adapter parameters "
        f"({rec.parameters / total:.0%}); candidates are counted at rank {rec.settings.rank}; budget: "
        f"{budget_words(rec.budget)}."
    )


def _how(rec: RecommendationData) -> str:
    s = rec.settings
    if rec.options:
        return (
            f"{len(rec.options)} options compared by one step of AdamW, {known(s.examples)} examples; scores of "
            f"single modules are the {criterion_label(rec)} ({direction(rec)})."
        )
    ridge = "" if rec.ridge is None else f"ridge {rec.ridge:.4g}, "
    return (
        f"Criterion {rec.criterion}: {criterion_label(rec)} ({direction(rec)}), {known(s.strategy)} search, "
        f"{ridge}{known(s.examples)} examples "
        f"× {known(s.outputs)} {s.output_kind or ''}, "
        f'space "{known(s.space)}".'
    )


def _candidates_table(scores: Sequence[ModuleScore]) -> str:
    return markdown_table(
        ("rank", "module", "score", "parameters", "condition number", "chosen", "why"),
        [
            (
                str(row.rank),
                code(row.name),
                f"{row.score:.4g}{interval_words(row)}",
                f"{row.parameters:,}",
                format_number(row.condition_number),
                "yes" if row.chosen else "",
                plain(row.reason),
            )
            for row in scores
        ],
        right=(0, 2, 3, 4),
    )


def interval_words(row: ModuleScore) -> str:
    """The interval of a score, where there is one."""
    return "" if row.interval is None else f" [{row.interval[0]:.3g}, {row.interval[1]:.3g}]"


def setting_rows(recommendation: RecommendationData) -> list[tuple[str, str]]:
    """(name, value) of every setting that is short; parts of a nested one as `kernels: versions: torch`."""
    rec = recommendation
    rows = [("criterion", rec.criterion), ("budget", repr(rec.budget))]
    rows += [] if rec.ridge is None else [("ridge", f"{rec.ridge:.6g}")]
    return rows + _flat("", rec.settings.to_dict())


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(f"{prefix}{key}: ", value) if not prefix or len(value) <= _SHORT else []
        elif value is not None and not isinstance(value, (list, tuple)):
            rows.append((f"{prefix}{key}", str(value)))
        elif value is not None and 0 < len(value) <= _SHORT:
            rows.append((f"{prefix}{key}", ", ".join(map(str, value))))
    return rows


def _settings_table(rec: RecommendationData) -> str:
    return markdown_table(("setting", "value"), [(plain(name), plain(value)) for name, value in setting_rows(rec)])
