"""Parameters are declared, not created: a name for each dim, and how to fill it.

    declare = {"up": Param("embed mlp", normal(0.02)), "norm": Param("embed", ones)}
    stack(declare, 12)                      the same with a leading dim of 12 layers
    count(declare, {"embed": 64, "mlp": 256})

From such a tree come shapes, counts, meta tensors, weight-decay masks and initial values. An initial value is a
function of (key, leaf, global layer, global index) alone: any shard of it can be made anywhere, and it does not matter
how layers are grouped into runs, or how far a dim is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmegatron import random, tree
from fmegatron.sharding import Size
from fmegatron.sharding.placement import Sizes
from fmegatron.tree import Tree

Init = Callable[[Tensor, Tensor], Tensor]  # (0-D key, int64 index of elements) -> values of index's shape


@dataclass(frozen=True)
class Param:
    """A leaf: the names of its dims, its initial values, and whether weight decay touches it.

    decay: None means yes for what has two dims or more, as Megatron-LM does; say False for a bias of several dims.
    layers: the number of layers that a stacked leaf holds; its first name is then "layers".
    exact: it keeps its own dtype where the computation runs in another.
    inputs: of a matrix of more than two dims, how many a product with it sums over; None: see `matrix`.
    """

    names: str
    init: Init
    decay: bool | None = None
    layers: int | None = None
    inputs: int | None = None
    exact: bool = False

    @property
    def decays(self) -> bool:
        """Whether weight decay touches it."""
        return self.decay if self.decay is not None else len(self.names.split()) - (self.layers is not None) >= 2

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The global shape, pads included."""
        return tuple(_size(self, name, sizes).padded() for name in self.names.split())

    def true_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The global shape without pads."""
        return tuple(_size(self, name, sizes).n for name in self.names.split())


def _size(param: Param, name: str, sizes: Sizes) -> Size:
    if name == "layers" and param.layers is not None:
        return Size(param.layers)
    if name not in sizes:
        raise ValueError(f"Param({param.names!r}): no size for {name!r}, known are {', '.join(sorted(sizes))}")
    size = sizes[name]
    return size if isinstance(size, Size) else Size(size)


@dataclass(frozen=True)
class Matrix:
    """How a leaf is matrices: `batch` leading dims number them, then come `rows` dims of inputs; the others are outputs."""

    batch: int
    rows: int

    def fold(self, x: Tensor) -> Tensor:
        """[*batch, *inputs, *outputs] -> [n, rows, columns]."""
        rows = math.prod(x.shape[self.batch : self.batch + self.rows])
        return x.reshape(-1, rows, math.prod(x.shape[self.batch + self.rows :]))


BATCHES = ("layers", "expert")  # dims that number matrices
TABLES = ("vocab", "position")  # dims of a table whose rows are looked up


def matrix(param: Param) -> Matrix | None:
    """The matrices of a leaf, None for vectors. Of three dims the last two are outputs, unless the last is embed."""
    names = param.names.split()
    batch = next((i for i, name in enumerate(names) if name not in BATCHES), len(names))
    inner = names[batch:]
    if len(inner) < 2 or not param.decays:
        return None
    return Matrix(batch, param.inputs or (len(inner) - 1 if inner[-1] == "embed" else 1))


def table(param: Param) -> bool:
    """Whether it holds a row a token or position: embeddings, and the head."""
    return any(name in TABLES for name in param.names.split())


# -- initial values -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class normal:
    """N(0, std^2)."""

    std: float

    def __call__(self, key: Tensor, index: Tensor) -> Tensor:
        return random.normal(key, index) * self.std


@dataclass(frozen=True)
class constant:
    """The same value everywhere."""

    value: float

    def __call__(self, key: Tensor, index: Tensor) -> Tensor:
        return torch.full_like(index, self.value, dtype=torch.float32)


zeros, ones = constant(0.0), constant(1.0)


# -- functions of trees of declarations -----------------------------------------------------------------------------
def stack(declare: Tree, n: int) -> Tree:
    """The same declarations for `n` layers, on a leading dim named layers."""
    return tree.map(lambda p: replace(p, names=f"layers {p.names}", layers=n), declare)


def bias(names: str) -> Param:
    """Zeros, without weight decay whatever its dims."""
    return Param(names, zeros, decay=False)


def shapes(declare: Tree, sizes: Sizes) -> Tree:
    """Global shapes, pads included."""
    return tree.map(lambda p: p.shape(sizes), declare)


def count(declare: Tree, sizes: Sizes) -> int:
    """Number of parameters, pads left out."""
    return sum(math.prod(p.true_shape(sizes)) for p in tree.leaves(declare))


def abstract(declare: Tree, sizes: Sizes, dtype: torch.dtype = torch.float32) -> Tree:
    """Tensors on the meta device: shapes without memory."""
    return tree.map(lambda p: torch.empty(p.shape(sizes), dtype=dtype, device="meta"), declare)


def decay_mask(declare: Tree) -> Tree:
    """True where weight decay applies: matrices and embeddings, not norms and biases."""
    return tree.map(lambda p: p.decays, declare)


def init(declare: Tree, sizes: Sizes, key: Tensor | int, dtype: torch.dtype = torch.float32) -> Tree:
    """All initial values, whole, on one device."""
    key = random.key(key) if isinstance(key, int) else key

    def leaf(path: str, param: Param) -> Tensor:
        index = [torch.arange(n, device=key.device) for n in param.shape(sizes)]
        return init_leaf(param, path, key, sizes, index, dtype)

    return tree.map_with_path(leaf, declare)


def canonical(path: str, param: Param) -> tuple[str, int]:
    """A leaf's name without its run, and the run's first layer: "layers.4.attn.q" -> ("layers.attn.q", 4)."""
    parts = path.split(".")
    runs = [i for i, part in enumerate(parts) if part.isdigit()] if param.layers is not None else []
    if not runs:
        return path, 0
    return ".".join(parts[: runs[-1]] + parts[runs[-1] + 1 :]), int(parts[runs[-1]])


def init_leaf(
    param: Param,
    path: str,
    key: Tensor,
    sizes: Sizes,
    index: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    pads: Sequence[int] = (),
) -> Tensor:
    """The piece of a leaf's initial values at the given global indices; pads are zero, also those of its placement.

    path: the leaf's, dotted, with its run: "layers.4.attn.q". index: for each dim int64 [local size], which may be
    batched under vmap; along layers it counts from the run's first layer. Returns [local sizes] in `dtype`.
    """
    name, first = canonical(path, param)
    key = random.fold_in(key, name)
    names, true = param.names.split(), param.true_shape(sizes)
    dims = len(index)

    def along(i: int, x: Tensor) -> Tensor:
        return x.reshape([-1 if j == i else 1 for j in range(dims)])

    def piece(rows: Tensor) -> Tensor:
        flat, inside = rows.new_zeros(()), None
        for i, here in enumerate([rows, *index[1:]]):
            here = along(i, here)
            flat = flat * true[i] + here + (first if i == 0 else 0)
            if isinstance(sizes.get(names[i]), Size) or (pads and pads[i]):
                real = here < true[i]
                inside = real if inside is None else inside & real
        value = param.init(key, flat)
        if inside is not None:
            value = torch.where(inside, value, torch.zeros_like(value))
        return value.to(dtype)

    if dims == 0:
        return param.init(key, key.new_zeros((), dtype=torch.int64)).to(dtype)
    inner = math.prod(x.shape[0] for x in index[1:])
    pieces = index[0].split(max(1, PIECE // max(1, inner)))  # indices and draws are 64 bit: never a whole leaf of them
    return piece(index[0]) if len(pieces) == 1 else torch.cat([piece(rows) for rows in pieces])


PIECE = 1 << 22  # elements drawn at a time
