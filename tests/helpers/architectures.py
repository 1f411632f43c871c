# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose heads or layers peft treats in a way of its own, with a batch for each."""

import torch
import transformers as tf
from torch import nn


VOCABULARY = 50
TOKENS = {"vocab_size": VOCABULARY, "num_labels": 3}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "eos_token_id": 2, "pad_token_id": 0}
XLM = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 40}
WIDTH = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 8, "num_labels": 3}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
CAUSAL = {**WIDTH, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0}
DEEPSEEK = {
    "n_routed_experts": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}

CLIP = {
    "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"image_size": 16, "patch_size": 8},
    "projection_dim": 8,
}
CLASSIFIERS = {  # class, its config and the config's fields
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, {**TOKENS, **WIDTH}),
    "bart": (tf.BartForSequenceClassification, tf.BartConfig, {**TOKENS, **SEQ2SEQ}),
    "t5": (tf.T5ForSequenceClassification, tf.T5Config, {**TOKENS, **T5, "decoder_start_token_id": 0}),
    "xlm": (tf.XLMForSequenceClassification, tf.XLMConfig, {**TOKENS, **XLM}),
    "flaubert": (tf.FlaubertForSequenceClassification, tf.FlaubertConfig, {**TOKENS, **XLM}),
    "modernbert": (tf.ModernBertForSequenceClassification, tf.ModernBertConfig, {**TOKENS, **WIDTH, **SPECIAL}),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig, {**WIDTH, **IMAGE}),
    "dinov2": (tf.Dinov2ForImageClassification, tf.Dinov2Config, {**WIDTH, **IMAGE, "mlp_ratio": 2}),
    "swin": (tf.SwinForImageClassification, tf.SwinConfig, {**SWIN, "num_labels": 3}),
    "deit": (tf.DeiTForImageClassificationWithTeacher, tf.DeiTConfig, {**WIDTH, **IMAGE}),
    "clip": (tf.CLIPForImageClassification, tf.CLIPConfig, {**CLIP, "num_labels": 3}),
}
LANGUAGE = {
    "mamba": (tf.MambaForCausalLM, tf.MambaConfig, MAMBA),
    "falcon_mamba": (tf.FalconMambaForCausalLM, tf.FalconMambaConfig, MAMBA),
    "jamba": (
        tf.JambaForCausalLM,
        tf.JambaConfig,
        {**CAUSAL, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    ),
    "bloom": (
        tf.BloomForCausalLM,
        tf.BloomConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "n_layer": 2,
            "n_head": 2,
            "pretraining_tp": 2,
            "slow_but_exact": True,
        },
    ),
    "qwen3_moe": (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig,
        {**CAUSAL, **EXPERTS, "head_dim": 8, "num_experts": 4, "mlp_only_layers": [0]},
    ),
    "qwen2_moe": (
        tf.Qwen2MoeForCausalLM,
        tf.Qwen2MoeConfig,
        {**CAUSAL, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8},
    ),
    "deepseek_v3": (tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config, {**CAUSAL, **EXPERTS, **DEEPSEEK}),
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig, {**CAUSAL, "num_local_experts": 4}),
}


def build(name):
    """The model, with the same weights every time."""
    kind, config, fields = {**CLASSIFIERS, **LANGUAGE}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config(**fields)).eval()


def batch_for(name):
    """Four examples of three classes, or four token sequences."""
    generator = torch.Generator().manual_seed(0)
    if name in ("vit", "dinov2", "swin", "deit", "clip"):
        size = 32 if name == "swin" else 16
        return {"pixel_values": torch.randn(4, 3, size, size, generator=generator), "labels": torch.arange(4) % 3}
    ids = torch.randint(3, VOCABULARY - 3, (4, 6), generator=generator)
    if name in LANGUAGE:
        return {"input_ids": ids, "labels": ids.clone()}
    ids[:, -1] = 2  # BART's end of sentence
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(4) % 3}


class Attending(nn.Module):
    """A classifier around `nn.MultiheadAttention`, which reads the weight of its `out_proj` and never calls it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.inner = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.outer = nn.Linear(8, 8)
        self.scores = nn.Linear(8, 3)

    def forward(self, input_ids):
        hidden = self.inner(self.embed(input_ids)).tanh()
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return {"logits": self.scores(self.outer(hidden).tanh().mean(1))}
