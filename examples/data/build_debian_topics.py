# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Builds the data sets of the examples from Debian's package lists: real text, no download beyond `apt-get update`.

    python -m examples.data.build_debian_topics            # reads `apt-cache dumpavail`
    python -m examples.data.build_debian_topics --input dumpavail.txt --release "Debian GNU/Linux 12 (bookworm)"

`debian_topics`: the one-line description of a package -> its section of the archive (8 balanced classes).
`debian_pairs`: two such descriptions -> do they come from the same section? (2 balanced classes)

All packages that are built from one source package fall into the same split, and near-duplicates (by words) are kept
once, so no text is known from training when it is tested. The same input, seed and options give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path


SECTIONS = ("admin", "devel", "games", "graphics", "net", "science", "sound", "text")
SPLITS = ("train", "validation", "test")
# Packages that say nothing of their own: development files, documentation, debug symbols, translations, data.
AUXILIARY_NAME = re.compile(r"(^lib.*\d$)|-(dev|doc|docs|dbg|dbgsym|data|common|l10n|i18n|examples?|tests?|locale)\b")
AUXILIARY_TEXT = re.compile(
    r"transitional|dummy package|metapackage|meta-package|meta package|translation|localization|debug symbols"
    r"|development files|header files|documentation|virtual package|empty package|common files|data files"
    r"|shared library",
    re.IGNORECASE,
)
WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Row:
    """One example: a description, the section it is filed under, and the source package it was built from."""

    text: str
    section: str
    source: str

    @property
    def words(self) -> frozenset[str]:
        return frozenset(WORD.findall(self.text.lower()))


def parse_packages(dump: str) -> Iterator[dict[str, str]]:
    """The stanzas of `apt-cache dumpavail` as {field: value}; continuation lines are left out."""
    for stanza in dump.split("\n\n"):
        fields = (line.split(":", 1) for line in stanza.splitlines() if line[:1].strip() and ":" in line)
        package = {name: value.strip() for name, value in fields}
        if "Package" in package:
            yield package


def select_rows(packages: Iterable[dict[str, str]], sections: Sequence[str]) -> list[Row]:
    """Descriptions of at least three words in `sections`, without auxiliary packages, sorted, each text once."""
    rows = {}
    for package in packages:
        section = package.get("Section", "")  # "contrib/games" and "non-free/games" differ from "games": left out
        text = " ".join(package.get("Description", "").split())
        row = Row(text, section, package.get("Source", package["Package"]).split(" ")[0])
        auxiliary = AUXILIARY_NAME.search(package["Package"]) or AUXILIARY_TEXT.search(text)
        if section in sections and len(row.words) >= 3 and not auxiliary:
            rows.setdefault(text.lower(), []).append(row)
    # A text that is filed under two sections has no right answer.
    kept = [min(same, key=lambda row: row.source) for same in rows.values() if len({r.section for r in same}) == 1]
    return sorted(kept, key=lambda row: (row.section, row.source, row.text))


def drop_near_duplicates(rows: Sequence[Row], threshold: float) -> list[Row]:
    """The rows in order, without those whose words overlap (Jaccard index) an earlier row's by `threshold` or more."""
    kept: list[tuple[Row, frozenset[str]]] = []
    holders: dict[str, list[int]] = {}
    for row in rows:
        words = row.words
        shared: dict[int, int] = {}
        for word in words:
            for position in holders.get(word, ()):
                shared[position] = shared.get(position, 0) + 1
        if any(count >= threshold * len(words | kept[position][1]) for position, count in shared.items()):
            continue
        for word in words:
            holders.setdefault(word, []).append(len(kept))
        kept.append((row, words))
    return [row for row, _ in kept]


