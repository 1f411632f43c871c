# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can check: imports point one way, without cycles; files and functions stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_linear"
LAYERS = {  # a layer may import from itself and from lower numbers
    "errors": 0,
    "files": 1,
    "schema": 1,
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
MOST_LINES_OF_FILE, MOST_LINES_OF_BODY, MOST_PARAMETERS = 400, 60, 11

Module = tuple[str, ...]  # ("peft_linear", "kernels", "regression"); a package is its __init__


def module_of(path: Path) -> Module:
    parts = ("peft_linear", *path.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path, known: set[Module]) -> Iterator[tuple[int, Module]]:
    """(line, module) of every import from the package, also in functions and under `TYPE_CHECKING`.

    `from x import name` is an import of the module x.name if that is one of `known`, else of x.
    """
    inside = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            named = [(*base, alias.name) for alias in node.names]
            targets = [name if name in known else base for name in named]
        elif isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, target) for target in targets if target[0] == "peft_linear")


def import_cycles(paths: list[Path]) -> list[list[str]]:
    """Sets of modules that import each other, directly or through others."""
    known = {module_of(path) for path in paths}
    graph = {module_of(path): {target for _, target in imports(path, known)} for path in paths}

    def reachable(module: Module) -> set[Module]:
        found: set[Module] = set()
        waiting = [module]
        while waiting:
            new = graph.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    reached = {module: reachable(module) for module in known}
    cycles = {frozenset(m for m in reached[module] if module in reached.get(m, ())) for module in known}
    return sorted(sorted(".".join(module[1:]) for module in cycle) for cycle in cycles if cycle)


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """(name with line, function, whether it is a method with `self` or `cls`) of every function in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    methods = {id(child) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in node.decorator_list)
            yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node, id(node) in methods and not static


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement to the last, without the docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return 1 + body[-1].end_lineno - body[0].lineno if body else 0


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> int:
    """How many parameters there are; `*args` and `**kwargs` are one each, `self` and `cls` none."""
    given = function.args
    named = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
    return named + (given.vararg is not None) + (given.kwarg is not None) - is_method


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package of the given files in place of the project's and returns their paths."""
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)

    def write(files: dict[str, str]) -> list[Path]:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return [tmp_path / name for name in files]

    return write


def test_relative_absolute_local_and_type_only_imports_are_found(package):
    text = (
        "from ..integrations import y\nfrom peft_linear.cli import z\nimport peft_linear.selection.a\n"
        "from .. import capture\ndef f():\n    from ..report import b\n"
        "if TYPE_CHECKING:\n    from ..kernels.regression import C\n"
    )
    (path,) = package({"functional/x.py": text})
    layers = [module[1] for _, module in sorted(imports(path, {("peft_linear", "capture")}))]
    assert layers == ["integrations", "cli", "selection", "capture", "report", "kernels"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from .b import f", "from peft_linear.x.a import g"),
        ("from . import b", "import peft_linear.x.a"),
        ("from .b import f", "if TYPE_CHECKING:\n    from .a import G"),
        ("from .b import f", "def f():\n    from . import a"),
        ("from .c import f", "from .a import g"),
    ],
    ids=["absolute", "module", "type-only", "local", "through a third"],
)
def test_import_cycles_are_found(package, first, second):
    paths = package(
        {"x/__init__.py": "from .a import g", "x/a.py": first, "x/b.py": second, "x/c.py": "from . import b"}
    )
    modules = ["x.a", "x.b", "x.c"] if ".c" in first else ["x.a", "x.b"]
    assert import_cycles(paths) == [modules]
    (paths[2]).write_text("from peft_linear.errors import E")
    assert import_cycles(paths) == []


def test_lines_and_parameters_of_functions_are_counted(package):
    text = (
        'def f(a, /, b, *args, c=1, **kwargs):\n    """Two\n    lines."""\n    x = 1\n\n    return x\n'
        "class A:\n    def method(self, a): ...\n    @classmethod\n    def made(cls): ...\n"
        '    @staticmethod\n    def free(a):\n        """Only a docstring."""\n'
    )
    (path,) = package({"x.py": text})
    counted = {node.name: (body_lines(node), parameters(node, method)) for _, node, method in functions(path)}
    assert counted == {"f": (3, 5), "method": (1, 1), "made": (1, 0), "free": (0, 1)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards_only(path):
    if module_of(path) == ("peft_linear",):
        return
    own = module_of(path)[1]
    for line, module in imports(path, {module_of(each) for each in MODULES}):
        layer = ".".join(module[1:2]) or "the package itself"
        assert layer == own or LAYERS.get(layer, len(MODULES)) < LAYERS[own], f"{path}:{line}: {own} imports {layer}"


def test_no_modules_import_each_other():
    assert import_cycles(MODULES) == []


@pytest.mark.parametrize("path", sorted([*MODULES, *(ROOT / "examples").rglob("*.py")]), ids=str)
def test_files_are_short_and_carry_the_licence(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-FileCopyrightText: 2026 The peft-linear authors\n"), "the licence header is missing"
    assert text.count("\n") <= MOST_LINES_OF_FILE, "split it along a seam that has a name"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_are_short_and_take_few_parameters(path):
    lines = {name: body_lines(node) for name, node, _ in functions(path)}
    assert {name: count for name, count in lines.items() if count > MOST_LINES_OF_BODY} == {}
    counts = {name: parameters(node, is_method) for name, node, is_method in functions(path)}
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == {}


def test_functional_imports_no_model_library():
    for path in (PACKAGE / "functional").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "transformers" not in text.replace("transformers'", "") and "import peft" not in text, path
