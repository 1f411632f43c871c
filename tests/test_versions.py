# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What setup.py admits is what is tested: its lower bounds are .ci/lowest.txt, and constraints.txt lies within."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[1]


def canonical(name):
    return name.lower().replace("_", "-")


def pins(file):
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    for requirement in requirements:
        assert [each.operator for each in requirement.specifier] == ["=="], f"{file}: {requirement}"
    return {canonical(each.name): next(iter(each.specifier)).version for each in requirements}


@pytest.fixture
def admitted(monkeypatch):
    """Name -> requirement, of the package and of its tests, as setup.py gives them to setuptools."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    texts = [*given["install_requires"], *given["extras_require"]["test"]]
    return {canonical(Requirement(text).name): Requirement(text) for text in texts}


def test_the_lower_bounds_are_the_versions_that_the_matrix_tests(admitted):
    lowest = pins(".ci/lowest.txt")
    bounds = {}
    for name, requirement in admitted.items():
        assert [each.operator for each in requirement.specifier] == [">="], requirement
        bounds[name] = next(iter(requirement.specifier)).version
    assert {name: Version(version) for name, version in bounds.items()} == {
        name: Version(version) for name, version in lowest.items()
    }


def test_the_tested_versions_are_admitted(admitted):
    tested = pins("constraints.txt")
    assert {"torch", "peft", "transformers", "accelerate", "trl"} <= tested.keys()
    for name, version in tested.items():
        if name in admitted:
            assert version in admitted[name].specifier, f"{name} {version} is not {admitted[name]}"
