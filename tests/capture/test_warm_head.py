# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from peft_linear import compute_ntk, recommend, recommend_modules
from peft_linear.capture.targets import resolve_always_trained
from peft_linear.capture.warm_head import warmed_head
from peft_linear.errors import OutputError, PeftLinearError, TargetError
from tests.helpers.small_models import bert, gpt2, seeded, text_batches


def state(model):
    return copy.deepcopy(
        {
            "values": model.state_dict(),
            "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "requires": [p.requires_grad for p in model.parameters()],
            "training": [module.training for module in model.modules()],
            "random": torch.get_rng_state(),
        }
    )


def assert_same(before, after):
    for key, value in before["values"].items():
        assert torch.equal(value, after["values"][key]), key
    for one, other in zip(before["grads"], after["grads"], strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert before["requires"] == after["requires"] and before["training"] == after["training"]
    assert torch.equal(before["random"], after["random"])


def adam_by_hand(model, batches, steps, rate):
    """Head parameters after Adam on the mean loss of all examples, from its formula."""
    head = list(model.classifier.parameters())
    first = [torch.zeros_like(p) for p in head]
    second = [torch.zeros_like(p) for p in head]
    for step in range(1, steps + 1):
        logits = torch.cat([model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in batches])
        loss = torch.nn.functional.cross_entropy(logits, torch.cat([b["labels"] for b in batches]))
        for i, gradient in enumerate(torch.autograd.grad(loss, head)):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            scale = (second[i] / (1 - 0.999**step)).sqrt() + 1e-8
            with torch.no_grad():
                head[i] -= rate * first[i] / (1 - 0.9**step) / scale
    return [p.detach() for p in head]


def test_the_head_is_what_adam_makes_of_it_and_everything_else_stays():
    model, batches = seeded(bert).train(), text_batches()
    next(model.classifier.parameters()).grad = torch.ones_like(next(model.classifier.parameters()))
    model.bert.embeddings.requires_grad_(False)
    expected = adam_by_hand(copy.deepcopy(model).eval().requires_grad_(True), batches, 3, 0.02)
    before = state(model)
    with warmed_head(model, batches, steps=3, learning_rate=0.02):
        for ours, theirs in zip(model.classifier.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-12)
        body = {key: value for key, value in model.state_dict().items() if not key.startswith("classifier")}
        assert all(torch.equal(value, before["values"][key]) for key, value in body.items())
        assert next(model.classifier.parameters()).grad.eq(1).all()
    assert_same(before, state(model))


@pytest.mark.parametrize("factory", [bert, gpt2])
def test_what_lies_below_the_head_is_computed_once_where_the_head_gives_the_logits(factory):
    """GPT-2's head gives a logit for every token, of which the model then takes one."""
    model, batches = seeded(factory), text_batches()
    passes = []
    hook = model.base_model.register_forward_hook(lambda *_: passes.append(1))
    with warmed_head(model, batches, steps=3):
        head = [p.detach().clone() for p in next(iter(resolve_always_trained(model).values())).parameters()]
    hook.remove()
    assert len(passes) == {bert: 1, gpt2: 1 + 3}[factory] * len(batches)
    with warmed_head(_Wrapped(model), batches, steps=3, always_trained=[next(iter(resolve_always_trained(model)))]):
        slowly = [p.detach().clone() for p in next(iter(resolve_always_trained(model).values())).parameters()]
    for ours, theirs in zip(head, slowly, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class _Wrapped(torch.nn.Module):
    """Nearly the same logits, not to the bit as the head gave them: the slow way."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits * (1 + 1e-13)


def test_an_error_inside_leaves_the_model_as_it_was():
    model, batches = seeded(bert), text_batches()
    before = state(model)
    with pytest.raises(ZeroDivisionError), warmed_head(model, batches):
        _ = 1 / 0
    assert_same(before, state(model))
    broken = [{**batches[0], "labels": None}]
    with pytest.raises(OutputError, match="has no labels, which warming the head needs"), warmed_head(model, broken):
        pass
    assert_same(before, state(model))


def test_recommendations_use_kernels_of_the_warmed_head():
    """Other criteria than gradient energy, which looks through both heads: tests/selection/test_heads.py."""
    model, batches = seeded(bert), text_batches()
    before = state(model)
    rec = recommend_modules(model, (b for b in batches), 2, "leave_one_out", head_steps=4, progress=False)
    assert_same(before, state(model))
    assert rec.settings.kernels["head_steps"] == 4
    with warmed_head(model, batches, 4):
        kernels = compute_ntk(model, batches, progress=False)
    plain = recommend_modules(model, batches, 2, "leave_one_out", progress=False)
    scores = [row.score for row in rec.scores]
    assert [row.score for row in recommend(kernels, 2, "leave_one_out").scores] == scores
    assert [row.score for row in plain.scores] != scores
    recommend_modules(model, (b for b in batches), 2, progress=False)
    assert_same(before, state(model))


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}])
def test_no_steps_and_no_learning_rate_are_refused(arguments):
    expected = pytest.raises(PeftLinearError, match="steps ≥ 1 and a learning rate > 0")
    with expected, warmed_head(seeded(bert), text_batches(), **arguments):
        pass


def test_a_model_without_a_head_is_refused():
    headless = seeded(gpt2, causal=True)
    with pytest.raises(TargetError, match="has no task head to warm"), warmed_head(headless, text_batches()):
        pass
    with pytest.raises(TargetError, match="head_steps=5, but GPT2LMHeadModel has no task head"):
        recommend_modules(headless, text_batches(), 2, head_steps=5)
