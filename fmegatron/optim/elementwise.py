"""A transform that treats every element alike is one formula on leaves, and this file makes a Transform of it.

    def leaf(u, p, slots, s):                                # momentum
        trace = slots["trace"] * 0.9 + u
        return trace, {"trace": trace}

u is the update so far, p the parameter, slots the state of p's shape, s the numbers of this step: the 0-D fp64 tensors that
`numbers(count)` makes, and s["each"], a number of each leaf's own (a decay mask, a muP multiplier). The formula uses
operators and torch functions or methods only, so it runs on
    tensors, leaf by leaf            under vmap and inside torch.compile,
    Leaves, through torch._foreach_* in plain eager, bit for bit the same,
    flat leaves, compiled            composed with its neighbours in a chain: see fuse.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.optim.base import LOCAL, Over, Transform, Tree
from fmegatron.optim.leaves import Leaves

Slots = dict[str, Any]


@dataclass(frozen=True)
class Elementwise:
    """A formula on leaves, the names of its slots, its numbers by the count of updates before, its number by leaf."""

    leaf: Callable[[Any, Any, Slots, dict[str, Any]], tuple[Any, Slots]]
    slots: tuple[str, ...] = ()
    numbers: Callable[[Tensor], dict[str, Tensor]] | None = None
    each: Callable[[Tree], list[float]] | None = None


def elementwise(form: Elementwise) -> Transform:
    """The Transform of a formula. State: {"count": 0-D int64 if it has numbers, slot: tree of p's structure and dtypes}."""

    def init(params: Tree) -> Tree:
        count = {"count": zero(params)} if form.numbers else {}
        return count | {name: tree.map(torch.zeros_like, params) for name in form.slots}

    def update(grads: Tree, state: Tree, params: Tree, *, over: Over = LOCAL) -> tuple[Tree, Tree]:
        new, spec = tree.flatten(params)
        u = [g.to(p.dtype) for g, p in zip(tree.leaves(grads), new, strict=True)]
        slots = {name: tree.leaves(state[name]) for name in form.slots}
        numbers = form.numbers(state["count"]) if form.numbers else {}
        each = tuple(form.each(params)) if form.each else (1.0,) * len(u)
        out, slots = run(form.leaf, u, new, slots, numbers, each)
        count = {"count": state["count"] + 1} if form.numbers else {}
        return spec.unflatten(out), count | {name: spec.unflatten(values) for name, values in slots.items()}

    return Transform(init, update, form)


def run(
    leaf: Callable[..., tuple[Any, Slots]], u: list[Tensor], p: list[Tensor], slots: dict[str, list[Tensor]],
    numbers: dict[str, Tensor], each: tuple[float, ...],
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """A formula over all leaves: through foreach in plain eager, leaf by leaf under a transform or a tracer."""
    if u and plain():
        lists = {name: Leaves(values) for name, values in slots.items()}
        out, new = leaf(Leaves(u), Leaves(p), lists, numbers | {"each": each})
        return list(out.tensors), {name: list(values.tensors) for name, values in new.items()}
    results = [leaf(u[i], p[i], {name: values[i] for name, values in slots.items()}, numbers | {"each": each[i]})
               for i in range(len(u))]
    return [out for out, _ in results], {name: [new[name] for _, new in results] for name in slots}


def plain() -> bool:
    """Whether neither a torch.func transform nor a tracer is at work, which know nothing of torch._foreach_*."""
    return torch._C._functorch.peek_interpreter_stack() is None and not torch.compiler.is_compiling()


def zero(params: Tree) -> Tensor:
    """A count: 0-D int64, made from a parameter so that it is mapped as the parameters are."""
    first = next(iter(tree.leaves(params)), None)
    return torch.zeros((), dtype=torch.int64) if first is None else first.new_zeros((), dtype=torch.int64)
