"""adam's and adamw's part of a step by a kernel that somebody wrote for it.

    OneLaunch   kernels/adamw.py, `fuse(tx, kernels="triton")`: one launch for all leaves; parameters in fp32, fp64 or two
                halves, moments in any format
    Operator    torch's own, as torch.optim.AdamW(fused=True) calls it: parameters and moments of one dtype on a CPU

They take the tails [scale_by_adam, add_decayed_weights, scale_by_learning_rate] and [scale_by_adam, scale_by_learning_rate]
with betas that stay. Other tails, and leaves that do not lie flat or whose blocks would be cut, go through the pass of fuse.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fmegatron.compiled import abstract
from fmegatron.kernels.adamw import Adam, Kind, Leaf, adamw
from fmegatron.kernels.launch import Form
from fmegatron.optim.base import Tree
from fmegatron.optim.elementwise import Elementwise
from fmegatron.optim.formats import BLOCK
from fmegatron.optim.packed import Where

Tensors = list[Tensor] | tuple[Tensor, ...]
PIECE = 1 << 18  # elements of a scaled gradient


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


@dataclass(frozen=True)
class Operator:
    """torch._fused_adamw_ for the leaves of one tail, in place: faster than Inductor's kernel, and nothing is compiled.

    A factor on the gradients is a pass of its own, by pieces: there Inductor's kernel is the faster one.
    step: what it takes as the number of this update, from 1, in fp32.
    """

    adam: Adam
    step: Tensor

    def takes(self, arrays: tuple[Tensor, ...]) -> bool:
        """Whether the operator can update these."""
        dtypes = {x.dtype for x in arrays}
        return all(x.is_contiguous() for x in arrays) and dtypes in ({torch.float32}, {torch.float64})

    def __call__(self, leaves: Sequence[Given]) -> None:
        """Update them in place: at once those with the same numbers, by pieces those whose gradients are scaled or narrow."""
        if abstract([given.vector for given in leaves]):
            return  # there is nothing to compile, and no value to read
        alike: dict[int, list[Given]] = {}
        for given in leaves:
            alike.setdefault(id(given.vector), []).append(given)
        room: dict[torch.dtype, Tensor] = {}  # for a piece of a gradient: new memory costs more than what is done with it
        for group in alike.values():
            factor, ok, _, _, *decay, step = group[0].vector[: 5 + self.adam.decays].tolist()
            if not ok:
                continue
            update = partial(self._update, -step, decay[0] * group[0].vector[-1].item() if decay else 0.0)
            ready = [x for x in group if factor == 1 and x.grad.dtype == x.arrays[0].dtype]
            if ready:
                update([x.grad for x in ready], *zip(*[x.arrays for x in ready], strict=True))
            for x in group if not ready else ():
                dtype = x.arrays[0].dtype
                scaled = room.setdefault(dtype, torch.empty(min(PIECE, max(x.grad.numel() for x in leaves)), dtype=dtype))
                for g, *arrays in zip(*(t.reshape(-1).split(PIECE) for t in (x.grad, *x.arrays)), strict=True):
                    update([torch.mul(g.to(dtype), factor, out=scaled[: len(g)])], *([y] for y in arrays))

    def alone(self, grad: Tensor, vector: Tensor, arrays: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Update one leaf, given as `FusedStep` gives one to its pass."""
        self([Given(grad, vector, arrays)])
        return arrays

    def _update(
        self, rate: float, decay: float, grads: Tensors, params: Tensors, firsts: Tensors, seconds: Tensors
    ) -> None:
        b1, b2 = self.adam.betas
        torch._fused_adamw_(params, grads, firsts, seconds, [], [self.step] * len(params), lr=rate, beta1=b1, beta2=b2,
                            weight_decay=decay, eps=self.adam.eps, amsgrad=False, maximize=False)


def kernel_of(
    forms: Sequence[Elementwise], states: Sequence[Tree], halves: bool, kernels: Form, device: torch.device, folds: bool
) -> OneLaunch | Operator | None:
    """The kernel for a tail; None where there is none. folds: a compiled pass would multiply by a factor on its way."""
    names = [form.known[0] if form.known else "" for form in forms]
    if names not in (["adam", "decay", "rate"], ["adam", "rate"]):
        return None
    kinds: tuple[Kind, ...] = tuple(forms[0].format(slot).kind for slot in forms[0].slots)
    first, second = kinds
    adam = replace(forms[0].known[1], decays=len(names) == 3, kinds=(first, second))
    if kernels == "triton":
        return OneLaunch(adam, halves)
    plain = kinds == ("same", "same") and not (halves or folds) and device.type == "cpu"
    return Operator(adam, (states[0]["count"] + 1).float()) if plain else None
