# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Example scripts as modules. They are no package: each is loaded by its path, with its own folder importable."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.helpers.paper_data import modules_of
from tests.helpers.tiny import save_model


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def load_script():
    """`load_script("demo/demo.py")` is the module of that example."""

    def load(relative):
        path = EXAMPLES / relative
        name = path.stem
        if name not in sys.modules:
            sys.path[:0] = [str(path.parent), str(EXAMPLES)]
            try:
                spec = importlib.util.spec_from_file_location(name, path)
                sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[name])
            except BaseException:
                sys.modules.pop(name, None)
                raise
            finally:
                del sys.path[:2]
        return sys.modules[name]

    return load


@pytest.fixture(scope="session")
def paper(load_script):
    """The modules of `examples/paper`."""
    return modules_of(load_script("paper/run.py"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a small pretrained encoder with its tokenizer."""
    return str(save_model(tmp_path_factory.mktemp("tiny")))
