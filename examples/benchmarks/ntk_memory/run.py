# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The kernels of a real encoder on 2,048 examples within a few gigabytes: `Resources(max_memory=...)`.

    python -m examples.benchmarks.ntk_memory

Every linear module of MiniLM (22.7M parameters) has a kernel of 4,096 rows, two outputs an example. Held in memory,
rows and blocks would take about 8 GB. The script measures the peak of the whole process (resident set, with Python,
torch and the model) over the computation and over the spectrum of all modules together, and fails above `--within`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from examples.common.files import save_json, save_text
from examples.common.machine import peak_bytes
from examples.common.reports import Folders, add_output, as_page, circumstances, command_line, provenance
from examples.common.tasks import DEMO_DATASET, DEMO_MODEL, load_quietly, load_task
from peft_linear import Resources, compute_ntk
from peft_linear.report.markdown import markdown_table


MODULE = "examples.benchmarks.ntk_memory"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    task = load_task(options.model, options.dataset, options.max_length)
    batches = task.calibration(options.examples, options.batch_size)
    for batch in batches:  # two classes: the first half of the topics against the others
        batch["labels"] = (batch["labels"] >= len(task.labels) // 2).long()
    model, _ = load_quietly(options.model, ("first half", "second half"))
    before = peak_bytes()

    start = time.perf_counter()
    resources = Resources(max_memory=options.max_memory, folder=options.folder, progress=options.progress)
    kernels = compute_ntk(model, batches, resources=resources)
    seconds, after_kernels = time.perf_counter() - start, peak_bytes()
    start = time.perf_counter()
    spectrum = kernels.spectrum()
    seconds_spectrum, peak = time.perf_counter() - start, peak_bytes()

    rows = kernels.num_examples * kernels.num_outputs
    result = {
        "model": options.model,
        "modules": len(kernels),
        "examples": kernels.num_examples,
        "outputs": kernels.num_outputs,
        "rows": rows,
        "max_length": options.max_length,
        "batch_size": options.batch_size,
        "max_memory": options.max_memory,
        "blocks_bytes": 8 * rows**2 * len(kernels),
        "peak_bytes_before": before,
        "peak_bytes_after_kernels": after_kernels,
        "peak_bytes": peak,
        "within_bytes": int(options.within * 2**30),
        "seconds_kernels": seconds,
        "seconds_passes": kernels.provenance["seconds_passes"],
        "seconds_gram": kernels.provenance["seconds_gram"],
        "seconds_spectrum": seconds_spectrum,
        "storage": kernels.provenance["storage"],
        "numerical_rank": spectrum.numerical_rank,
        "effective_rank": spectrum.effective_rank,
        **circumstances(command_line(MODULE, argv if argv is not None else sys.argv[1:]), options.date),
    }
    table = report(result)
    print(table)
    folders = Folders.of("benchmarks/ntk_memory", "ntk_memory", options.output)
    save_json(folders.runs / "results.json.gz", result)
    save_text(folders.summary / "README.md", table)
    if peak > result["within_bytes"]:
        print(f"the process took {gigabytes(peak)}, more than {options.within:g} GiB", file=sys.stderr)
        return 1
    return 0


def report(result: dict[str, Any]) -> str:
    """The measurement in Markdown."""
    storage = result["storage"]
    rows = [
        ("kernels", f"{result['modules']} modules and the head, {result['rows']:,} rows each ({result['examples']:,} "
         f"examples x {result['outputs']} logits)"),
        ("blocks alone", gigabytes(result["blocks_bytes"])),
        ("max_memory", result["max_memory"] or "none"),
        ("rows and their factors; blocks", f"{storage['parts']}; {storage['blocks']}"),
        ("peak of the process before", gigabytes(result["peak_bytes_before"])),
        ("peak after the kernels", gigabytes(result["peak_bytes_after_kernels"])),
        ("peak after the spectrum of all modules", gigabytes(result["peak_bytes"])),
        ("seconds: passes", f"{result['seconds_passes']:.0f}"),
        ("seconds: Gram matrices", f"{result['seconds_gram']:.0f}"),
        ("seconds: spectrum", f"{result['seconds_spectrum']:.0f}"),
    ]  # fmt: skip
    return as_page(
        [
            "# Memory of a large computation",
            f"{result['model']}, texts of up to {result['max_length']} tokens, batches of {result['batch_size']}; the "
            f"peak is the resident set of the whole process, which may be {result['within_bytes'] / 2**30:g} GiB.",
            markdown_table(("", "measured"), rows),
            provenance(result),
        ]
    )


def gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--dataset", default=DEMO_DATASET, help="a data set with at least two classes")
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-memory", default="2GB", help="of compute_ntk")
    parser.add_argument("--within", type=float, default=4.0, help="GiB that the whole process may take")
    parser.add_argument("--folder", help="of compute_ntk; a run that was stopped goes on from it")
    add_output(parser)
    parser.add_argument("--progress", action="store_true")
    return parser.parse_args(argv)
