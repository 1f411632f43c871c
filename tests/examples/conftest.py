# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What tests of several examples need."""

import pytest

from tests.helpers.tiny import save_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a small pretrained encoder with its tokenizer."""
    return str(save_model(tmp_path_factory.mktemp("tiny")))
