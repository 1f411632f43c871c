# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Where a measurement is written to, and the lines that say how it was made."""

from __future__ import annotations

import argparse
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peft_linear.report.markdown import markdown_table


ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Folders:
    """Three places, which are one where the user names an output folder."""

    summary: Path  # README.md and figures, in docs/
    runs: Path  # compressed records, beside the program
    full: Path  # what is made again from the records: the report at full length, every number as JSON

    @classmethod
    def of(cls, program: str, measurement: str, output: str | Path | None, quick: bool = False) -> Folders:
        """Of `examples/<program>`, whose measurement is `docs/measurements/<measurement>`; or `output` for all.

        Raises:
            SystemExit: a quick run would replace the recorded measurement.
        """
        if quick and output is None:
            raise SystemExit("--quick needs --output: without it the recorded measurement would be replaced")
        if output is not None:
            return cls(*[Path(output)] * 3)
        build = ROOT / "build" / "measurements" / measurement
        return cls(ROOT / "docs" / "measurements" / measurement, ROOT / "examples" / program, build)


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that writes a report."""
    parser.add_argument(
        "--output",
        type=Path,
        help="one folder for everything (default: summary in docs/measurements, compressed runs beside the program, "
        "the report at full length in build/measurements)",
    )
    parser.add_argument("--date", help="of the report (default: today)")


def command_line(module: str, arguments: Sequence[str]) -> str:
    """What was typed, for the record."""
    return shlex.join(["python", "-m", module, *arguments])


def circumstances(command: str, day: str | None) -> dict[str, Any]:
    """Machine, date, command and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": command,
        "date": day or date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads used, {device}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def provenance(record: Mapping[str, Any]) -> str:
    """One line: command, date, machine, versions."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"`{record['command']}`, {record['date']}, {record['machine']}, {versions}."


def setting_table(setting: Mapping[str, Any]) -> str:
    return markdown_table(("", ""), [(name, str(value)) for name, value in setting.items()])


def as_page(parts: Sequence[str]) -> str:
    """Markdown of paragraphs; empty ones are left out."""
    return "\n\n".join(part for part in parts if part) + "\n"
