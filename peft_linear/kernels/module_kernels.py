# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`ModuleKernels`: the neural tangent kernel of a model, one block a module, as a value that can be saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError, KernelError, TargetError
from ..functional.spectrum import Spectrum
from .saving import INDEX, read_kernels, write_kernels
from .tensor_files import BlocksOfRows, LazyBlocks, SomeBlocks


_FLOATS = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
PEFT_PREFIX = "base_model.model."  # names are those of the base model; a PeftModel's longer ones are understood


@dataclass(frozen=True, eq=False)
class ModuleKernels:
    """Empirical NTK blocks `K_m = J_m J_mᵀ` of N examples and C outputs, restricted to one module each.

    `J_m` (n, P_m) is the Jacobian of the outputs with respect to the parameters of module `m` at θ0; n = N·C and the
    row of example i, output a is `i*C + a`. The kernel of a set of modules is exactly the sum of their blocks, plus
    `base`, the block of the parameters that are always trained (the task head).

    Source: *Linearization Explains Fine-Tuning in Large Language Models* (arXiv 2602.08239), section 4; the authors'
    own code leaves `base` out.

    Kernels too large for memory are *lazy*: `blocks` then reads a block from its file at each access, and everything
    here holds one of them at a time.
    """

    blocks: Mapping[str, Tensor]  # {module name: (n, n) float64}, in model order
    base: Tensor  # (n, n) float64, zeros where nothing is always trained
    outputs: Tensor  # (N, C) float64, f at θ0
    labels: Tensor | None  # (N,) int64 classes, (N, C) int64 of 0 and 1, or float64 targets
    num_parameters: Mapping[str, int]  # adapter parameters of each module at this rank
    shapes: Mapping[str, tuple[int, int]]  # (d_in, d_out) of each module
    output_kind: str = "logits"
    space: str = "lora"
    rank: int = 8
    lora_alpha: float = 16.0
    spread: Mapping[str, float] = field(default_factory=dict)  # relative deviation between draws of A, per module
    provenance: Mapping[str, Any] = field(default_factory=dict)
    base_parameters: int = 0  # that `base` is of; 0 also where it is not known (older files)

    def __post_init__(self) -> None:
        n = self.outputs.numel()
        if self.outputs.ndim != 2 or n == 0:
            raise KernelError(f"outputs must be a non-empty (N, C) tensor, got shape {tuple(self.outputs.shape)}")
        if self.labels is not None and self.labels.shape[:1] != self.outputs.shape[:1]:
            raise KernelError(f"{len(self.labels)} labels for {len(self.outputs)} examples; pass one label an example")
        shapes = {"base": tuple(self.base.shape)}
        if isinstance(self.blocks, LazyBlocks):
            shapes |= dict.fromkeys(self.blocks, self.blocks.shape)
        else:
            shapes |= {name: tuple(block.shape) for name, block in self.blocks.items()}
            object.__setattr__(self, "blocks", MappingProxyType(dict(self.blocks)))
        for name, shape in shapes.items():
            if shape != (n, n):
                raise KernelError(
                    f"block {name!r} has shape {shape}, but {self.num_examples} examples with "
                    f"{self.num_outputs} outputs need ({n}, {n})"
                )
        for name in ("num_parameters", "shapes", "spread", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def names(self) -> tuple[str, ...]:
        """Full module names, in model order."""
        return tuple(self.blocks)

    @property
    def lazy(self) -> bool:
        """Whether blocks are read from files at each access."""
        return isinstance(self.blocks, LazyBlocks)

    @property
    def num_examples(self) -> int:
        return self.outputs.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.outputs.shape[1]

    def __getitem__(self, name: str) -> Tensor:
        """The (n, n) float64 block of one module, without `base`."""
        if name not in self:
            raise TargetError(f"no kernel of a module {name!r}; there are: {', '.join(self.names)}")
        return self.blocks[name.removeprefix(PEFT_PREFIX)]

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
        about 10·eps in the rows are errors of about (10·eps)²·λ1 in the small eigenvalues of K = J Jᵀ. Products of
        rows in float32 add an error of about 4e-8·sqrt(K_ii·K_jj) to every entry.
        """
        eps, entry_error = self.rounding
        return Spectrum.from_gram(self.subset(names), eps=eps, entry_error=entry_error)

    @property
    def rounding(self) -> tuple[float, float]:
        """`eps` and `entry_error` of `Spectrum.from_gram`, from the precisions that the provenance names."""
        dtype, product_dtype = (
            _FLOATS.get(str(self.provenance.get(key)), torch.float64) for key in ("dtype", "product_dtype")
        )
        eps = max(torch.finfo(torch.float64).eps, (10 * torch.finfo(dtype).eps) ** 2)
        return eps, torch.finfo(product_dtype).eps / 3

    def select_examples(self, indices: Sequence[int] | Tensor) -> ModuleKernels:
        """The same kernels on the examples `indices`, in that order (repeats allowed, as a bootstrap needs)."""
        index = torch.as_tensor(indices, dtype=torch.long)
        if index.ndim != 1 or not len(index) or index.min() < 0 or index.max() >= self.num_examples:
            raise KernelError(
                f"indices must be a non-empty list of numbers in [0, {self.num_examples}), got {indices}"
            )
        columns = torch.arange(self.num_outputs)
        rows = (index[:, None] * self.num_outputs + columns).reshape(-1)
        if isinstance(self.blocks, LazyBlocks):
            blocks: Mapping[str, Tensor] = BlocksOfRows(self.blocks, rows)
        else:
            blocks = {name: block[rows][:, rows] for name, block in self.blocks.items()}
        return replace(
            self,
            blocks=blocks,
            base=self.base[rows][:, rows],
            outputs=self.outputs[index],
            labels=None if self.labels is None else self.labels[index],
        )

    def select_modules(self, names: Iterable[str]) -> ModuleKernels:
        """The same kernels of these candidates only, in model order; lazy kernels stay lazy."""
        chosen = set(names)
        unknown = sorted(chosen - set(self.names))
        if unknown:
            raise TargetError(f"no kernel of a module {unknown[0]!r}; there are: {', '.join(self.names)}")
        kept = [name for name in self.names if name in chosen]
        blocks: Mapping[str, Tensor]
        if isinstance(self.blocks, LazyBlocks):
            blocks = SomeBlocks(self.blocks, kept)
        else:
            blocks = {name: self.blocks[name] for name in kept}
        return replace(
            self,
            blocks=blocks,
            num_parameters={name: self.num_parameters[name] for name in kept},
            shapes={name: self.shapes[name] for name in kept},
            spread={name: value for name, value in self.spread.items() if name in chosen},
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file (tensors, with everything else as JSON in its header), whole or not at all.

        Lazy kernels are copied into it block by block.
        """
        if isinstance(self.blocks, LazyBlocks):
            write_kernels(path, self._small_tensors(), self._record(), blocks=self.blocks)
        else:
            tensors = {f"block/{name}": block for name, block in self.blocks.items()}
            write_kernels(path, tensors | self._small_tensors(), self._record())

    def save_index(
        self, folder: str | os.PathLike, files: Mapping[str, str], checksums: Mapping[str, str] | None = None
    ) -> None:
        """Makes a folder of blocks loadable.

        Args:
            folder: The folder.
            files: The file in it of each block, whose tensor is "block".
            checksums: The sha256 of each file.
        """
        record = self._record() | {"files": dict(files), "checksums": dict(checksums or {})}
        write_kernels(Path(folder) / INDEX, self._small_tensors(), record)

    @classmethod
    def load(cls, path: str | os.PathLike, lazy: bool = False) -> ModuleKernels:
        """Reads what `save` wrote, or the folder of a finished computation (of `Resources(folder=...)`).

        Args:
            path: the file, or the folder; a folder's blocks are always lazy.
            lazy: leave the blocks in the file and read one at each access, for kernels larger than memory.

        Raises:
            FileError: there is no such file or folder, it does not hold (whole) kernels, or it was changed since.

        Cost: every file is read once to check its digest, lazy or not.
        """
        record, blocks, small = read_kernels(path, lazy)
        try:
            return cls(
                blocks=blocks, base=small["base"], outputs=small["outputs"], labels=small.get("labels"), **record
            )
        except KernelError as error:
            raise FileError(f"{os.fspath(path)!r} does not hold whole kernels: {error}; compute them again") from error

    def _small_tensors(self) -> dict[str, Tensor]:
        tensors = {"base": self.base, "outputs": self.outputs}
        return tensors if self.labels is None else tensors | {"labels": self.labels}

    def _record(self) -> dict[str, Any]:
        return {
            "names": self.names,
            "num_parameters": dict(self.num_parameters),
            "shapes": dict(self.shapes),
            "output_kind": self.output_kind,
            "space": self.space,
            "rank": self.rank,
            "lora_alpha": self.lora_alpha,
            "spread": dict(self.spread),
            "provenance": dict(self.provenance),
            "base_parameters": self.base_parameters,
        }
