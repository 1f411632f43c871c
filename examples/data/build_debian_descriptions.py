# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Builds `examples/data/debian_descriptions`: the one-line descriptions of all Debian packages, for language models.

    python -m examples.data.build_debian_descriptions

Reads `apt-cache dumpavail` as build_debian_topics.py does, with the same rules for what is left out, but of every
section and without balancing: one gzipped JSON object a line, {"text", "section", "source"}, ordered by section.
Takes about three minutes: every description is compared with those before it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from examples.data.build_debian_topics import debian_release, drop_near_duplicates, parse_packages, select_rows


def build(dump: str, folder: Path, provenance: dict) -> None:
    """Writes descriptions.jsonl.gz and provenance.json into `folder`; the same dump gives the same bytes."""
    packages = list(parse_packages(dump))
    sections = sorted({section for package in packages if (section := package.get("Section")) and "/" not in section})
    rows = drop_near_duplicates(select_rows(packages, sections), threshold=0.6)
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "descriptions.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8"), 9, mtime=0))
    counts = dict(Counter(row.section for row in rows).most_common())
    record = {**provenance, "rows": len(rows), "rows_of_section": counts}
    (folder / "provenance.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="a saved `apt-cache dumpavail` (default: run it)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "debian_descriptions")
    parser.add_argument("--release", help="where the package lists are from (default: this system)")
    parser.add_argument("--date", default=date.today().isoformat(), help="when they were read")
    arguments = parser.parse_args(argv)
    if arguments.input:
        dump = arguments.input.read_text(encoding="utf-8")
    else:
        dump = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    release = arguments.release or debian_release()
    build(dump, arguments.output, {"release": release, "command": "apt-cache dumpavail", "date": arguments.date})
    return 0


if __name__ == "__main__":
    sys.exit(main())
