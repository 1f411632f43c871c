# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The paper's claims beside what was measured, and the report of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.common.files import save_json, save_text
from examples.common.reports import Folders, as_page, provenance, setting_table
from peft_linear.report.markdown import markdown_table


HELD, NOT_SHOWN, CONTRARY = "held", "not shown", "the opposite was measured"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper beside what was measured."""

    claim: str
    measured: str
    verdict: str
    question: str = ""  # a row of the summary
    case: str = ""  # a column of the summary
    numbers: str = ""


def verdict(low: float, high: float) -> str:
    """Of a claim that a number is positive, from the number's interval."""
    if low > 0:
        return HELD
    return CONTRARY if high < 0 else NOT_SHOWN


def claims_table(claims: Sequence[Claim]) -> str:
    """A row a question, a column a case: verdict and numbers."""
    cases = list(dict.fromkeys(claim.case for claim in claims))
    cells = {(claim.question, claim.case): f"**{claim.verdict}**: {claim.numbers}" for claim in claims}
    questions = dict.fromkeys(claim.question for claim in claims)
    return markdown_table(("claim", *cases), [(q, *(cells[q, case] for case in cases)) for q in questions])


@dataclass(frozen=True)
class Experiment:
    """What one experiment found, and how it was run."""

    title: str
    claims: Sequence[Claim]
    figure: str  # what it shows
    short: Sequence[str]  # sections of the summary
    sections: Sequence[str]  # of the report at full length
    results: Mapping[str, Any]


def write_report(folders: Folders, experiment: Experiment, setting: Mapping[str, Any]) -> None:
    """README.md with the summary; report.md and results.json with everything."""
    of = experiment
    page = [
        f"# {of.title}",
        claims_table(of.claims),
        f"![{of.figure}](figure.png)",
        *of.short,
        "## How it was run",
        f"{provenance(setting)} Seeds {', '.join(map(str, setting['seeds']))}, {setting['steps']} steps a run, "
        f"{setting['seconds']} seconds. The command runs what is not recorded in the compressed runs beside the "
        "program and writes the report at full length, with every table, to build/measurements.",
    ]
    save_text(folders.summary / "README.md", as_page(page))
    rows = [(claim.claim, claim.measured, f"**{claim.verdict}**") for claim in of.claims]
    report = [
        f"# {of.title}",
        markdown_table(("the paper's claim", "measured", "verdict"), rows),
        *of.sections,
        "## Setting",
        setting_table(setting),
    ]
    save_text(folders.full / "report.md", as_page(report))
    found = [{"claim": c.claim, "measured": c.measured, "verdict": c.verdict} for c in of.claims]
    save_json(folders.full / "results.json", {**setting, "claims": found, **of.results})
