# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The data sets that ship: their promises (balanced, no leaks) and the script that builds them."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from examples.data import build_debian_topics as builder


DATA = Path(__file__).parents[2] / "examples" / "data"
SPLITS = ("train", "validation", "test")
WORDS = [a + b for a, b in itertools.product("bdfglmnprst", ["alo", "eri", "imu", "ona", "usk", "yte", "ov", "and"])]


def read(folder):
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in SPLITS
    }


def stanza(package, text, section, source=None, more=""):
    lines = [f"Package: {package}", "Version: 1.0", f"Description: {text}", f"Section: {section}"]
    return "\n".join(lines + ([f"Source: {source}"] if source else [])) + more + "\n\n"


def random_dump(sources, seed):
    """`sources` packages of two sections, some of which come from one source, with random words as descriptions."""
    generator = random.Random(seed)
    stanzas = []
    for number in range(sources):
        for part in range(generator.choice((1, 1, 2))):
            text = " ".join(generator.sample(WORDS, 6))
            stanzas.append(stanza(f"p{number}x{part}y", text, ("games", "sound")[number % 2], f"source{number} (2.0)"))
    return "".join(stanzas)


def assert_no_leaks(splits, threshold=0.6):
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {row["source"] for row in splits[one]} & {row["source"] for row in splits[other]}
    rows = [row for split in SPLITS for row in splits[split]]
    words = [frozenset(builder.WORD.findall(row["text"].lower())) for row in rows]
    for a, b in itertools.combinations(words, 2):
        assert len(a & b) < threshold * len(a | b)


@pytest.mark.parametrize("name", ["debian_topics", "debian_pairs"])
def test_shipped_sets_are_balanced_and_counted(name):
    splits, record = read(DATA / name), json.loads((DATA / name / "labels.json").read_text(encoding="utf-8"))
    assert {split: len(rows) for split, rows in splits.items()} == record["rows"]
    for rows in splits.values():
        counts = Counter(row["label"] for row in rows)
        assert sorted(counts) == list(range(len(record["labels"])))
        assert len(set(counts.values())) == 1


def test_shipped_topics_have_no_leaks():
    splits = read(DATA / "debian_topics")
    labels = json.loads((DATA / "debian_topics" / "labels.json").read_text(encoding="utf-8"))["labels"]
    assert all(row["section"] == labels[row["label"]] for rows in splits.values() for row in rows)
    assert_no_leaks(splits)


def test_shipped_pairs_are_made_of_the_topics_of_their_split():
    topics = {split: {r["text"]: r["section"] for r in rows} for split, rows in read(DATA / "debian_topics").items()}
    for split, pairs in read(DATA / "debian_pairs").items():
        assert len({frozenset((pair["text"], pair["text_pair"])) for pair in pairs}) == len(pairs)
        for pair in pairs:
            same = topics[split][pair["text"]] == topics[split][pair["text_pair"]]
            assert pair["label"] == int(same) and pair["text"] != pair["text_pair"]


def test_script_reproduces_byte_by_byte_and_depends_on_the_seed(tmp_path):
    dump = tmp_path / "dumpavail.txt"
    dump.write_text(random_dump(60, seed=1), encoding="utf-8")
    options = ["--input", str(dump), "--sections", "games", "sound", "--sizes", "12", "4", "6", "--date", "2026-01-01"]
    for folder, seed in [("one", "0"), ("two", "0"), ("three", "1")]:
        assert builder.main([*options, "--release", "test", "--output", str(tmp_path / folder), "--seed", seed]) == 0
    files = [sorted((tmp_path / folder).rglob("*.json*")) for folder in ("one", "two", "three")]
    one, two, three = ([path.read_bytes() for path in paths] for paths in files)
    assert len(one) == 8 and one == two and one != three
    splits = read(tmp_path / "one" / "debian_topics")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 24, "validation": 8, "test": 12}
    assert_no_leaks(splits)


def test_what_is_left_out():
    dump = "".join(
        [
            stanza("chess", "game of  chess for one\tplayer", "games"),
            stanza("chess-data", "pictures of all chess pieces", "games", "chess"),
            stanza("oldchess", "transitional package for the chess game", "games"),
            stanza("nonfree", "a proprietary racing game", "non-free/games"),
            stanza("short", "racing game", "games"),
            stanza("mail", "reads letters from a server", "mail"),
            stanza("two", "plays tunes in a game", "games"),
            stanza("faces", "Plays tunes in a game", "sound"),
            stanza("dots", "connect the dots on paper", "games", "dots-src (1:2.0-1)", "\nTag: a,\n b: c\n .\n"),
        ]
    )
    rows = builder.select_rows(builder.parse_packages(dump), ("games", "sound"))
    assert rows == [
        builder.Row("game of chess for one player", "games", "chess"),
        builder.Row("connect the dots on paper", "games", "dots-src"),
    ]


def test_near_duplicates_are_dropped_at_the_threshold_and_not_below():
    first, near, far = (builder.Row(text, "games", "s") for text in ("a b c d", "d c b e", "a b x y"))
    assert builder.drop_near_duplicates([first, near, far], 0.6) == [first, far]
    assert builder.drop_near_duplicates([first, near, far], 0.61) == [first, near, far]


def test_too_small_inputs_are_refused():
    rows = [builder.Row(f"text number {i}", "games", f"s{i}") for i in range(5)]
    with pytest.raises(ValueError, match=r"too few descriptions, still missing: .*games"):
        builder.split_rows(rows, {"train": 4, "validation": 1, "test": 1}, ("games",), seed=0)
    two_sections = [*rows[:2], builder.Row("another text", "sound", "s9")]
    with pytest.raises(ValueError, match="3 rows give"):
        builder.make_pairs(two_sections, 20, seed=0)
