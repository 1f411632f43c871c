# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Setting (a) of the forgetting benchmark: a sentence encoder learns to classify, and was good at retrieval before.

MiniLM (Sentence-BERT) embeds a text as the mean of its last hidden states. It is fine-tuned to tell some sections of
the Debian archive from each other. What it may forget is tested on descriptions of the *other* sections, none of which
is trained on: retrieval (half of the words of a description find it among all), and the sections of the nearest
neighbours. The head is a linear probe of the pretrained embeddings, strongly regularised and then frozen: the adapter
alone learns, and without it there is exactly the pretrained encoder.

Adapters sit in the top layers; what the frozen layers below compute is computed once for every text.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from examples.benchmarks.forgetting.training import Measure, Protocol
from examples.common.tasks import DATA, SPLITS, with_three_splits
from peft_linear.cli.data import load_text_data
from peft_linear.cli.models import model_path


@dataclass(frozen=True)
class EncoderOptions:
    """What is trained on, what is tested, and how much of it."""

    model: str = "minilm"
    dataset: str = "debian_topics"
    sections: tuple[str, ...] = ("admin", "devel", "net", "text")  # to tell apart; all others test what is forgotten
    top_layers: int = 2
    max_length: int = 16
    train: int = 800  # texts, a sample for each seed
    test: int = 360
    others: int = 500
    temperature: float = 0.05
    neighbours: int = 10


class Precomputed(nn.Module):
    """Replaces the embeddings: returns the hidden states that were computed before."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


class Classifier(nn.Module):
    """The upper layers of an encoder, the mean over the text, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def embed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state  # (n, t, d)
        weights = mask[..., None].to(states)
        return (states * weights).sum(1) / weights.sum(1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(hidden, mask))


@dataclass(frozen=True)
class Texts:
    """Texts as inputs of the trained layers: hidden states below, one (t, d) tensor a text, and class numbers."""

    hidden: list[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states padded with zeros (n, t, d), the mask (n, t), and labels (n,)."""
        chosen = [self.hidden[i] for i in indices]
        lengths = torch.tensor([len(states) for states in chosen])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return nn.utils.rnn.pad_sequence(chosen, batch_first=True), mask, self.labels[list(indices)]

    def in_order_of_length(self, batch_size: int = 64) -> Iterator[list[int]]:
        order = sorted(range(len(self)), key=lambda i: len(self.hidden[i]))
        return (order[first : first + batch_size] for first in range(0, len(order), batch_size))


class EncoderSetting:
    """MiniLM, one classification task, retrieval and neighbours in the sections that were not trained on."""

    key = "encoder"
    title = "A sentence encoder learns to classify"
    target = "test loss of the classification (nats)"
    measures = (
        Measure("retrieval_loss", "retrieval loss gained on other sections (nats)", +1),
        Measure("recall_at_1", "recall@1 of the retrieval lost", -1),
        Measure("neighbour_accuracy", "accuracy of nearest neighbours on other sections lost", -1),
        Measure("drift", "drift of embeddings, 1 − cos", +1),
    )
    lora = {"target_modules": r".*\.layer\.\d+\..*(query|key|value|dense)"}  # noqa: RUF012

    def __init__(self, options: EncoderOptions, protocol: Protocol) -> None:
        self.options, self.protocol = options, protocol
        path = model_path(options.model)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        encoder = AutoModel.from_pretrained(path).eval().requires_grad_(False)
        self.lower = encoder
        self.upper = copy.deepcopy(encoder)
        split = len(encoder.encoder.layer) - options.top_layers
        self.lower.encoder.layer = encoder.encoder.layer[:split]
        self.upper.encoder.layer = self.upper.encoder.layer[split:]
        self.upper.embeddings = Precomputed()
        shipped = DATA / options.dataset
        data = with_three_splits(load_text_data(shipped if shipped.is_dir() else options.dataset))
        names = data.label_names or ()
        unknown = set(options.sections) - set(names)
        if unknown or len(set(names) - set(options.sections)) < 2:
            raise SystemExit(f"sections must be some of {names}, with two or more left to test on; unknown: {unknown}")
        classes = {names.index(section): number for number, section in enumerate(options.sections)}
        rows = {name: [(row["text"], data.label_of(row)) for row in data.rows(name)] for name in SPLITS}
        self.train = self.lower_states(self._draw(rows["train"], classes, None))
        self.validation = self.lower_states(self._draw(rows["validation"], classes, options.test))
        self.test = self.lower_states(self._draw(rows["test"], classes, options.test))
        rest = {label: label for label in range(len(names)) if label not in classes}
        others = self._draw([*rows["test"], *rows["validation"], *rows["train"]], rest, options.others)
        self.others = self.lower_states(others)
        self.queries = self.lower_states([(half_of_words(text), label) for text, label in others])

    @staticmethod
    def _draw(rows: Sequence[tuple[str, int]], classes: dict[int, int], count: int | None) -> list[tuple[str, int]]:
        chosen = [(text, classes[label]) for text, label in rows if label in classes]
        random.Random(0).shuffle(chosen)
        return chosen[:count]

    @torch.inference_mode()
    def lower_states(self, rows: Sequence[tuple[str, int]], batch_size: int = 64) -> Texts:
        """The hidden states below the trained layers."""
        hidden: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            texts = [rows[i][0] for i in indices]
            batch = self.tokenizer(
                texts, truncation=True, max_length=self.options.max_length, padding=True, return_tensors="pt"
            )
            states = self.lower(**batch).last_hidden_state
            for index, state, length in zip(indices, states, batch["attention_mask"].sum(1).tolist(), strict=True):
                hidden[index] = state[:length].clone()
        return Texts(hidden, torch.tensor([label for _, label in rows]))

    def training_indices(self, seed: int) -> list[int]:
        """The sample of training texts of one seed."""
        order = list(range(len(self.train)))
        random.Random(seed).shuffle(order)
        return order[: self.options.train]

    def new_model(self, seed: int) -> nn.Module:
        """The pretrained encoder with the linear probe of this seed's training texts."""
        model = Classifier(copy.deepcopy(self.upper), len(self.options.sections)).eval()
        chosen = self.training_indices(seed)
        features = self.embeddings(model, self.train)[chosen]
        weight, bias = linear_probe(features, self.train.labels[chosen], len(self.options.sections))
        with torch.no_grad():
            model.head.weight.copy_(weight)
            model.head.bias.copy_(bias)
        return model

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of this seed's texts without end."""
        chosen, generator = self.training_indices(seed), random.Random(seed)
        while True:
            generator.shuffle(chosen)
            for first in range(0, len(chosen) - self.protocol.batch_size + 1, self.protocol.batch_size):
                yield self.train.batch(chosen[first : first + self.protocol.batch_size])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        hidden, mask, labels = batch
        return nn.functional.cross_entropy(model(hidden, mask), labels)

    @torch.inference_mode()
    def embeddings(self, model: nn.Module, texts: Texts) -> Tensor:
        """(n, d), in the order of the texts."""
        rows = torch.empty(len(texts), self.upper.config.hidden_size)
        embed = (model.get_base_model() if hasattr(model, "get_base_model") else model).embed
        for indices in texts.in_order_of_length():
            hidden, mask, _ = texts.batch(indices)
            rows[indices] = embed(hidden, mask)
        return rows

    @cached_property
    def before(self) -> Tensor:
        """Embeddings of the other sections by the pretrained encoder."""
        return self.embeddings(Classifier(self.upper, 2).eval(), self.others)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, seed: int, split: str = "test") -> dict[str, float]:
        texts: Texts = getattr(self, split)
        head = (model.get_base_model() if hasattr(model, "get_base_model") else model).head
        logits = head(self.embeddings(model, texts))
        queries, now = self.embeddings(model, self.queries), self.embeddings(model, self.others)
        loss, recall = retrieval(queries, now, self.options.temperature)
        return {
            "target_loss": float(nn.functional.cross_entropy(logits, texts.labels)),
            "target_accuracy": float((logits.argmax(-1) == texts.labels).double().mean()),
            "retrieval_loss": loss,
            "recall_at_1": recall,
            "neighbour_accuracy": neighbour_accuracy(now, self.others.labels, self.options.neighbours),
            "drift": float(1 - nn.functional.cosine_similarity(self.before, now).double().mean()),
        }


