# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Wrapped and compiled models have the names, kernels and recommendations of the models in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_linear import recommend_modules
from peft_linear.capture.features import jacobian_features
from peft_linear.errors import TargetError
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk


def compiled(model):
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "model.compile": compiled,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_have_the_kernels_and_names_of_what_is_in_them(wrapper):
    batches = small.text_batches()
    expected = ntk(small.seeded(small.bert), batches)
    got = ntk(WRAPPERS[wrapper](small.seeded(small.bert)), batches)
    assert got.names == expected.names
    assert torch.equal(got.subset(), expected.subset()) and torch.equal(got.base, expected.base)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_get_the_same_recommendation_and_features(wrapper):
    batches = small.text_batches()
    expected = recommend_modules(small.seeded(small.bert), batches, 3, progress=False)
    got = recommend_modules(WRAPPERS[wrapper](small.seeded(small.bert)), batches, 3, progress=False)
    assert got.modules == expected.modules and got.scores == expected.scores
    features = jacobian_features(WRAPPERS[wrapper](small.seeded(small.bert)), batches, progress=False)
    assert torch.equal(features.rows, jacobian_features(small.seeded(small.bert), batches, progress=False).rows)


def test_forwards_that_are_compiled_by_themselves_run_eagerly():
    batches, expected = small.text_batches(), ntk(small.seeded(small.bert), small.text_batches())
    whole, part = small.seeded(small.bert), small.seeded(small.bert)
    whole.forward = torch.compile(whole.forward, backend="eager")
    layer = part.bert.encoder.layer[0]
    layer.forward = torch.compile(layer.forward, backend="eager")
    for model in (whole, part):
        model(input_ids=batches[0]["input_ids"])
        assert torch.equal(ntk(model, batches).subset(), expected.subset())


def test_parts_that_are_compiled_in_a_wrapper_of_their_own_are_refused():
    model = small.seeded(small.bert)
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")
    with pytest.raises(
        TargetError, match=r"bert\.encoder\.layer\.0 is compiled by itself.*in place, with part\.compile"
    ):
        ntk(model, small.text_batches())
    compile_regions = pytest.importorskip("accelerate.utils").compile_regions
    model = compile_regions(small.seeded(small.bert), backend="eager")
    assert torch.equal(
        ntk(model, small.text_batches()).subset(), ntk(small.seeded(small.bert), small.text_batches()).subset()
    )
