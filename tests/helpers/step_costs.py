# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Counts of a training step of a small Llama of four layers."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_linear.capture.step_cost import step_record
from peft_linear.recommendation.cost import StepCost


def count_llama():
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 64}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    ids = torch.zeros(4, 64, dtype=torch.long)
    return json.loads(json.dumps(step_record(model, {"input_ids": ids, "labels": ids})))


COUNTS = count_llama()  # once, not within the time that an example of a property may take
COST = StepCost.from_record(COUNTS)
