# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning with TRL, regularised toward the pretrained model: learning against forgetting, over λ.

    python examples/trl/sft_without_forgetting.py                        # offline: a small model is trained first
    python examples/trl/sft_without_forgetting.py --model Qwen/Qwen3-0.6B --learning-rate 2e-4 --strengths 0 10 100

The texts are one-line descriptions of Debian packages (`examples/data`). The model is adapted to one section of the
archive; its loss on the other sections says what it forgets. Without `--model` a small Llama is first trained on those
other sections, also by TRL, so that there is something to forget. `--model` takes a folder or a name on the Hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from peft_linear import ProximalCallback, ProximalLoraConfig, export_lora, proximal_distance


DATA = Path(__file__).parents[1] / "data" / "debian_topics"
MAX_LENGTH = 48


def read_texts(section: str, limit: int | None) -> dict[str, Dataset]:
    """Texts to learn (`train`), held-out texts of that section (`new`), and of all others (`rest`, `rest_train`)."""
    files = {split: str(DATA / f"{split}.jsonl") for split in ("train", "test")}
    rows = load_dataset("json", data_files=files)
    if section not in rows["train"].unique("section"):
        raise SystemExit(f"no section {section!r}; there are {', '.join(sorted(rows['train'].unique('section')))}")
    texts = {}
    for name, split, new in (
        ("train", "train", True),
        ("rest_train", "train", False),
        ("new", "test", True),
        ("rest", "test", False),
    ):
        chosen = rows[split].filter(lambda row, new=new: (row["section"] == section) == new).shuffle(seed=0)
        texts[name] = chosen.select_columns("text").select(range(min(limit or len(chosen), len(chosen))))
    return texts


def settings(folder: Path, **options: Any) -> SFTConfig:
    """What all runs share: TRL's defaults but for the length, the precision of a CPU, and no trackers."""
    gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(folder),
        max_length=MAX_LENGTH,
        use_cpu=not gpu,
        bf16=gpu and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=25,
        per_device_eval_batch_size=32,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **options,
    )


def make_tokenizer(texts: Sequence[str], size: int = 1500) -> PreTrainedTokenizerFast:
    """Byte pairs of these texts."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    pairs.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=pairs, pad_token="<pad>", eos_token="<eos>")


def make_model(texts: dict[str, Dataset], steps: int, folder: Path) -> tuple[Any, Any]:
    """A Llama of 0.6M parameters, pretrained on the other sections: full training with TRL, no adapter."""
    tokenizer = make_tokenizer(texts["rest_train"]["text"])
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH, **shape, **tokens)
    )
    options = {"max_steps": steps, "learning_rate": 3e-3, "per_device_train_batch_size": 32}
    arguments = settings(folder, **options)
    SFTTrainer(model, arguments, train_dataset=texts["rest_train"], processing_class=tokenizer).train()
    return model, tokenizer


def fine_tune(base: Path | str, texts: dict[str, Dataset], strength: float, args: argparse.Namespace) -> list[dict]:
    """One adapter; the losses on held-out texts before and after. This is all that ProximalLoRA needs in TRL."""
    folder = args.output / f"lambda_{strength:g}"
    config = ProximalLoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        proximal_lambda=strength,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        settings(
            folder,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulation,
        ),
        train_dataset=texts["train"],
        eval_dataset={"new": texts["new"], "rest": texts["rest"]},
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config,
        callbacks=[ProximalCallback()],
    )
    rows = []
    for when in ("before", "after"):
        if when == "after":
            trainer.train()
        metrics = trainer.evaluate()
        distance = proximal_distance(trainer.model, space="delta")
        rows.append({"new": metrics["eval_new_loss"], "rest": metrics["eval_rest_loss"], "distance": distance})
    trainer.save_model(folder / "adapter")
    export_lora(folder / "adapter", folder / "lora")  # plain LoRA, for everyone without this package
    return rows


def table(results: dict[float, list[dict]], section: str) -> str:
    lines = [f"| λ | loss on {section} | loss on the rest | distance of the weights |", "|---|---:|---:|---:|"]
    for strength, (before, after) in results.items():
        if len(lines) == 2:
            lines.append(f"| before | {before['new']:.3f} | {before['rest']:.3f} | 0 |")
        name = "0 (LoRA)" if strength == 0 else f"{strength:g}"
        lines.append(f"| {name} | {after['new']:.3f} | {after['rest']:.3f} | {after['distance']:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a causal language model: a folder, or a name on the Hub (default: a small one)"
    )
    parser.add_argument("--section", default="science", help="the section of the archive that is learned")
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.0, 10.0, 100.0], help="values of λ")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each adapter")
    parser.add_argument("--batch-size", type=int, default=16, help="texts in a forward pass")
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes of an optimizer step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pretrain-steps", type=int, default=300, help="of the small model")
    parser.add_argument("--limit", type=int, help="at most that many texts of each kind")
    parser.add_argument("--output", type=Path, default=Path("trl_output"))
    args = parser.parse_args(argv)
    texts = read_texts(args.section, args.limit)
    base: Path | str = args.model or args.output / "base"
    if args.model is None:
        model, tokenizer = make_model(texts, args.pretrain_steps, args.output / "base")
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    results = {strength: fine_tune(base, texts, strength, args) for strength in args.strengths}
    print(table(results, args.section))
    return 0


if __name__ == "__main__":
    sys.exit(main())
