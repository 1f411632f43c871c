# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A small causal language model that is pretrained here, from scratch, on all sections of a corpus but one.

A GPT-2 of a few layers learns one-line descriptions of Debian packages. The section that was left out is what adapters
learn later; held-out descriptions of the other sections say what they forget.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from examples.common.tasks import DATA
from peft_linear.files import atomic_directory


END = 0  # the token that begins and ends a text, and pads


@dataclass(frozen=True)
class LanguageModelOptions:
    """Corpus, model, pretraining, and how many texts adapt and test."""

    corpus: str = "debian_descriptions"  # a set of examples/data, or a .jsonl(.gz) file of {"text", "section"}
    section: str = "science"
    vocabulary: int = 2048
    layers: int = 4
    width: int = 128
    max_length: int = 32
    pretrain_steps: int = 3000
    pretrain_batch: int = 32
    pretrain_rate: float = 3e-3
    train: int = 400  # texts of the section, a sample for each seed
    test: int = 300
    others: int = 500


class PretrainedLanguageModel:
    """The model with its tokenizer, texts of the section that it has not been trained on, and of the others.

    Args:
        options: The model's folder in `cache` has a name that depends on those that pretraining depends on.
        cache: Where pretrained models are kept; what is there is not trained again.
    """

    def __init__(self, options: LanguageModelOptions, cache: Path) -> None:
        self.options = options
        new, rest, held_out = split_corpus(read_corpus(options.corpus), options.section)
        about = {name: value for name, value in asdict(options).items() if name not in ("train", "test", "others")}
        folder = cache / f"base_{zlib.crc32(json.dumps(about).encode()):08x}"
        if not folder.is_dir():
            with atomic_directory(folder) as temporary:
                tokenizer = train_tokenizer(rest, options.vocabulary)
                tokenizer.save(str(temporary / "tokenizer.json"))
                model = pretrain(encode(tokenizer, rest, options.max_length), tokenizer.get_vocab_size(), options)
                model.save_pretrained(temporary)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.base = GPT2LMHeadModel.from_pretrained(folder).eval().requires_grad_(False)
        self.new = encode(self.tokenizer, new, options.max_length)
        self.others = encode(self.tokenizer, held_out[: options.others], options.max_length)

    def split(self, seed: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Training, validation and test texts of the section, sampled anew for each seed."""
        order = list(range(len(self.new)))
        random.Random(seed).shuffle(order)
        test, shuffled = self.options.test, [self.new[i] for i in order]
        half = test // 2
        return shuffled[test + half : test + half + self.options.train], shuffled[test : test + half], shuffled[:test]


def read_corpus(source: str) -> list[dict[str, str]]:
    """Rows {"text", "section", …} of a set of examples/data or of a file."""
    path = DATA / source / "descriptions.jsonl.gz" if (DATA / source).is_dir() else Path(source)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line]


def split_corpus(rows: Sequence[dict[str, str]], section: str) -> tuple[list[str], list[str], list[str]]:
    """Texts of the section; of the rest; and a held-out part of the rest, every tenth source package."""
    known = {row["section"] for row in rows}
    if section not in known or len(known) < 2:
        raise SystemExit(f"no section {section!r} beside others in the corpus; there are {sorted(known)}")
    rows = list(rows)
    random.Random(0).shuffle(rows)
    of_source = [zlib.crc32(row.get("source", row["text"]).encode()) % 10 for row in rows]
    new = [row["text"] for row in rows if row["section"] == section]
    rest, held_out = (
        [row["text"] for row, place in zip(rows, of_source, strict=True) if row["section"] != section and keep(place)]
        for keep in (lambda place: place > 0, lambda place: place == 0)
    )
    return new, rest, held_out


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of lower-cased text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """<|end|> text <|end|>, cut to `max_length` tokens."""
    return [[END, *encoding.ids, END][:max_length] for encoding in tokenizer.encode_batch(list(texts))]


def make_model(options: LanguageModelOptions, vocabulary: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=options.max_length,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=max(1, options.width // 32),
        bos_token_id=END,
        eos_token_id=END,
        use_cache=False,
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def pretrain(texts: Sequence[list[int]], vocabulary: int, options: LanguageModelOptions) -> GPT2LMHeadModel:
    """AdamW with warm-up and a cosine; dropout 0.1 as GPT-2 has it."""
    model = make_model(options, vocabulary).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.pretrain_rate, weight_decay=0.1, betas=(0.9, 0.98))
    steps, warm = options.pretrain_steps, max(1, options.pretrain_steps // 20)
    batches = endless(texts, options.pretrain_batch, random.Random(0))
    with tqdm(range(steps), desc="pretraining the language model") as bar:
        for step in bar:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = options.pretrain_rate * min((step + 1) / warm, 0.02 + 0.98 * cosine)
            log_probabilities, targets = predictions(model, next(batches))
            loss = nn.functional.nll_loss(log_probabilities, targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def endless(texts: Sequence[list[int]], batch_size: int, generator: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, epoch after epoch; texts of a length come together within windows of 16 batches."""
    order = list(range(len(texts)))
    while True:
        generator.shuffle(order)
        window = 16 * batch_size
        sorted_order = [
            i for first in range(0, len(order), window)
            for i in sorted(order[first : first + window], key=lambda i: len(texts[i]))
        ]  # fmt: skip
        starts = list(range(0, len(order) - batch_size + 1, batch_size))
        generator.shuffle(starts)
        for first in starts:
            yield pad([texts[i] for i in sorted_order[first : first + batch_size]])


def in_order_of_length(texts: Sequence[list[int]], batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    ordered = sorted(texts, key=len)
    return (pad(ordered[first : first + batch_size]) for first in range(0, len(ordered), batch_size))


def pad(texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (n, t), and which of them belong to a text (n, t)."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=END)
    lengths = torch.tensor([len(text) for text in texts])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def predictions(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (m, vocabulary) at the m positions that predict a token of a text, and those tokens (m,)."""
    tokens, mask = batch
    logits = model(input_ids=tokens).logits  # padding is on the right and the model causal: no mask is needed
    predicts = mask[:, 1:]
    return torch.log_softmax(logits[:, :-1][predicts], dim=-1), tokens[:, 1:][predicts]