def split_rows(rows: Sequence[Row], sizes: dict[str, int], sections: Sequence[str], seed: int) -> dict[str, list[Row]]:
    """`sizes[split]` rows of every section for every split, in shuffled order; a source package stays in one split.

    Raises:
        ValueError: a section has too few rows.
    """
    generator = random.Random(seed)
    sources = sorted({row.source for row in rows})
    generator.shuffle(sources)
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    missing = {(split, section): sizes[split] for split in SPLITS for section in sections}
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for source in sources:
        group = by_source[source]
        # The split that lacks most, relative to its size, of what this source package has to give.
        split = max(SPLITS, key=lambda s: (sum(missing[s, row.section] for row in group) / max(sizes[s], 1), s))
        for row in group:
            if missing[split, row.section] > 0:
                missing[split, row.section] -= 1
                splits[split].append(row)
    lacking = {f"{section} ({split})": count for (split, section), count in missing.items() if count}
    if lacking:
        raise ValueError(f"too few descriptions, still missing: {lacking}; ask for smaller splits or other sections")
    for chosen in splits.values():
        generator.shuffle(chosen)
    return splits


def make_pairs(rows: Sequence[Row], count: int, seed: int) -> list[dict]:
    """`count` pairs of rows, half of them from one section, no pair twice and no row paired with itself.

    Raises:
        ValueError: there are not that many pairs.
    """
    generator = random.Random(seed)
    by_section: dict[str, list[Row]] = {}
    for row in rows:
        by_section.setdefault(row.section, []).append(row)
    pairs: dict[frozenset[str], dict] = {}
    for _ in range(100 * count):
        if len(pairs) == count:
            break
        same = len(pairs) % 2
        first = generator.choice(rows)
        others = [section for section in sorted(by_section) if (section == first.section) == bool(same)]
        second = generator.choice(by_section[generator.choice(others)])
        key = frozenset((first.text, second.text))
        if len(key) == 2 and key not in pairs:
            pairs[key] = {"text": first.text, "text_pair": second.text, "label": same}
    if len(pairs) < count:
        raise ValueError(f"{len(rows)} rows give {len(pairs)} pairs, {count} were asked for; pass more rows")
    examples = list(pairs.values())
    generator.shuffle(examples)
    return examples


def write_set(folder: Path, splits: dict[str, list[dict]], labels: Sequence[str], provenance: dict) -> None:
    """One JSON object a line in {train,validation,test}.jsonl, and labels.json with the names and the provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    record = {"labels": list(labels), "rows": {split: len(rows) for split, rows in splits.items()}, **provenance}
    (folder / "labels.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def build(
    dump: str, output: Path, sections: Sequence[str], sizes: dict[str, int], seed: int, provenance: dict
) -> None:
    """Writes both data sets under `output`; `sizes` counts rows of a section in each split."""
    rows = drop_near_duplicates(select_rows(parse_packages(dump), sections), threshold=0.6)
    splits = split_rows(rows, sizes, sections, seed)
    topics = {
        split: [
            {"text": row.text, "label": sections.index(row.section), "section": row.section, "source": row.source}
            for row in chosen
        ]
        for split, chosen in splits.items()
    }
    provenance = {**provenance, "seed": seed, "rows_of_a_section": sizes}
    write_set(output / "debian_topics", topics, sections, provenance)
    pairs = {split: make_pairs(chosen, count=len(chosen) // 4 * 2, seed=seed) for split, chosen in splits.items()}
    write_set(output / "debian_pairs", pairs, ("different section", "same section"), provenance)


def debian_release() -> str:
    """The name of the system whose package lists are read."""
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip('"')
    return "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="a saved `apt-cache dumpavail` (default: run it)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the data sets")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), help="the classes")
    parser.add_argument("--sizes", nargs=3, type=int, default=(270, 40, 90), metavar=tuple(s.upper() for s in SPLITS))
    parser.add_argument("--release", help="where the package lists are from (default: this system)")
    parser.add_argument("--date", default=date.today().isoformat(), help="when they were read")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.input:
        dump = arguments.input.read_text(encoding="utf-8")
    else:
        dump = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    provenance = {
        "release": arguments.release or debian_release(),
        "command": "apt-cache dumpavail",
        "date": arguments.date,
    }
    sizes = dict(zip(SPLITS, arguments.sizes, strict=True))
    build(dump, arguments.output, tuple(arguments.sections), sizes, arguments.seed, provenance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
