"""adam's and adamw's part of a step as one launch of kernels/adamw.py for all leaves: `fuse(tx, kernels="triton")`.

It takes the tails [scale_by_adam, add_decayed_weights, scale_by_learning_rate] and [scale_by_adam, scale_by_learning_rate] with
betas that stay, of parameters in fp32, fp64 or two halves, moments in any format. Other tails, and leaves that do not lie flat
or whose blocks would be cut, go through the pass of fuse.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fmegatron.kernels.adamw import Adam, Kind, Leaf, adamw
from fmegatron.optim.elementwise import Elementwise
from fmegatron.optim.formats import BLOCK
from fmegatron.optim.packed import Where


@dataclass(frozen=True)
class Given:
    """A leaf of `FusedStep`: gradient, numbers, (p, [low], *arrays), and of stored formats where its elements lie."""

    grad: Tensor
    vector: Tensor
    arrays: tuple[Tensor, ...]
    where: Where | None = None


@dataclass(frozen=True)
class OneLaunch:
    """The kernel for the leaves of one tail. halves: parameters are bf16 and what they lack."""

    adam: Adam
    halves: bool

    def takes(self, arrays: tuple[Tensor, ...]) -> bool:
        """Whether the kernel can update these."""
        p, stored = arrays[0], self.adam.kinds != ("same", "same")
        if not all(x.is_contiguous() for x in arrays) or not p.numel():
            return False
        if any(kind.startswith("fp") for kind in self.adam.kinds) and (p.dim() == 0 or p.shape[-1] % BLOCK):
            return False
        return self.halves or p.dtype == torch.float32 or (p.dtype == torch.float64 and not stored)

    def __call__(self, leaves: Sequence[Given]) -> None:
        """Update them in place: one launch for those of one dtype of gradients and parameters."""
        alike: dict[Any, list[Leaf]] = {}
        for given in leaves:
            leaf = self.leaf(given)
            alike.setdefault((leaf.grad.dtype, leaf.param.dtype), []).append(leaf)
        for group in alike.values():
            adamw(self.adam, group, form="triton")

    def alone(self, grad: Tensor, vector: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Update one leaf, given as `FusedStep` gives one to its pass: ..., where of stored formats, arrays."""
        *where, arrays = rest
        self([Given(grad, vector, arrays, *where)])
        return tuple(arrays)

    def leaf(self, given: Given) -> Leaf:
        """As the kernel names it."""
        param, *rest = given.arrays
        low = rest.pop(0) if self.halves else None
        parts: dict[str, Tensor] = {}
        keys = list(given.where[2]) if given.where is not None else []
        for slot, kind in zip(("first", "second"), self.adam.kinds, strict=True):
            parts[slot] = rest.pop(0)
            if kind.startswith("fp"):
                parts[f"{slot}_shift"] = rest.pop(0)
            if kind != "same":
                parts[f"{slot}_key"] = keys.pop(0)
        if given.where is not None and given.where[2]:
            parts |= {"rows": given.where[0].contiguous(), "columns": given.where[1]}
        return Leaf(given.grad.contiguous(), param, vector=given.vector, low=low, **parts)


def one_launch(forms: Sequence[Elementwise], halves: bool) -> OneLaunch | None:
    """The kernel for a tail; None where there is none."""
    names = [form.known[0] if form.known else "" for form in forms]
    if names not in (["adam", "decay", "rate"], ["adam", "rate"]):
        return None
    kinds: tuple[Kind, ...] = tuple(forms[0].format(slot).kind for slot in forms[0].slots)
    first, second = kinds
    return OneLaunch(replace(forms[0].known[1], decays=len(names) == 3, kinds=(first, second)), halves)
