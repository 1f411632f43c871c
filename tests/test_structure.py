# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can check: imports point one way, files stay small, headers are there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_linear"
LAYERS = {  # a layer may import from itself and from lower numbers
    "errors": 0,
    "files": 1,
    "functional": 1,
    "kernels": 2,
    "capture": 3,
    "tuners": 3,
    "recommendation": 4,
    "proximal": 4,
    "report": 5,
    "selection": 6,
    "integrations": 7,
    "cli": 8,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path):
    """(line, layer) of every import of the package's own, but for those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = ("peft_linear", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [*base, *(node.module or "").split(".")] if node.module else list(base)
            targets = [[*names, alias.name] for alias in node.names] if len(names) == 1 else [names]
        elif isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "peft_linear" and len(target) > 1 and target[1] in LAYERS:
                yield node.lineno, target[1]


def test_the_checker_sees_relative_and_absolute_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "functional").mkdir()
    module = tmp_path / "functional" / "x.py"
    module.write_text(
        "from ..integrations import y\nfrom peft_linear.cli import z\nimport peft_linear.selection.a\n"
        "from .. import capture\ndef f():\n    from ..report import b\n"
    )
    assert [layer for _, layer in imported_layers(module)] == ["integrations", "cli", "selection", "capture", "report"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards_only(path):
    own = layer_of(path)
    if own == "__init__":
        return
    for line, layer in imported_layers(path):
        assert layer == own or LAYERS[layer] < LAYERS[own], f"{path}:{line}: {own} imports {layer}"


@pytest.mark.parametrize("path", sorted([*MODULES, *(ROOT / "examples").rglob("*.py")]), ids=str)
def test_files_are_short_and_carry_the_licence(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-FileCopyrightText: 2026 The peft-linear authors\n"), "the licence header is missing"
    assert text.count("\n") <= 500, "split it along a seam that has a name"


def test_functional_imports_no_model_library():
    for path in (PACKAGE / "functional").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "transformers" not in text.replace("transformers'", "") and "import peft" not in text, path
