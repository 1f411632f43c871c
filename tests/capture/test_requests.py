# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How kernels are asked for: the functions, `KernelRequest`, `Resources`, and keywords of earlier versions."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields

import pytest
import torch

from peft_linear import PeftLinearError, Resources, compute_ntk
from peft_linear.capture.features import jacobian_features
from peft_linear.capture.ntk import compute_ntk_at_ranks, compute_sign_kernel
from peft_linear.capture.request import KernelRequest
from peft_linear.errors import TargetError
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk


FUNCTIONS = [compute_ntk, compute_ntk_at_ranks, compute_sign_kernel, jacobian_features]


def call(function, **arguments):
    ranks = {"ranks": (2, 1)} if function is compute_ntk_at_ranks else {}
    return function(small.seeded(small.bert), small.text_batches(), **ranks, **arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_has_at_most_eleven_parameters_and_the_defaults_of_the_request(function):
    parameters = inspect.signature(function).parameters
    assert len(parameters) <= 11
    for field in fields(KernelRequest):
        if field.name in parameters:
            assert parameters[field.name].default == field.default


def test_compute_ntk_has_the_documented_parameters():
    assert str(list(inspect.signature(compute_ntk).parameters)) == (
        "['model', 'batches', 'targets', 'space', 'rank', 'lora_alpha', 'draws', 'outputs', 'always_trained', 'seed', "
        "'resources']"
    )
    assert compute_ntk.__name__ == "compute_ntk" and "J_m J_mᵀ" in compute_ntk.__doc__


@pytest.mark.parametrize("function", FUNCTIONS)
def test_progress_alone_is_short_for_resources(function, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=DeprecationWarning, module="peft_linear")
        call(function, targets=["query"], progress=False)
        assert capsys.readouterr().err == ""
        call(function, targets=["query"], resources=Resources(progress=False), progress=True)
    assert "100%" in capsys.readouterr().err


def test_progress_leaves_other_resources_as_they_are(tmp_path):
    resources = Resources(folder=tmp_path / "run", max_memory="1GB")
    kernels = call(compute_ntk, targets=["query"], resources=resources, progress=False)
    assert (tmp_path / "run" / "kernels.safetensors").exists()
    assert kernels.provenance["storage"]["max_memory"] == 10**9


FORMER = [
    ("max_memory", "4GB", r"resources=Resources\(max_memory=...\)"),
    ("folder", "run", r"resources=Resources\(folder=...\)"),
    ("distributed", False, r"resources=Resources\(distributed=...\)"),
    ("product_dtype", torch.float64, r"resources=Resources\(precision=...\)"),
    ("max_bytes", 1, r"resources=Resources\(max_memory=...\)"),
    ("num_projections", 4, r"outputs=RandomProjection\(...\)"),
    ("kernel", "sign", "compute_sign_kernel"),
]


@pytest.mark.parametrize("name, value, remedy", FORMER)
def test_a_keyword_of_an_earlier_version_is_refused_with_the_new_spelling(name, value, remedy):
    with pytest.raises(PeftLinearError, match=f"compute_ntk no longer takes '{name}'; pass .*{remedy}"):
        call(compute_ntk, **{name: value})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_resources_that_are_none_are_refused(function):
    with pytest.raises(PeftLinearError, match="resources must be a Resources, got '4GB'; pass resources="):
        call(function, resources="4GB")


def test_a_keyword_that_never_was_is_pythons_own_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranq'"):
        call(compute_ntk, ranq=3)


@pytest.mark.parametrize("unused", [{"folder": "run"}, {"precision": torch.float64}])
def test_features_refuse_resources_that_they_have_no_use_for(unused):
    with pytest.raises(PeftLinearError, match="leave `folder` and `precision` out of the resources"):
        call(jacobian_features, resources=Resources(**unused))


@pytest.mark.parametrize("space", ["lora", "weight", "rows", "columns", "bias"])
def test_a_request_knows_its_candidates_without_batches(space):
    model = small.seeded(small.bert)
    request = KernelRequest(space=space, rank=3)
    kernels = ntk(model, small.text_batches(), space=space, rank=3)
    model.forward = None  # a forward pass would fail
    assert request.candidates(model) == dict(kernels.num_parameters)


@pytest.mark.parametrize(
    "arguments, message",
    [({"targets": ["classifier"]}, "classifier"), ({"rank": 17, "space": "rows"}, "has 16 rows, fewer than rank=17")],
)
def test_candidates_refuse_what_compute_refuses(arguments, message):
    with pytest.raises(TargetError, match=message):
        KernelRequest(**arguments).candidates(small.seeded(small.bert))


def test_a_request_computes_what_the_functions_do():
    model, batches, quiet = small.seeded(small.bert), small.text_batches(), Resources(progress=False)
    request = KernelRequest(rank=2, seed=4)
    pairs = [
        (request.compute(model, batches, quiet), ntk(model, batches, rank=2, seed=4)),
        (
            request.compute_sign(model, batches, quiet),
            compute_sign_kernel(model, batches, rank=2, seed=4, progress=False),
        ),
        (
            request.compute_at_ranks(model, batches, (3, 2), quiet)[3],
            compute_ntk_at_ranks(model, batches, (3, 2), seed=4, progress=False)[3],
        ),
    ]
    for got, expected in pairs:
        assert got.rank == expected.rank and got.provenance["kernel"] == expected.provenance["kernel"]
        assert all(torch.equal(got[name], expected[name]) for name in expected.names)
