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

from fmegatron import random, tree
from fmegatron.optim.base import LOCAL, Over, Transform, Tree
from fmegatron.optim.formats import SAME, Format
from fmegatron.optim.leaves import Leaves

Slots = dict[str, Any]
ROUNDING = 0x726F756E64  # the seed of stochastic rounding


@dataclass(frozen=True)
class Elementwise:
    """A formula on leaves, the names of its slots, its numbers by the count of updates before, its number by leaf.

    stored: the formats of slots that do not lie in memory as they are computed with, see formats.py. known: what it is to a
    kernel that is written for it, see multi_tensor.py.
    """

    leaf: Callable[[Any, Any, Slots, dict[str, Any]], tuple[Any, Slots]]
    slots: tuple[str, ...] = ()
    numbers: Callable[[Tensor], dict[str, Tensor]] | None = None
    each: Callable[[Tree], list[float]] | None = None
    stored: tuple[tuple[str, Format], ...] = ()
    known: tuple[Any, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether the state has a count."""
        return bool(self.numbers or self.stored)

    def format(self, slot: str) -> Format:
        """How a slot lies."""
        return dict(self.stored).get(slot, SAME)

    @property
    def arrays(self) -> list[str]:
        """The names of all slots' arrays."""
        return [name for slot in self.slots for name in self.format(slot).names(slot)]


def elementwise(form: Elementwise) -> Transform:
    """The Transform of a formula. State: {"count": 0-D int64 if it counts, slot: tree of p's structure and dtypes}."""

    def init(params: Tree) -> Tree:
        count = {"count": zero(params)} if form.counts else {}
        for slot in form.slots:
            kind = form.format(slot)
            count |= {name: tree.map(new, params) for name, new in zip(kind.names(slot), kind.new, strict=True)}
        return count

    def update(grads: Tree, state: Tree, params: Tree, *, over: Over = LOCAL) -> tuple[Tree, Tree]:
        new, spec = tree.flatten(params)
        u = [g.to(p.dtype) for g, p in zip(tree.leaves(grads), new, strict=True)]
        slots = {slot: form.format(slot).loaded([tree.leaves(state[name]) for name in form.format(slot).names(slot)])
                 for slot in form.slots}
        numbers = form.numbers(state["count"]) if form.numbers else {}
        each = tuple(form.each(params)) if form.each else (1.0,) * len(u)
        out, slots = run(form.leaf, u, new, slots, numbers, each)
        kept = {"count": state["count"] + 1} if form.counts else {}
        draws = draws_of(state["count"], params, over) if form.stored else None
        for slot, values in slots.items():
            kind = form.format(slot)
            arrays = [values] if draws is None else draws.store(kind, slot, values)
            kept |= {name: spec.unflatten(x) for name, x in zip(kind.names(slot), arrays, strict=True)}
        return spec.unflatten(out), kept

    return Transform(init, update, form)


@dataclass(frozen=True)
class Draws:
    """The random bits of an update: where the leaves' elements lie, and a key for each slot and leaf."""

    places: tuple[tuple[str, Tensor, Tensor], ...]
    key: Tensor

    def keys(self, slot: str) -> list[Tensor]:
        """The leaves' keys of a slot."""
        own = random.fold_in(self.key, slot)
        return [random.fold_in(own, name) for name, _, _ in self.places]

    def store(self, kind: Format, slot: str, values: list[Tensor]) -> list[list[Tensor]]:
        """All leaves' arrays of a slot."""
        done = []
        for x, key, (_, rows, columns) in zip(values, self.keys(slot), self.places, strict=True):
            done.append(kind.store(x, random.bits(key, rows + columns).reshape(x.shape) if kind.draws else key))
        return [list(arrays) for arrays in zip(*done, strict=True)]


def draws_of(count: Tensor, params: Tree, over: Over) -> Draws:
    """The draws of the update with that count."""
    places = tuple(over.index(path, p) for path, p in tree.to_paths(params).items())
    return Draws(places, random.fold_in(random.key(ROUNDING).to(count.device), count))


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