def half_of_words(text: str) -> str:
    """Half of the words of a text, in order: like a query for it. The sample depends on the text."""
    words = text.split()
    kept = sorted(random.Random(text).sample(range(len(words)), max(1, len(words) // 2)))
    return " ".join(words[i] for i in kept)


def linear_probe(features: Tensor, labels: Tensor, classes: int, decay: float = 3.0) -> tuple[Tensor, Tensor]:
    """Weight (classes, d) and bias of the logistic regression with `decay`/2 ‖W‖² on standardised features."""
    features = features.double()
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs = (features - mean) / scale
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(inputs @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        return (weight / scale).float(), (bias - (weight / scale) @ mean).float()


def retrieval(queries: Tensor, keys: Tensor, temperature: float) -> tuple[float, float]:
    """Mean cross-entropy of finding key i by query i among all keys (cosine / temperature), and recall@1."""
    queries, keys = (nn.functional.normalize(x.double(), dim=-1) for x in (queries, keys))
    similarity = queries @ keys.T / temperature
    right = torch.arange(len(queries))
    found = similarity.argmax(1) == right
    return float(nn.functional.cross_entropy(similarity, right)), float(found.double().mean())


def neighbour_accuracy(embeddings: Tensor, labels: Tensor, count: int) -> float:
    """How often the `count` nearest others by cosine, the near weighing more, vote for the example's own label."""
    units = nn.functional.normalize(embeddings.double(), dim=-1)
    similarity = (units @ units.T).fill_diagonal_(-torch.inf)
    near = similarity.topk(min(count, len(units) - 1), dim=1)
    votes = torch.zeros(len(units), int(labels.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, labels[near.indices], torch.softmax(near.values / 0.05, dim=1))
    return float((votes.argmax(1) == labels).double().mean())
