# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Does ProximalLoRA preserve more of what a model could do than simpler ways to regularise an adapter?

    python -m examples.benchmarks.forgetting                          # everything: hours of a core
    python -m examples.benchmarks.forgetting --quick --output quick   # half a minute, means nothing

Two models learn something new: a sentence encoder (encoder.py) and a language model (language_model.py). Plain LoRA at
its best learning rate is the reference. Every arm (arms.py) is a path with one parameter from there toward the base
model; arms are compared by what they forget *at matched target loss*, seed by seed (analysis.py). Every run is a
record of results.jsonl.gz; recorded runs are not repeated, so that an interrupted benchmark continues where it
stopped. Other tasks: --sections and --dataset, --section and --corpus.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging

from examples.benchmarks.forgetting.analysis import analyse
from examples.benchmarks.forgetting.arms import ARMS
from examples.benchmarks.forgetting.encoder import EncoderOptions, EncoderSetting
from examples.benchmarks.forgetting.figure import draw
from examples.benchmarks.forgetting.language_model import LanguageModelOptions, LanguageModelSetting
from examples.benchmarks.forgetting.report import report, summary_page, with_verdict
from examples.benchmarks.forgetting.training import (
    BASE,
    LORA,
    Arm,
    Protocol,
    Run,
    Setting,
    Treatment,
    reference_runs,
    train,
    trained_runs,
)
from examples.common.files import save_json, save_text
from examples.common.records import JsonLines
from examples.common.reports import Folders, add_output, circumstances, command_line


MODULE = "examples.benchmarks.forgetting"
PILOT_SEED = 1000  # of the runs that choose the learning rate of plain LoRA; none of the seeds that are compared
SETTINGS = ("encoder", "language_model")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    logging.disable_progress_bar()
    folders = Folders.of("benchmarks/forgetting", "forgetting", options.output, options.quick)
    arms = choose_arms(options)
    records = JsonLines(folders.runs / "results.jsonl")
    summaries = {}
    for key in options.settings:
        setting = make_setting(key, options, Path(options.cache))
        setting.protocol = replace(
            setting.protocol, learning_rate=choose_rate(setting, options.learning_rates, records)
        )
        runs = measure(setting, arms, options.seeds, records)
        summaries[key] = {"setting": describe(setting), **analyse(runs, arms, setting.measures)}
    records.pack()
    record = {
        **circumstances(command_line(MODULE, options.command), options.date),
        "seeds": list(options.seeds),
        "quick": options.quick,
        "settings": summaries,
    }
    publish(record, folders)
    if options.page:
        page = Path(options.page)
        save_text(page, with_verdict(page.read_text(encoding="utf-8"), record))
    return 0


def publish(record: dict[str, Any], folders: Folders) -> None:
    """Summary, figure, the report at full length, and its numbers."""
    save_json(folders.full / "summary.json", record)
    save_text(folders.full / "report.md", report(record))
    save_text(folders.summary / "README.md", summary_page(record))
    draw(record, folders.summary / "figure.png")
    print(summary_page(record))


def runs_of(setting: Setting, records: JsonLines) -> list[Run]:
    """The recorded runs of this setting, under its protocol and with its options."""
    wanted = {"setting": setting.key, "protocol": asdict(setting.protocol), "options": described(setting)}
    return [
        Run(**{key: value for key, value in line.items() if key != "options"})
        for line in records.lines
        if "arm" in line and all(line[key] == value for key, value in wanted.items())
    ]


def described(setting: Setting) -> dict:
    """The options as JSON gives them back."""
    return json.loads(json.dumps(asdict(setting.options)))


def choose_rate(setting: Setting, rates: Sequence[float], records: JsonLines) -> float:
    """The learning rate at which plain LoRA has the least validation loss, in one pilot run each."""
    losses = {}
    for rate in rates:
        setting.protocol = replace(setting.protocol, learning_rate=rate)
        key = {"pilot": setting.key, "protocol": asdict(setting.protocol), "options": described(setting)}
        known = [line for line in records.lines if {name: line.get(name) for name in key} == key]
        if not known:
            for _, last in train(setting, PILOT_SEED, Treatment()):
                model = last
            loss = setting.evaluate(model, PILOT_SEED, "validation")["target_loss"]
            records.append([{**key, "validation_loss": loss}])
            known = records.lines[-1:]
        losses[rate] = known[0]["validation_loss"]
    return min(losses, key=losses.__getitem__)


