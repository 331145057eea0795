"""What an optimizer is: a pair of pure functions, and the three words that join such pairs.

    tx = chain(clip_by_global_norm(1.0), adamw(3e-4))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    params = apply_updates(params, updates)

`over` is how a transform sees beyond its own shards: `over.norm(tree)` is the norm of the whole tree, `over.mean(tree, dims)`
each leaf's mean over some dims (or that of its squares), `over.whole(fn, tree, views)` applies fn to whole matrices. Each
element counts once, whatever holds it twice. `LOCAL` is one device, where the shard is the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.nn.param import Matrix

Tree = Any
Dims = Mapping[str, tuple[int, ...]]  # by path
Views = Mapping[str, Matrix]  # by path


class Over(Protocol):
    """The view across shards, pipeline stages and padding."""

    def norm(self, updates: Tree) -> Tensor:
        """The 2-norm of all elements of a tree, 0-D, at least fp32."""

    def mean(self, updates: Tree, dims: Dims, square: bool = False) -> Tree:
        """Each leaf's mean over its dims `dims[path]`, which stay with size 1; pads do not count. square: of its squares."""

    def whole(self, fn: Callable[[Tensor], Tensor], updates: Tree, views: Views) -> Tree:
        """fn, [n, rows, columns] -> the same, of all leaves' whole matrices `views[path]`; results lie as the leaves lay.

        fn treats matrices one by one: it gets those of several leaves at once, and on a mesh each rank gets some of them.
        """

    def index(self, path: str, leaf: Tensor) -> tuple[str, Tensor, Tensor]:
        """A leaf's name and the global index of its elements, rows [..., 1] + columns [n], that are the same on every mesh."""


class Update(Protocol):
    """(updates so far, state, params) -> (updates, new state)."""

    def __call__(self, grads: Tree, state: Tree, params: Tree, *, over: Over = ...) -> tuple[Tree, Tree]: ...


@dataclass(frozen=True)
class Transform:
    """A step of an optimizer, or a whole one.

    init: params -> state, a tree of tensors made from params (`new_zeros`), so that it can be mapped over ranks or seeds.
    form: what `fuse` may look into: an Elementwise formula, a Scaling, or the tuple of a chain; None is a closed box.
    host: whether its arrays lie in host memory (`in_host_memory`).
    """

    init: Callable[[Tree], Tree]
    update: Update
    form: Any = None
    host: bool = False


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
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())  # a group may have no leaves

    def mean(self, updates: Tree, dims: Dims, square: bool = False) -> Tree:
        """Each leaf's mean over its dims, or that of its squares."""

        def leaf(path: str, u: Tensor) -> Tensor:
            return summed(u, dims[path], square) / math.prod(u.shape[dim] for dim in dims[path])

        return tree.map_with_path(leaf, updates)

    def whole(self, fn: Callable[[Tensor], Tensor], updates: Tree, views: Views) -> Tree:
        """fn of all leaves' matrices, those of one shape at once."""
        values, groups = tree.to_paths(updates), dict[Any, list[str]]()
        for path, u in values.items():
            groups.setdefault(views[path].fold(u).shape[1:], []).append(path)
        for paths in groups.values():
            folded = [views[path].fold(values[path]) for path in paths]
            parts = fn(torch.cat(folded)).split([x.shape[0] for x in folded])
            values |= {path: y.reshape(values[path].shape) for path, y in zip(paths, parts, strict=True)}
        return tree.map_with_path(lambda path, _: values[path], updates)

    def index(self, path: str, leaf: Tensor) -> tuple[str, Tensor, Tensor]:
        """The leaf's path, and its elements counted."""
        return path, *rows_and_columns([torch.arange(n, device=leaf.device) for n in leaf.shape], leaf.shape, leaf)


def summed(x: Tensor, dims: Sequence[int], square: bool = False) -> Tensor:
    """The sum over dims, which stay with size 1, or that of squares: over the last dims without an array of these."""
    if not dims:
        return x * x if square else x
    if square and tuple(dims) == tuple(range(x.dim() - len(dims), x.dim())):
        return torch.linalg.vector_norm(x, dim=tuple(dims), keepdim=True).square()
    return (x * x if square else x).sum(tuple(dims), keepdim=True)


def rows_and_columns(index: Sequence[Tensor], sizes: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Indices along each dim of a tensor of global `sizes` as those of its elements: rows [..., 1] + columns [n]."""
    rows = torch.zeros([1] * (len(index) - 1), dtype=torch.int64, device=like.device)
    for dim, here in enumerate(index[:-1]):
        rows = rows * sizes[dim] + here.reshape([-1 if i == dim else 1 for i in range(len(index) - 1)])
    columns = index[-1] if index else torch.zeros(1, dtype=torch.int64, device=like.device)
    return (rows * (sizes[-1] if index else 1))[..., None], columns


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

    def mean(self, updates: Tree, dims: Dims, square: bool = False) -> Tree:
        """Asks `over`."""
        return self.over.mean(updates, dims, square)

    def whole(self, fn: Callable[[Tensor], Tensor], updates: Tree, views: Views) -> Tree:
        """Asks `over`."""
        return self.over.whole(fn, updates, views)

    def index(self, path: str, leaf: Tensor) -> tuple[str, Tensor, Tensor]:
        """Asks `over`."""
        return self.over.index(path, leaf)


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
