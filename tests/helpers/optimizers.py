# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Optimizers that keep weights of their own, small stand-ins for those of other packages."""

from __future__ import annotations

import torch
from torch.optim import Optimizer


class MasterSGD(Optimizer):
    """Gradient descent on float32 copies in the state, which overwrite the parameters, as in mixed precision."""

    def __init__(self, params, lr, key="master"):
        super().__init__(params, {"lr": lr})
        self.key = key

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    master = self.state[p].setdefault(self.key, p.detach().clone().float())
                    master.sub_(p.grad.float(), alpha=group["lr"])
                    p.copy_(master)


class ApexLikeSGD(Optimizer):
    """As apex's fused optimizers with `master_weights=True`: the copies are in groups beside `param_groups`."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.param_groups_master = [
            {"params": [p.detach().clone().float() for p in group["params"]]} for group in self.param_groups
        ]

    @torch.no_grad()
    def step(self, closure=None):
        for group, copies in zip(self.param_groups, self.param_groups_master, strict=True):
            for p, master in zip(group["params"], copies["params"], strict=True):
                master.sub_(p.grad.float(), alpha=group["lr"])
                p.copy_(master)


class AttributeMasterSGD(Optimizer):
    """The copy is an attribute of the parameter."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                p.main_param = p.detach().clone().float()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.main_param.sub_(p.grad.float(), alpha=group["lr"])
                p.copy_(p.main_param)


class FlatCopiesSGD(Optimizer):
    """Steps float32 copies that are its only parameters, and writes them back: no hook sees the model's own."""

    def __init__(self, params, lr):
        self.model_params = list(params)
        super().__init__([p.detach().clone().float().requires_grad_(True) for p in self.model_params], {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p, master in zip(self.model_params, self.param_groups[0]["params"], strict=True):
            master.sub_(p.grad.float(), alpha=self.param_groups[0]["lr"])
            p.copy_(master)


class SlowWeights(Optimizer):
    """Lookahead as one optimizer: every `k` steps the parameters become an average with slow ones."""

    def __init__(self, params, lr, k=5, alpha=0.5, lazy=False):
        super().__init__(params, {"lr": lr})
        self.k, self.alpha, self.count = k, alpha, 0
        if not lazy:
            self.slow_weights = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not hasattr(self, "slow_weights"):
            self.slow_weights = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        self.count += 1
        if self.count % self.k == 0:
            for p, slow in zip(parameters, self.slow_weights, strict=True):
                p.copy_(slow.lerp_(p, self.alpha))


class Lookahead:
    """The same around another optimizer, in a class that has no hooks and that no hooked optimizer knows of."""

    def __init__(self, inner, k=5, alpha=0.5):
        self.inner, self.k, self.alpha, self.count = inner, k, alpha, 0
        self.param_groups = inner.param_groups
        self.backup = [p.detach().clone() for group in inner.param_groups for p in group["params"]]

    def zero_grad(self):
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self):
        self.inner.step()
        self.count += 1
        if self.count % self.k == 0:
            parameters = [p for group in self.param_groups for p in group["params"]]
            for p, slow in zip(parameters, self.backup, strict=True):
                p.copy_(slow.lerp_(p, self.alpha))


class AveragedSGD(Optimizer):
    """Evaluates the gradient at an average of the weights; the weights themselves are in the state."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["fast"], state["ema"] = p.detach().clone(), p.detach().clone()
                state["fast"].sub_(p.grad, alpha=group["lr"])
                p.copy_(state["ema"].lerp_(state["fast"], 0.1))


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al., 2021), as commonly written."""

    def __init__(self, params, inner, lr, rho=0.05, ascents=1):
        super().__init__(params, {"lr": lr})
        self.inner, self.rho, self.ascents = inner(self.param_groups, lr=lr), rho, ascents
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def ascend(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("old_p", p.detach().clone())
                p.add_(p.grad, alpha=self.rho / float(p.grad.norm().clamp_min(1e-12)))

    @torch.no_grad()
    def descend(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p].pop("old_p")
        self.inner.step()

    def step(self, closure=None):
        closure()
        for _ in range(self.ascents):
            self.ascend()
            self.zero_grad()
            closure()
        self.descend()