def choose_arms(options: argparse.Namespace) -> list[Arm]:
    """The arms that are asked for, as far as what they start from is there."""
    chosen = [
        replace(arm, grid={key: values[: options.points] for key, values in arm.grid.items()})
        for arm in ARMS
        if not options.arms or arm.key in options.arms
    ]
    return [arm for arm in chosen if arm.start is None or arm.start[0] in {other.key for other in chosen}]


def measure(setting: Setting, arms: Sequence[Arm], seeds: Sequence[int], records: JsonLines) -> list[Run]:
    """Trains what the records lack of arms x values x seeds, and returns all runs of these."""
    done = {(run.arm, run.value, run.seed) for run in runs_of(setting, records)}
    jobs: list[tuple[int, Arm | None, float, list[Arm], set]] = []  # with what each gives
    for seed in seeds:
        free = {(arm.key, v) for arm in arms if not (arm.trained or arm.start) for v in arm.grid[setting.key]}
        jobs.append((seed, None, 1.0, [], free | {(LORA, 1.0), (BASE, 0.0)}))
        for arm in (arm for arm in arms if arm.trained):
            for value in arm.grid[setting.key]:
                scaling = [other for other in arms if other.start == (arm.key, value)]
                gives = {(arm.key, value)} | {(other.key, v) for other in scaling for v in other.grid[setting.key]}
                jobs.append((seed, arm, value, scaling, gives))
    open_jobs = [job for job in jobs if any((*key, job[0]) not in done for key in job[4])]
    for seed, arm, value, scaling, _ in tqdm(open_jobs, desc=setting.key):
        if arm is None:
            new = reference_runs(setting, arms, seed)
        else:
            new = trained_runs(setting, arm, value, seed, scaling)
        fresh = [run for run in new if (run.arm, run.value, run.seed) not in done]
        records.append({**asdict(run), "options": described(setting)} for run in fresh)
    wanted = {(*key, job[0]) for job in jobs for key in job[4]}
    return [run for run in runs_of(setting, records) if (run.arm, run.value, run.seed) in wanted]


def make_setting(key: str, options: argparse.Namespace, cache: Path) -> Setting:
    quick = options.quick
    if key == "encoder":
        chosen = EncoderOptions(dataset=options.dataset, sections=tuple(options.sections))
        if quick:
            chosen = replace(chosen, top_layers=1, max_length=8, train=32, test=24, others=24)
        return EncoderSetting(chosen, Protocol(options.steps or (3 if quick else 60), 8 if quick else 16, 1.0))
    model = LanguageModelOptions(corpus=options.corpus, section=options.section)
    if quick:
        model = replace(
            model, vocabulary=300, layers=1, width=32, max_length=12, pretrain_steps=20, train=32, test=24, others=24
        )
    protocol = Protocol(options.steps or (4 if quick else 120), 8 if quick else 16, 1.0)
    return LanguageModelSetting(model, protocol, cache)


def describe(setting: Setting) -> dict:
    return {
        "key": setting.key,
        "title": setting.title,
        "target": setting.target,
        "measures": [asdict(measure) for measure in setting.measures],
        "options": described(setting),
        "protocol": {**asdict(setting.protocol), "sum_of_rates": setting.protocol.sum_of_rates},
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    parser.add_argument("--cache", default="build/models", help="where the pretrained language model is kept")
    parser.add_argument("--page", help="a Markdown page whose part between the marks of a verdict is replaced")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--arms", nargs="+", choices=[arm.key for arm in ARMS], help="default: all")
    parser.add_argument("--points", type=int, help="values of each arm's parameter (default: all of its grid)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4")
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="plain LoRA gets the best of them")
    parser.add_argument("--dataset", default="debian_topics", help="labelled texts of the encoder's setting")
    parser.add_argument("--sections", nargs="+", default=EncoderOptions.sections, help="labels that are trained on")
    parser.add_argument("--corpus", default="debian_descriptions", help="texts of the language model's setting")
    parser.add_argument("--section", default=LanguageModelOptions.section, help="the one that is adapted to")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models and few runs, to check that everything works"
    )
    options = parser.parse_args(argv)
    options.seeds = options.seeds or ([0, 1] if options.quick else [0, 1, 2, 3, 4])
    options.points = options.points or (2 if options.quick else None)
    options.learning_rates = options.learning_rates or ([1e-3] if options.quick else [1e-3, 3e-3, 1e-2])
    options.command = list(argv if argv is not None else sys.argv[1:])
    return options
