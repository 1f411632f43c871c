# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The kernel is that of the function that trains: packed rows, odd layers, hooks, wrappers, shared parameters, ..."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import DataCollatorWithFlattening, RwkvConfig, RwkvForCausalLM

from peft_linear.capture.adapter_spaces import initial_lora_a
from peft_linear.capture.batches import Batch, read_batches
from peft_linear.errors import PeftLinearError, TargetError
from tests import reference
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk
from tests.helpers.odd_models import TwoLayers, error, numbers


TOKENS = reference.sequence_log_likelihood


@pytest.mark.parametrize("space", ["weight"])
def test_packed_rows_do_not_see_each_other(space):
    model = small.seeded(small.llama, causal=True)
    collate = DataCollatorWithFlattening()
    rows = [[{"input_ids": list(range(2 + n, 2 + 2 * n))} for n in pair] for pair in ((5, 7), (4, 6))]
    batches = [dict(collate(pair)) for pair in rows]
    assert model.config.use_cache
    kernels = ntk(model, batches, space=space, outputs="log_likelihood")
    assert model.config.use_cache
    model.config.use_cache = False
    for name in kernels.names:
        assert error(kernels[name], [model.get_submodule(name).weight], model, batches, TOKENS) < 1e-10


def test_a_cache_that_is_changed_in_place_is_off():
    config = RwkvConfig(
        vocab_size=50, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=32
    )
    model, batches = small.seeded(RwkvForCausalLM, config), small.causal_batches()
    kernels = ntk(model, batches, space="weight", outputs="log_likelihood", targets=["key"])
    model.config.use_cache = False
    assert (
        error(kernels[kernels.names[0]], [model.get_submodule(kernels.names[0]).weight], model, batches, TOKENS) < 1e-9
    )


class Cosine(nn.Linear):
    def forward(self, x):
        return 5 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x) * self.scale


class SquareLinear(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(torch.randn(d_out, d_in))

    def forward(self, x):
        return F.linear(x**2, self.weight)


@pytest.mark.parametrize("kind", [Cosine, Scaled, SquareLinear])
def test_a_linear_by_name_is_exact_as_a_head_and_refused_where_its_own_weight_counts(kind):
    model, batches = TwoLayers(b=kind), numbers()
    kernels = ntk(model, batches, targets=["a"], always_trained=["b"])
    assert error(kernels.base, model.b.parameters(), model, batches) < 1e-10
    with pytest.raises(TargetError, match=rf"a \({kind.__name__}\) would get a wrong kernel.*not the x Wᵀ \+ b"):
        ntk(TwoLayers(a=kind), batches, targets=["a"], space="weight", always_trained=())


def adapter_error(kernels, model, batches):
    """Of the module "a", against the gradient of B in peft's own layer."""
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=16, target_modules=["a"])).double()
    layer = adapted.get_base_model().a
    layer.lora_A["default"].weight.data = initial_lora_a("a", 4, 2)
    layer.lora_B["default"].weight.data.zero_()
    return error(kernels["a"], [layer.lora_B["default"].weight], adapted.eval(), batches)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_for_all_modules_are_refused_where_an_adapter_would_run_them(register):
    model, batches = TwoLayers(), numbers()
    handle = register(lambda *_: None)
    try:
        with pytest.raises(TargetError, match="registered for all modules .*Remove them"):
            ntk(model, batches, targets=["a"])
        kernels = ntk(model, batches, targets=["a"], space="weight", always_trained=())
    finally:
        handle.remove()
    assert error(kernels["a"], [model.a.weight], model, batches) < 1e-10
    assert float(ntk(model, batches, targets=["a"])["a"].norm()) > 0


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("space", ["weight", "lora"])
def test_users_hooks_act_inside_an_adapter_and_outside_a_weight(space, before):
    model, batches = TwoLayers(), numbers()
    if before:
        model.a.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,))
    else:
        model.a.register_forward_hook(lambda module, args, output: 3 * output + output**2)
    kernels = ntk(model, batches, targets=["a"], space=space, rank=2, always_trained=())
    if space == "weight":
        assert error(kernels["a"], [model.a.weight], model, batches) < 1e-10
    else:
        assert adapter_error(kernels, model, batches) < 1e-10


class PassesOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = small.seeded(small.bert)

    def forward(self, input_ids, **kwargs):
        return self.inner(input_ids=input_ids, **kwargs)


def test_keyword_arguments_that_are_passed_on_arrive():
    model, batches = PassesOn(), small.text_batches()
    kernels = ntk(model, batches, space="weight", always_trained=())
    name = kernels.names[0]
    assert error(kernels[name], [model.get_submodule(name).weight], model, batches, reference.logits) < 1e-10


