# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import gzip
import json

from examples.data import build_debian_descriptions as script


DUMP = """Package: chess-one
Section: games
Description: plays chess against a human

Package: chess-two
Source: chess (1.2)
Section: games
Description: plays chess against human beings

Package: chess-doc
Section: doc
Description: documentation of a chess program

Package: elsewhere
Section: contrib/games
Description: something that is not free

Package: solver
Section: math
Description: solves large sparse linear systems
"""


def test_every_section_is_there_once_each_text_and_the_bytes_repeat(tmp_path):
    (tmp_path / "dump").write_text(DUMP, encoding="utf-8")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        arguments = ["--input", str(tmp_path / "dump"), "--output", str(folder), "--release", "test"]
        assert script.main([*arguments, "--date", "2026-01-01"]) == 0
    first, second = ((folder / "descriptions.jsonl.gz").read_bytes() for folder in folders)
    assert first == second
    rows = [json.loads(line) for line in gzip.decompress(first).decode().splitlines()]
    assert [(row["section"], row["source"]) for row in rows] == [("games", "chess"), ("math", "solver")]
    provenance = json.loads((folders[0] / "provenance.json").read_text())
    assert provenance["rows"] == 2 and provenance["rows_of_section"] == {"games": 1, "math": 1}
