"""Assertions on trees of tensors that say which leaf is wrong, by how much, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.sharding import Sharding, Size
from fmegatron.sharding.rules import Kind
from fmegatron.tree import Tree

SHOWN = 8  # wrong leaves that a message lists


def error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest entry of `expected` (at least `floor`); equal infinities are equal.

    0 where there is nothing to compare; inf where a difference is not finite, or the largest entry is 0 and they differ.
    """
    if not expected.numel():
        return 0.0
    a, b = actual.detach().to(torch.float64), expected.detach().to(torch.float64)
    worst = float(torch.where(a == b, torch.zeros_like(b), (a - b).abs()).max())
    if worst == 0:
        return 0.0
    largest = max(float(torch.where(b.isfinite(), b, torch.zeros_like(b)).abs().max()), floor)
    return worst / largest if largest and worst == worst else float("inf")


def _pairs(actual: Tree, expected: Tree) -> list[tuple[str, Tensor, Tensor]]:
    """(path, leaf, leaf) of two trees of one structure; AssertionError names the paths that only one has."""
    a, b = tree.to_paths(actual), tree.to_paths(expected)
    if a.keys() != b.keys():
        less, more = sorted(b.keys() - a.keys()), sorted(a.keys() - b.keys())
        raise AssertionError(f"trees differ in structure: missing {less[:SHOWN]}, unexpected {more[:SHOWN]}")
    return [(path, torch.as_tensor(a[path]), torch.as_tensor(b[path])) for path in b]


def _wrong_shapes(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> list[str]:
    return [f"{path}: shape {tuple(a.shape)}, expected {tuple(b.shape)}" for path, a, b in pairs if a.shape != b.shape]


def _fail(what: str, lines: Sequence[str]) -> None:
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise AssertionError("\n  ".join([what, *lines[:SHOWN], *more]))


def assert_trees_all_close(actual: Tree, expected: Tree, tolerance: float = 1e-6, floor: float = 0.0) -> None:
    """Each leaf's largest difference is at most `tolerance` times the largest entry of the expected leaf.

    floor: what counts as the largest entry of leaves whose entries are smaller: rounding where the true value is zero.
    Raises AssertionError with the paths, errors and places of the worst leaves.
    """
    pairs = _pairs(actual, expected)
    _fail("leaves differ in shape:", _wrong_shapes(pairs))
    errors = sorted(((error(a, b, floor), path, a, b) for path, a, b in pairs), key=lambda e: -e[0])
    lines = [f"{path}: {e:.3g}, {_worst(a, b)}" for e, path, a, b in errors if e > tolerance]
    _fail(f"{len(lines)} of {len(pairs)} leaves differ by more than {tolerance:g} of their largest entry:", lines)


def assert_trees_all_equal(actual: Tree, expected: Tree) -> None:
    """Every leaf is equal bit for bit (a NaN equals none)."""
    pairs = _pairs(actual, expected)
    _fail("leaves differ in shape:", _wrong_shapes(pairs))
    lines = [f"{path}: {int((a != b).sum())} of {b.numel()}, {_worst(a, b)}" for path, a, b in pairs if not torch.equal(a, b)]
    _fail(f"{len(lines)} of {len(pairs)} leaves are not equal:", lines)


def _worst(a: Tensor, b: Tensor) -> str:
    """Where two tensors of one shape differ most, and by what values."""
    gap = (a.detach().to(torch.float64) - b.detach().to(torch.float64)).abs().nan_to_num(nan=float("inf"))
    where = torch.unravel_index(gap.argmax(), gap.shape) if gap.dim() else ()
    place = ", ".join(str(int(i)) for i in where)
    return f"at [{place}]: {a[tuple(where)].item():.6g}, expected {b[tuple(where)].item():.6g}"


def assert_shape(x: Tensor, shape: Sequence[int | None]) -> None:
    """`x` has this shape; None stands for any size."""
    if x.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True)):
        raise AssertionError(f"shape {tuple(x.shape)}, expected {tuple('any' if n is None else n for n in shape)}")


def assert_dtype(values: Tree, dtype: torch.dtype) -> None:
    """Every leaf has this dtype."""
    _fail(f"leaves are not {dtype}:", [f"{p}: {x.dtype}" for p, x in tree.to_paths(values).items() if x.dtype != dtype])


def assert_placement(sh: Sharding, x: Tensor, names: str, kind: Kind | None = None, leaf: str | None = None) -> None:
    """A local tensor has the shape of its piece, and ranks that hold the same piece hold equal values.

    Sizes are those bound to `sh`; a name without a size may have any. Values are compared where one process holds all
    ranks. `leaf` is a name for the message.
    """
    place, what = sh.placement(names, kind, leaf), leaf or f"[{names}]"
    shape: list[int | None] = [sh.mesh.size] if sh.mesh.stacked else []
    for name, axes in zip(place.names, place.axes, strict=True):
        shards = 1
        for axis in axes:
            shards *= sh.mesh[axis].size
        size = sh.sizes.get(name)
        whole = size.padded(shards) if isinstance(size, Size) else size
        shape.append(None if whole is None else whole // shards)
    try:
        assert_shape(x, shape)
    except AssertionError as wrong:
        raise AssertionError(f"{what} placed {place}: {wrong}") from None
    if not sh.mesh.stacked:
        return
    first: dict[tuple[int, ...], int] = {}
    for rank in range(sh.mesh.size):
        here = sh.mesh.coordinates(rank)
        piece = tuple(here[axis.name] for axis in sh.mesh.axes if axis.name in place.placed)
        twin = first.setdefault(piece, rank)
        if not torch.equal(x[rank], x[twin]):
            raise AssertionError(f"{what} placed {place}: ranks {twin} and {rank} hold one piece, with different values")


class assert_max_traces:
    """`fn`, raising AssertionError when its Python runs for the n+1st time: a compiled or cached function runs it once.

    `count` says how often it ran.
    """

    def __init__(self, fn: Callable[..., Any], n: int) -> None:
        self.fn, self.n, self.count = fn, n, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Count, and run it."""
        self.count += 1
        if self.count > self.n:
            name = getattr(self.fn, "__name__", repr(self.fn))
            raise AssertionError(f"{name} was traced {self.count} times, at most {self.n} were expected")
        return self.fn(*args, **kwargs)
