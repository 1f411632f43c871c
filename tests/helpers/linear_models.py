# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters whose B is not 0 on the small models, their linear models a step away, and what to compare them by."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from peft_linear.capture.linearize import linearize
from tests.helpers.small_models import (
    VOCABULARY,
    Recurrent,
    bert,
    causal_batches,
    gpt2,
    image_batches,
    llama,
    seeded,
    text_batches,
    vit,
)


def t5_lm():
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def seq2seq_batches():
    batches = text_batches()
    for batch in batches:
        batch["labels"] = batch["input_ids"][:, :4].clone()
        batch["labels"][1:, 3] = -100
    return batches


def plain(batches):
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


MODELS = {
    "bert": (bert, {}, text_batches),
    "gpt2": (gpt2, {}, text_batches),
    "gpt2 lm": (gpt2, {"causal": True}, causal_batches),
    "llama": (llama, {}, text_batches),
    "llama lm": (llama, {"causal": True}, causal_batches),
    "t5 lm": (t5_lm, {}, seq2seq_batches),
    "vit": (vit, {}, image_batches),
    "custom": (Recurrent, {}, lambda: plain(text_batches())),
}
FLOAT32_INSIDE = ("llama", "llama lm", "t5 lm")  # their norms compute in float32 whatever the model's type


def with_adapter(factory, rank=2, **kwargs):
    """A float64 model with an adapter whose B is not 0, and the task head trained where there is one."""
    model = seeded(factory, **kwargs)
    heads = [name for name in ("classifier", "score") if hasattr(model, name)]
    targets = ["step", "gate"] if isinstance(model, Recurrent) else "all-linear"
    config = LoraConfig(target_modules=targets, r=rank, init_lora_weights=False, modules_to_save=heads or None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, config).double().eval()


def moved(linearized, size=0.05, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in linearized.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return linearized


def build(name):
    factory, kwargs, batches = MODELS[name]
    model = with_adapter(factory, **kwargs)
    return model, moved(linearize(model)), batches()[0]


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def function_of(model, batch):
    return lambda parameters: logits(functional_call(model, parameters, (), batch))


def flat(values):
    return torch.cat([value.reshape(-1) for value in values.values()])


def dense_jacobian(model, linearized, batch):  # (n, P)
    rows = torch.func.jacrev(function_of(model, batch), chunk_size=1)(linearized.anchor_state_dict())
    n = logits(model(**batch)).numel()
    return torch.cat([rows[name].reshape(n, -1) for name in linearized.names], dim=1).detach()


def snapshot(model):
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "grad": [parameter.grad for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key in before["state"]:
        assert_close(before["state"][key], after["state"][key], rtol=0, atol=0)
    for key in before.keys() - {"state"}:
        assert before[key] == after[key], key