class Shared(nn.Module):
    """Two linear layers with one weight, or one layer under two names."""

    def __init__(self, what):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        if what == "weight":
            self.c.weight = self.b.weight
        else:
            self.c = self.b
        self.double()

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_one_weight_in_two_layers_is_one_parameter_of_the_head():
    model, batches = Shared("weight"), numbers()
    kernels = ntk(model, batches, targets=["a"], always_trained=["b", "c"])
    assert error(kernels.base, [model.b.weight], model, batches) < 1e-10
    with pytest.raises(TargetError, match='shares its weight with other modules .b, c..*use space="lora"'):
        ntk(model, batches, targets=["b"], space="weight", always_trained=())
    assert len(ntk(model, batches, targets=["b", "c"], rank=2, always_trained=())) == 2


def test_one_module_under_two_names_takes_no_adapter_but_has_a_weight():
    model, batches = Shared("module"), numbers()
    with pytest.raises(
        TargetError, match="b is one module under several names .b, c., and peft puts an adapter at the"
    ):
        ntk(model, batches, targets=["b"], always_trained=())
    kernels = ntk(model, batches, targets=["b"], space="weight", always_trained=())
    assert error(kernels["b"], [model.b.weight], model, batches) < 1e-10


@pytest.mark.parametrize(
    "options",
    [None, {"trainable_token_indices": [3, 5, 7]}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}],
)
def test_parameters_that_are_tied_count_in_every_place(options):
    model = small.seeded(small.llama, causal=True, tie_word_embeddings=True)
    model.tie_weights()
    batches, head = small.causal_batches(), ["lm_head"]
    parameters = [model.lm_head.weight]
    if options is not None:
        model, head = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options)).double(), None
        parameters = [p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
        assert len(parameters) == 1
    kernels = ntk(model, batches, outputs="log_likelihood", always_trained=head)
    assert error(kernels.base, parameters, model, batches, TOKENS) < 1e-10


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.a, self.encoder, self.b = nn.Linear(4, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.b(self.encoder(self.a(x)).mean(1))


def test_the_fused_path_of_torchs_encoder_is_off():
    model = Encoder().eval()
    batches = [{"x": torch.randn(3, 5, 4, dtype=torch.float64)}]
    kernels = ntk(model, batches, space="weight", always_trained=["b"])
    assert torch.backends.mha.get_fastpath_enabled()
    for name in ("encoder.layers.0.linear1", "a"):
        assert error(kernels[name], [model.get_submodule(name).weight], model, batches) < 1e-10
    assert "encoder.layers.0.self_attn.out_proj" not in kernels.names  # torch uses its weight without calling it
    assert kernels.provenance["check"]["unchecked"] == []


def test_inside_inference_mode_nothing_changes():
    model, batches = small.seeded(small.bert), small.text_batches()
    expected = ntk(model, batches).subset()
    with torch.inference_mode():
        copies = [{key: value.clone() for key, value in batch.items()} for batch in batches]
        assert torch.equal(ntk(model, copies).subset(), expected)
        made_inside = TwoLayers()
    with pytest.raises(TargetError, match="made inside torch.inference_mode.*copy the model outside"):
        ntk(made_inside, numbers(), targets=["a"])


def test_weights_that_are_not_there_are_an_error():
    with torch.device("meta"):
        model = small.bert()
    with pytest.raises(TargetError, match="has no values .it is on the meta device.; load the weights"):
        ntk(model, small.text_batches())
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(TargetError, match="offloaded by accelerate.*without offloading"):
        ntk(accelerate.cpu_offload(small.seeded(small.bert)), small.text_batches())


def test_the_noise_floor_follows_autocast():
    model, batches = small.seeded(small.bert, dtype=torch.float32), small.text_batches()
    exact = ntk(model, batches)
    with torch.autocast("cpu", torch.bfloat16):
        rough = ntk(model, batches)
    difference = torch.linalg.matrix_norm(rough.subset() - exact.subset(), 2)
    assert rough.provenance["dtype"] == "torch.bfloat16"
    assert exact.spectrum().noise_floor < float(difference) <= rough.spectrum().noise_floor


def test_a_generator_may_refill_its_tensors():
    model = small.seeded(small.bert)
    batches = [{key: value[:2] for key, value in batch.items()} for batch in small.text_batches(sizes=(2,))] * 1
    batches = [batches[0], {**batches[0], "input_ids": batches[0]["input_ids"].flip(1)}]

    def refilled():
        buffer = {key: value.clone() for key, value in batches[0].items()}
        for batch in batches:
            for key, value in batch.items():
                buffer[key].copy_(value)
            yield buffer

    assert torch.equal(ntk(model, refilled()).subset(), ntk(model, batches).subset())


def test_the_number_of_examples_is_that_of_what_every_example_has():
    ids, images = torch.ones(2, 5, dtype=torch.long), torch.ones(4, 3, 2, 2)
    assert Batch({"pixel_values": images, "input_ids": ids}, None).size == 2
    assert Batch({"position_ids": torch.arange(5)[None], "input_ids": ids}, None).size == 2
    assert Batch({"x": images, "y": ids}, torch.zeros(2)).size == 2
    with pytest.raises(PeftLinearError, match=r"different lengths \(x .4, 3, 2, 2., y .2, 5.\).*pass labels"):
        Batch({"x": images, "y": ids}, None).size  # noqa: B018


class Images(nn.Module):
    """Token ids with any number of images an example, as vision-language models take them."""

    def __init__(self):
        super().__init__()
        self.see, self.embed, self.head = nn.Linear(12, 8), nn.Embedding(50, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, input_ids, pixel_values):
        state = self.embed(input_ids)
        seen = torch.tanh(self.see(pixel_values.flatten(1)))
        state = state.masked_scatter((input_ids == 1)[..., None].expand_as(state), seen)
        return self.head(torch.tanh(state).cumsum(1).mean(1))


def with_images(*counts):
    generator = torch.Generator().manual_seed(sum(counts))
    ids = torch.full((len(counts), 6), 7)
    for example, count in enumerate(counts):
        ids[example, 1 : 1 + count] = 1
    return {"input_ids": ids, "pixel_values": torch.randn(sum(counts), 3, 2, 2, generator=generator).double()}


@pytest.mark.parametrize("counts", [[(1, 3)], [(1, 1), (0, 2)], [(2,), (0, 2)]])
def test_images_that_cannot_be_told_apart_are_refused_in_every_batch(counts):
    batches = [with_images(*count) for count in counts]
    with pytest.raises(
        TargetError, match=f"2 examples of batch {len(counts) - 1} cannot be told apart at see.*of one"
    ):
        ntk(Images(), batches, targets=["see"], always_trained=())


def test_batches_of_one_example_may_have_any_number_of_images():
    model, batches = Images(), [with_images(3), with_images(1), with_images(2)]
    kernels = ntk(model, batches, targets=["see"], space="weight", always_trained=())
    rows = []
    for batch in batches:
        rows += [torch.autograd.grad(value, model.see.weight, retain_graph=True)[0] for value in model(**batch)[0]]
    jacobian = torch.stack(rows).flatten(1)
    assert torch.allclose(kernels["see"], jacobian @ jacobian.T, rtol=1e-10)


def test_a_model_that_takes_one_dict_says_so():
    class OfDict(nn.Module):
        def forward(self, features):
            return features

    with pytest.raises(PeftLinearError, match="forward of OfDict takes features: name the keys so, or, .* wrap it"):
        read_batches(small.text_batches(), OfDict(), False, "this")


@pytest.mark.parametrize(
    "parametrization",
    [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.parametrizations.orthogonal],
)
def test_a_weight_that_is_made_of_others_is_refused_but_takes_an_adapter_and_is_exact_in_a_head(parametrization):
    def kind(*sizes):
        return parametrization(nn.Linear(*sizes))

    batches, model = numbers(), TwoLayers(b=kind)
    kernels = ntk(model, batches, targets=["a"], always_trained=["b"])
    assert error(kernels.base, model.b.parameters(), model, batches) < 1e-10
    with pytest.raises(TargetError, match='the weight of a is no parameter: it is made of others.*use space="lora"'):
        ntk(TwoLayers(a=kind), batches, targets=["a"], space="weight", always_trained=())
    adapted = ntk(TwoLayers(a=kind), batches, targets=["a"], rank=2, always_trained=())
    assert adapter_error(adapted, TwoLayers(a=kind), batches) < 1e-10


def test_buffers_and_tensors_of_inference_mode_are_an_error():
    class Gated(TwoLayers):
        def forward(self, x):
            return self.b(torch.tanh(self.a(x)) * self.gate)

    registered, attribute = Gated(), Gated()
    with torch.inference_mode():
        registered.register_buffer("gate", torch.ones(6).double())
        attribute.gate = torch.ones(6).double()
    for model, message in ((registered, "gate of Gated was made inside"), (attribute, "uses a tensor that was made")):
        with pytest.raises(TargetError, match=f"{message}.*load or copy the model outside"):
            ntk(model, numbers(), targets=["a"], always_trained=())


def test_a_list_that_makes_its_batches_anew_may_refill_its_tensors():
    class Refilling(list):
        def __iter__(self):
            buffer = torch.zeros(2, 4, dtype=torch.float64)
            for factor in (1.0, -2.0):
                yield {"x": buffer.fill_(factor)}

    batches = [{"x": torch.full((2, 4), factor, dtype=torch.float64)} for factor in (1.0, -2.0)]
    got, expected = (ntk(TwoLayers(), data, targets=["a"]).subset() for data in (Refilling(), batches))
    assert torch.equal(got, expected)


def test_a_forward_that_takes_one_dict_and_any_keyword_says_so():
    class OfDict(TwoLayers):
        def forward(self, features, **kwargs):
            return super().forward(features["x"])

    with pytest.raises(
        PeftLinearError, match="is not what OfDict takes .missing 1 .*'features'.*where it takes one dict"
    ):
        ntk(OfDict(), numbers(), targets=["a"])
