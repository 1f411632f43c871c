# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

from examples.benchmarks.ntk_memory import run as benchmark
from examples.common.files import read_json


def test_it_measures_the_whole_process_and_fails_above_the_limit(tmp_path, capsys):
    arguments = ["--examples", "16", "--max-length", "12", "--max-memory", "200KB", "--output", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    result = read_json(tmp_path / "results.json.gz")
    assert result["rows"] == 32 and result["blocks_bytes"] == 8 * 32**2 * result["modules"]
    assert result["storage"]["parts"] == result["storage"]["blocks"] == "files"
    assert 0 < result["peak_bytes_before"] <= result["peak_bytes_after_kernels"] <= result["peak_bytes"] < 4 * 2**30
    table = (tmp_path / "README.md").read_text()
    assert table in capsys.readouterr().out
    assert "37 modules and the head, 32 rows each (16 examples x 2 logits)" in table
    assert f"{result['peak_bytes'] / 2**30:.2f} GiB" in table and " ".join(arguments) in table
    assert benchmark.main([*arguments, "--within", "0.01"]) == 1
    assert "more than 0.01 GiB" in capsys.readouterr().err
