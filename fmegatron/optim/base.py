"""What an optimizer is: a pair of pure functions, and the three words that join such pairs.

    tx = chain(clip_by_global_norm(1.0), adamw(3e-4))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    params = apply_updates(params, updates)

`over` is how a transform sees beyond its own shards: `over.norm(tree)` is the norm of the whole tree, `over.mean(tree)` the
mean of each whole leaf, `over.whole(fn, tree)` applies fn to whole leaves. Each element counts once, whatever holds it twice.
`LOCAL` is one device, where the shard is the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fmegatron import tree

Tree = Any


class Over(Protocol):
    """The view across shards, pipeline stages and padding."""

    def norm(self, updates: Tree) -> Tensor:
        """The 2-norm of all elements of a tree, 0-D, at least fp32."""

    def mean(self, updates: Tree) -> Tree:
        """Each leaf's mean over its elements, 0-D."""

    def whole(self, fn: Callable[[Tensor], Tensor], updates: Tree) -> Tree:
        """fn of each leaf, given it whole and keeping its shape; the result lies as the leaf lay."""


class Update(Protocol):
    """(updates so far, state, params) -> (updates, new state)."""

    def __call__(self, grads: Tree, state: Tree, params: Tree, *, over: Over = ...) -> tuple[Tree, Tree]: ...


@dataclass(frozen=True)
class Transform:
    """A step of an optimizer, or a whole one.

    init: params -> state, a tree of tensors made from params (`new_zeros`), so that it can be mapped over ranks or seeds.
    form: what `fuse` may look into: an Elementwise formula, a Scaling, or the tuple of a chain; None is a closed box.
    """

    init: Callable[[Tree], Tree]
    update: Update
    form: Any = None


@dataclass(frozen=True)
class Scaling:
    """Updates times one number: `factor(updates, over) -> 0-D`. Folded into the fused pass, it costs no pass of its own."""

    factor: Callable[[Tree, Over], Tensor]


@dataclass(frozen=True)
class Local:
    """`over` on one device: the shards are whole."""

    def norm(self, updates: Tree) -> Tensor:
        """The 2-norm of all elements of a tree, in fp32 or fp64."""
        norms = [torch.linalg.vector_norm(u, dtype=u.dtype if u.dtype == torch.float64 else torch.float32)
                 for u in tree.leaves(updates)]
        return torch.linalg.vector_norm(torch.stack(norms))

    def mean(self, updates: Tree) -> Tree:
        """Each leaf's mean."""
        return tree.map(torch.mean, updates)

    def whole(self, fn: Callable[[Tensor], Tensor], updates: Tree) -> Tree:
        """fn of each leaf."""
        return tree.map(fn, updates)


LOCAL = Local()


@dataclass(frozen=True)
class Known:
    """`over` for a step that has taken the norm of these updates before: clipping finds it here, all else asks `over`."""

    over: Over
    updates: Tree
    value: Tensor

    def norm(self, updates: Tree) -> Tensor:
        """The known norm if these are the known updates, by identity."""
        return self.value if updates is self.updates else self.over.norm(updates)

    def mean(self, updates: Tree) -> Tree:
        """Asks `over`."""
        return self.over.mean(updates)

    def whole(self, fn: Callable[[Tensor], Tensor], updates: Tree) -> Tree:
        """Asks `over`."""
        return self.over.whole(fn, updates)


def chain(*transforms: Transform) -> Transform:
    """One transform after the other; chains inside are flattened, so the state is a flat tuple, one entry a link."""
    links = tuple(link for tx in transforms for link in (tx.form if isinstance(tx.form, tuple) else (tx,)))

    def init(params: Tree) -> Tree:
        return tuple(link.init(params) for link in links)

    def update(grads: Tree, state: Tree, params: Tree, *, over: Over = LOCAL) -> tuple[Tree, Tree]:
        states = []
        for link, old in zip(links, state, strict=True):
            grads, new = link.update(grads, old, params, over=over)
            states.append(new)
        return grads, tuple(states)

    return Transform(init, update, links)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, in the params' dtypes."""
    return tree.map(lambda p, u: p + u.to(p.dtype), params, updates)


def scaling(factor: Callable[[Tree, Over], Tensor]) -> Transform:
    """The transform that multiplies updates by `factor(updates, over)`."""

    def update(grads: Tree, state: Tree, params: Tree, *, over: Over = LOCAL) -> tuple[Tree, Tree]:
        by = factor(grads, over)
        return tree.map(lambda u: u * by, grads), state

    return Transform(lambda params: {}, update, Scaling(factor))
