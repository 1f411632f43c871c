# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`ModuleKernels`: the neural tangent kernel of a model, one block a module, as a value that can be saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FileError, KernelError, TargetError
from ..files import atomic_file
from ..functional.spectrum import Spectrum


FORMAT = "peft_linear.ModuleKernels/1"
_FLOATS = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
PEFT_PREFIX = "base_model.model."  # names are those of the base model; a PeftModel's longer ones are understood


@dataclass(frozen=True, eq=False)
class ModuleKernels:
    """Empirical NTK blocks `K_m = J_m J_mᵀ` of N examples and C outputs, restricted to one module each.

    `J_m` (n, P_m) is the Jacobian of the outputs with respect to the parameters of module `m` at θ0; n = N·C and the
    row of example i, output a is `i*C + a`. The kernel of a set of modules is exactly the sum of their blocks, plus
    `base`, the block of the parameters that are trained whatever is chosen (the task head).

    Source: *Linearization Explains Fine-Tuning in Large Language Models* (arXiv 2602.08239), section 4; the authors'
    own code leaves `base` out.
    """

    blocks: Mapping[str, Tensor]  # {module name: (n, n) float64}, in model order
    base: Tensor  # (n, n) float64, zeros where nothing is always trained
    outputs: Tensor  # (N, C) float64, f at θ0
    labels: Tensor | None  # (N,) int64
    num_parameters: Mapping[str, int]  # adapter parameters of each module at this rank
    shapes: Mapping[str, tuple[int, int]]  # (d_in, d_out) of each module
    output_kind: str = "logits"
    space: str = "lora"
    rank: int = 8
    lora_alpha: float = 16.0
    spread: Mapping[str, float] = field(default_factory=dict)  # relative deviation between draws of A, per module
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.outputs.numel()
        if self.outputs.ndim != 2 or n == 0:
            raise KernelError(f"outputs must be a non-empty (N, C) tensor, got shape {tuple(self.outputs.shape)}")
        if self.labels is not None and self.labels.shape[:1] != self.outputs.shape[:1]:
            raise KernelError(f"{len(self.labels)} labels for {len(self.outputs)} examples; pass one label an example")
        for name, block in [("base", self.base), *self.blocks.items()]:
            if tuple(block.shape) != (n, n):
                raise KernelError(
                    f"block {name!r} has shape {tuple(block.shape)}, but {self.num_examples} examples with "
                    f"{self.num_outputs} outputs need ({n}, {n})"
                )
        for name in ("blocks", "num_parameters", "shapes", "spread", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def names(self) -> tuple[str, ...]:
        """Full module names, in model order."""
        return tuple(self.blocks)

    @property
    def num_examples(self) -> int:
        return self.outputs.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.outputs.shape[1]

    def __getitem__(self, name: str) -> Tensor:
        """The (n, n) float64 block of one module, without `base`."""
        block = self.blocks.get(name.removeprefix(PEFT_PREFIX))
        if block is None:
            raise TargetError(f"no kernel of a module {name!r}; there are: {', '.join(self.names)}")
        return block

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.removeprefix(PEFT_PREFIX) in self.blocks

    def __repr__(self) -> str:
        return (
            f"ModuleKernels({len(self)} modules, {self.num_examples} examples x {self.num_outputs} "
            f"{self.output_kind}, space={self.space!r}, rank={self.rank}, base={'yes' if self.base.any() else 'none'})"
        )

    def subset(self, names: Iterable[str] | None = None) -> Tensor:
        """`base` + the blocks of `names` (default: all): the kernel of training that set, (n, n) float64."""
        if isinstance(names, str):
            names = [names]
        chosen = self.names if names is None else tuple(names)
        if len(set(chosen)) != len(chosen):
            raise TargetError(f"a module is named twice in {chosen}; a kernel counts each module once")
        total = self.base.clone()
        for name in chosen:
            total += self[name]
        return total

    def spectrum(self, names: Iterable[str] | None = None) -> Spectrum:
        """Eigenvalues of `subset(names)`; O(n³).

        The noise floor follows the precision of the Jacobian rows, which the provenance names: relative errors of
        about 10·eps in the rows are errors of about (10·eps)²·λ1 in the small eigenvalues of K = J Jᵀ.
        """
        dtype = _FLOATS.get(str(self.provenance.get("dtype")), torch.float64)
        eps = max(torch.finfo(torch.float64).eps, (10 * torch.finfo(dtype).eps) ** 2)
        return Spectrum.from_gram(self.subset(names), eps=eps)

    def select_examples(self, indices: Sequence[int] | Tensor) -> ModuleKernels:
        """The same kernels on the examples `indices`, in that order (repeats allowed, as a bootstrap needs)."""
        index = torch.as_tensor(indices, dtype=torch.long)
        if index.ndim != 1 or not len(index) or index.min() < 0 or index.max() >= self.num_examples:
            raise KernelError(
                f"indices must be a non-empty list of numbers in [0, {self.num_examples}), got {indices}"
            )
        columns = torch.arange(self.num_outputs)
        rows = (index[:, None] * self.num_outputs + columns).reshape(-1)
        return replace(
            self,
            blocks={name: block[rows][:, rows] for name, block in self.blocks.items()},
            base=self.base[rows][:, rows],
            outputs=self.outputs[index],
            labels=None if self.labels is None else self.labels[index],
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file (tensors, with everything else as JSON in its header), whole or not at all."""
        tensors = {f"block/{name}": block.contiguous() for name, block in self.blocks.items()}
        tensors |= {"base": self.base.contiguous(), "outputs": self.outputs.contiguous()}
        if self.labels is not None:
            tensors["labels"] = self.labels.contiguous()
        record = {
            "names": self.names,
            "num_parameters": dict(self.num_parameters),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "output_kind": self.output_kind,
            "space": self.space,
            "rank": self.rank,
            "lora_alpha": self.lora_alpha,
            "spread": dict(self.spread),
            "provenance": dict(self.provenance),
        }
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, "record": json.dumps(record)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> ModuleKernels:
        """Reads what `save` wrote.

        Raises:
            FileError: there is no such file, or it is not a file of kernels.
        """
        if not os.path.isfile(path):
            raise FileError(f"there is no file {os.fspath(path)!r}; pass the path that ModuleKernels.save wrote")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise FileError(f"{os.fspath(path)!r} holds {metadata.get('format')!r}, expected {FORMAT!r}")
                record = json.loads(metadata["record"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise FileError(f"{os.fspath(path)!r} is not a whole safetensors file: {error}") from error
        names = record.pop("names")
        record["shapes"] = {name: tuple(shape) for name, shape in record["shapes"].items()}
        return cls(
            blocks={name: tensors[f"block/{name}"] for name in names},
            base=tensors["base"],
            outputs=tensors["outputs"],
            labels=tensors.get("labels"),
            **record,
        )
