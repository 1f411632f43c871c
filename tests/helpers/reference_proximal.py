# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Proximal fine-tuning of plain LoRA written by hand, slowly: dense weights, one tensor at a time, no hooks."""

from __future__ import annotations

import torch


def lora_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}


def pairs(parameters) -> list[tuple[str, str]]:
    return [(name, name.replace("lora_A", "lora_B")) for name in parameters if "lora_A" in name]


def dense_penalty(a, b, a0, b0, scaling, c=None):
    """tr(E C Eᵀ), E = s·BA − s·B0A0, from the d_out×d_in matrices; C is the identity by default."""
    change = scaling * b @ a - scaling * b0 @ a0
    return (change**2).sum() if c is None else torch.trace(change @ c @ change.T)


def dense_block_step(a, b, a0, b0, scaling, lam, lr_a, lr_b, c=None):
    """B ← argmin ½‖B−B̃‖² + (η_B λ/2)·penalty, then A likewise with the new B; normal equations with dense B0A0.

    With C the one for A, A + μBᵀB·A·C = Ã + μBᵀ(B0A0)C, is solved for vec(A) with a Kronecker product.
    """
    target = b0 @ a0
    c = torch.eye(a.shape[1], dtype=a.dtype) if c is None else c
    mu = lr_b * lam * scaling**2
    b = torch.linalg.solve(torch.eye(len(a)) + mu * a @ c @ a.T, (b + mu * target @ c @ a.T).T).T
    mu = lr_a * lam * scaling**2
    system = torch.eye(a.numel()) + mu * torch.kron(b.T @ b, c)  # rows of A one after the other
    a = torch.linalg.solve(system, (a + mu * b.T @ target @ c).reshape(-1)).reshape(a.shape)
    return a, b


class ReferenceProximal:
    """What must happen around `optimizer.step()` for the objective R + (λ/2)·D, on a plain LoRA model in float64.

    `lam` is λ, or a function of a parameter's name and the number of steps taken; where λ = 0 nothing happens.
    `metric(name of a factor A)` gives C and g in units of λ, for `space="function"`.
    """

    def __init__(self, model, *, lam, space="factors", mode="decoupled", selective=False, scaling=1.0, metric=None):
        self.metric = metric if space == "function" else lambda name: (None, 1.0)
        self.parameters = lora_parameters(model)
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.strength = lam if callable(lam) else lambda name, step: lam
        self.space, self.mode, self.selective, self.scaling = space, mode, selective, scaling
        self.fired = []

    def lam(self, name):
        return self.strength(name, len(self.fired) - 1)

    def before_step(self):
        self.fired.append(None)
        if self.mode == "projection":
            return self._before_projection()
        inner = 0.0
        for name, p in self.parameters.items():
            if p.grad is not None and self.lam(name) > 0:
                inner += self.lam(name) * float((p.grad * (p.detach() - self.start[name])).sum())
        self.fired[-1] = not self.selective or inner >= 0
        if self.mode == "coupled" and self.fired[-1]:
            self.risk_gradients = {n: p.grad for n, p in self.parameters.items()}
            for name, gradient in self._penalty_gradients().items():
                p = self.parameters[name]
                if p.grad is not None:
                    p.grad = p.grad + self.lam(name) / 2 * gradient

    def _before_projection(self):
        """Selective Projection Decay: c = ⟨g, θ−θ0⟩ and ‖θ−θ0‖ of every tensor before the step."""
        self.conditions = {}
        for name, p in self.parameters.items():
            if p.grad is not None and self.lam(name) > 0:
                away = p.detach() - self.start[name]
                self.conditions[name] = (float((p.grad * away).sum()), float((away**2).sum()) ** 0.5)
        self.fired[-1] = sum(c > 0 for c, _ in self.conditions.values()) / max(len(self.conditions), 1)

    def _after_projection(self):
        for name, (condition, before) in self.conditions.items():
            p, start = self.parameters[name], self.start[name]
            length = float(((p - start) ** 2).sum()) ** 0.5
            if condition > 0 and length > 0:
                ratio = min(max((length - before) / length, 0.0), 1.0)
                p.copy_(p - self.lam(name) * ratio * (p - start))

    def _penalty_gradients(self):
        if self.space == "factors":
            return {name: 2 * (p.detach() - self.start[name]) for name, p in self.parameters.items()}
        leaves = {name: p.detach().clone().requires_grad_(True) for name, p in self.parameters.items()}
        penalty = 0.0
        for a, b in pairs(leaves):
            c, g = self.metric(a)
            penalty += g * dense_penalty(leaves[a], leaves[b], self.start[a], self.start[b], self.scaling, c)
        names = list(leaves)
        return dict(zip(names, torch.autograd.grad(penalty, [leaves[n] for n in names]), strict=True))

    @torch.no_grad()
    def after_step(self, learning_rates):
        """`learning_rates`: parameter name -> the rate its group had in this step."""
        if self.mode == "projection":
            return self._after_projection()
        if self.mode == "coupled":
            if self.fired[-1]:
                for name, p in self.parameters.items():
                    p.grad = self.risk_gradients[name]
            return
        if not self.fired[-1]:
            return
        if self.space == "factors":
            for name, p in self.parameters.items():
                if p.grad is not None:
                    eta = learning_rates[name]
                    p.copy_(self.start[name] + (p - self.start[name]) / (1 + eta * self.lam(name)))
            return
        for a, b in pairs(self.parameters):
            pa, pb = self.parameters[a], self.parameters[b]
            (c, g), rates = self.metric(a), (learning_rates[a], learning_rates[b])
            new_a, new_b = dense_block_step(
                pa, pb, self.start[a], self.start[b], self.scaling, g * self.lam(a), *rates, c
            )
            pa.copy_(new_a)
            pb.copy_(new_b)

    def rates(self, optimizer):
        by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        return {name: by_id[id(p)] for name, p in self.parameters.items()}


def schedule_free_step(model, batches, risk, *, lam, lr, momentum=0.9, warmup=0):
    """Schedule-free gradient descent (Defazio et al., 2024) with a proximal step of z, keeping x, y and z apart.

    Returns the average x by parameter name. Weights of the average are squares of the largest learning rate so far.
    """
    parameters = lora_parameters(model)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    x, z, weight_sum = ({n: s.clone() for n, s in start.items()}, {n: s.clone() for n, s in start.items()}, 0.0)
    largest = 0.0
    for step, batch in enumerate(batches):
        eta = lr * (step + 1) / warmup if step < warmup else lr
        largest = max(largest, eta)
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_((1 - momentum) * z[name] + momentum * x[name])
        model.zero_grad()
        risk(model, batch).backward()
        weight_sum += largest**2
        for name, p in parameters.items():
            moved = z[name] - eta * p.grad
            z[name] = start[name] + (moved - start[name]) / (1 + eta * lam)
            x[name] = x[name] + largest**2 / weight_sum * (z[name] - x[name])
    return x
