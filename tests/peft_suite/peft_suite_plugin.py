# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for peft's own tests: our configuration in place of LoRA's, and a record of every outcome.

`--strength λ` replaces `LoraConfig` by `ProximalLoraConfig` with that default; without it LoRA is tested. `--results`
is a file of JSON lines, one a phase of a test. Cases that are parametrised with another method are deselected.
"""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path

import peft
import peft.tuners
import peft.tuners.lora


def pytest_addoption(parser):
    parser.addoption("--strength", type=float, default=None, help="λ of ProximalLoraConfig in place of LoraConfig")
    parser.addoption("--results", type=Path, default=None, help="where to write the outcomes")


def pytest_configure(config):
    strength = config.getoption("--strength")
    if strength is not None:
        replace_lora_config(strength)
    results = config.getoption("--results")
    if results is not None and not hasattr(config, "workerinput"):  # with xdist the main process hears of everything
        config.pluginmanager.register(Outcomes(results), "peft-suite-outcomes")
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.005))  # of retries to reach the Hub


def replace_lora_config(strength: float) -> None:
    """`from peft import LoraConfig` means `ProximalLoraConfig` with λ = `strength` from now on."""
    from peft_linear import ProximalLoraConfig

    names = list(inspect.signature(ProximalLoraConfig.__init__).parameters)[1:]
    defaults = list(ProximalLoraConfig.__init__.__defaults__)
    defaults[names.index("proximal_lambda") - len(names)] = strength
    ProximalLoraConfig.__init__.__defaults__ = tuple(defaults)
    assert ProximalLoraConfig().proximal_lambda == strength
    for module in (peft, peft.tuners, peft.tuners.lora):
        module.LoraConfig = ProximalLoraConfig


def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        methods = [value for value in values if isinstance(value, type) and issubclass(value, peft.PeftConfig)]
        (kept if all(method is peft.LoraConfig for method in methods) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


class Outcomes:
    """Appends every outcome to a file at once, so that a crash loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report):
        self.write(report.nodeid, report.outcome, report)

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(report.nodeid, "failed", report)

    def write(self, test, outcome, report):
        reason = str(report.longrepr).strip().splitlines()[-1] if outcome == "failed" and report.longrepr else ""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "reason": reason}) + "\n")
