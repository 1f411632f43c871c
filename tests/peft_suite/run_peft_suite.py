# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""peft's own test suite with our configuration in place of LoRA's: what LoRA passes, ProximalLoRA must pass.

    python tests/peft_suite/run_peft_suite.py                       # everything: tens of minutes
    python tests/peft_suite/run_peft_suite.py --files test_mapping.py --strengths 0.01

The sdist of the installed peft comes from PyPI into a build folder; nothing of it is part of this repository. The
tests run for stock LoRA and for each λ, and the outcomes are compared test by test. Exit status: 0 if ProximalLoRA
passes whatever LoRA passes but for `known_differences.json`, 1 if not, 2 if nothing could be compared. Tests that need
a model of the Hub fail for both where it cannot be reached, and then say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STOCK = "LoRA"
NEEDS_GPU = ("test_common_gpu.py", "test_gpu_examples.py", "test_gptqmodel.py")
NEEDS_HUB = (  # every test of these; `--hub` runs them as well
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_stablediffusion.py",
    "test_token_classification_qa.py",
    "test_vision_models.py",
)
USED_BY_THE_TESTS = ("parameterized", "diffusers")  # imported by peft's tests, of no use to this package
INI = """[pytest]
addopts = -p no:cacheprovider
markers =
    single_gpu_tests: needs a GPU
    multi_gpu_tests: needs several
    regression: needs recorded results
    bitsandbytes: needs bitsandbytes
"""
ORDER = ("passed", "skipped", "failed")


def prepare(folder: Path) -> None:
    """Downloads and unpacks the tests of the installed peft, and installs what they import, both once."""
    name = f"peft-{version('peft')}"
    if not (folder / "sdist" / f"{name}.tar.gz").exists():
        pip("download", "--no-deps", "--no-binary=peft", f"--dest={folder / 'sdist'}", name.replace("-", "=="))
    if not (folder / "tests").exists():
        with tarfile.open(folder / "sdist" / f"{name}.tar.gz") as archive:
            members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            for member in members:
                member.name = member.name.removeprefix(f"{name}/")
            archive.extractall(folder, members, filter="data")
        (folder / "tests" / "__init__.py").touch()  # their relative imports need it; the sdist leaves it out
        (folder / "pytest.ini").write_text(INI, encoding="utf-8")
    if not (folder / "dependencies").exists():
        pip("install", "--no-deps", f"--target={folder / 'dependencies'}", *USED_BY_THE_TESTS)


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def files_about_lora(folder: Path, hub: bool) -> list[str]:
    """The test files that use `LoraConfig` and run on a CPU."""
    left_out = NEEDS_GPU if hub else (*NEEDS_GPU, *NEEDS_HUB)
    return sorted(
        path.name
        for path in (folder / "tests").glob("test_*.py")
        if path.name not in left_out and "LoraConfig" in path.read_text(encoding="utf-8")
    )


def run(folder: Path, files: Sequence[str], strength: float | None, workers: int) -> dict[str, str]:
    """The outcome of every test, with LoRA (`strength` None) or with ProximalLoRA."""
    name = STOCK if strength is None else f"{strength:g}"
    results, log = folder / f"results_{name}.jsonl", folder / f"log_{name}.txt"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "peft_suite_plugin", f"--results={results}", "--tb=short", "-q"]
    command += [] if strength is None else [f"--strength={strength}"]
    command += [f"-n{workers}"] if workers > 1 else []
    paths = [str(HERE), str(ROOT), str(folder / "dependencies"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as output:
        tests = [f"tests/{file}" for file in files]
        subprocess.run([*command, *tests], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return read_outcomes(results.read_text(encoding="utf-8")) if results.exists() else {}


def read_outcomes(lines: str) -> dict[str, str]:
    """Test -> the worst outcome of its phases. What is named after the class has LoRA's name."""
    outcomes: dict[str, str] = {}
    for line in lines.splitlines():
        record = json.loads(line)
        test = record["test"].replace("ProximalLora", "Lora")
        outcomes[test] = max(outcomes.get(test, "passed"), record["outcome"], key=ORDER.index)
    return outcomes


def differences(stock: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """The tests that pass for LoRA and not for us -> what became of them."""
    return {
        test: ours.get(test, "did not run")
        for test, outcome in stock.items()
        if outcome == "passed" and ours.get(test) != "passed"
    }


def summary(outcomes: Mapping[str, Mapping[str, str]], known: Mapping[str, str]) -> str:
    """Markdown: the counts of each run, and the tests that differ from LoRA's, with the reason where it is known."""
    lines = ["| | passed | failed | skipped |", "|---|---:|---:|---:|"]
    for name, results in outcomes.items():
        counts = Counter(results.values())
        lines.append(f"| {name} | {counts['passed']:,} | {counts['failed']:,} | {counts['skipped']:,} |")
    for name, results in outcomes.items():
        if name == STOCK:
            continue
        differing = differences(outcomes[STOCK], results)
        lines += ["", f"Passed by LoRA and not by {name}: {len(differing)}"]
        for test, outcome in differing.items():
            why = f"known: {known[test]}" if test in known else "NEW, see the log"
            lines.append(f"- `{test}` ({outcome}; {why})")
    return "\n".join(lines)


def verdict(outcomes: Mapping[str, Mapping[str, str]], known: Mapping[str, str]) -> int:
    """The exit status."""
    if "passed" not in outcomes[STOCK].values():
        return 2
    return int(any(test not in known for ours in outcomes.values() for test in differences(outcomes[STOCK], ours)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", help="of peft's tests/ (default: all that use LoraConfig)")
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.0, 0.01], help="values of proximal_lambda")
    parser.add_argument("--hub", action="store_true", help="also the files of which every test needs the Hub")
    parser.add_argument("--workers", type=int, default=1, help="processes; more than one needs pytest-xdist")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peft_suite", help="downloads, logs, results")
    arguments = parser.parse_args(argv)
    folder = (arguments.folder / version("peft")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    files = arguments.files or files_about_lora(folder, arguments.hub)
    outcomes = {}
    for strength in (None, *arguments.strengths):
        name = STOCK if strength is None else f"ProximalLoRA, λ = {strength:g}"
        print(f"{name}: {len(files)} files …", flush=True)
        outcomes[name] = run(folder, files, strength, arguments.workers)
    known = json.loads((HERE / "known_differences.json").read_text(encoding="utf-8"))
    text = f"peft {version('peft')}, transformers {version('transformers')}, torch {version('torch')}\n\n"
    text += summary(outcomes, known)
    (folder / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nLogs and results: {folder}")
    status = verdict(outcomes, known)
    if status == 2:
        print("LoRA passed nothing, so nothing was compared: see the logs", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
