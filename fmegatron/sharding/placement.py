"""Placements: where a tensor's named dims lie on a mesh, as a total function of names and sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fmegatron.sharding.rules import Rule


@dataclass(frozen=True)
class Size:
    """A dim of `n` that may be padded up to a multiple of `pad_to` (and of its number of shards)."""

    n: int
    pad_to: int = 1

    def padded(self, shards: int = 1) -> int:
        """The size with pads, divisible by `shards`."""
        multiple = math.lcm(self.pad_to, shards)
        return -(-self.n // multiple) * multiple


@dataclass(frozen=True)
class Placement:
    """Names of the dims in order, the mesh axes of each (outer to inner), and axes on which the value is partial.

    pads: for each dim the zeros that follow it so that its axes divide it; () is none. Only dims that lie over wildcards' axes
    alone have any: what is gathered over these has none.
    Along a mesh axis a value is sharded (the axis is in `axes`), partial (in `partial`: the true value is the sum over the
    ranks) or replicated (in neither).
    """

    names: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]
    partial: frozenset[str] = frozenset()
    pads: tuple[int, ...] = ()

    def pad(self, dim: int) -> int:
        """The pads of one dim, by its number."""
        return self.pads[dim] if self.pads else 0

    def of(self, name: str) -> tuple[str, ...]:
        """The mesh axes of one dim."""
        return self.axes[self.names.index(name)]

    @property
    def placed(self) -> frozenset[str]:
        """Mesh axes over which the tensor is sharded."""
        return frozenset(axis for axes in self.axes for axis in axes)

    def __str__(self) -> str:
        pads = [f"+{pad}" if pad else "" for pad in self.pads or (0,) * len(self.names)]
        parts = zip(self.names, self.axes, pads, strict=True)
        dims = " ".join(n + (f":{'·'.join(a)}{pad}" if a else "") for n, a, pad in parts)
        return dims + (f" +{'+'.join(sorted(self.partial))}" if self.partial else "")


Sizes = Mapping[str, int | Size]


def parse_names(text: str) -> tuple[str, ...]:
    """ "batch seq embed" -> ("batch", "seq", "embed"); raises ValueError on a name that comes twice."""
    names = tuple(text.split())
    if len(set(names)) != len(names):
        raise ValueError(f"a dim name comes twice in {text!r}: every dim of a tensor needs a name of its own")
    return names


def place(
    names: tuple[str, ...],
    rules: Iterable[Rule],
    mesh: Mapping[str, int],
    sizes: Sizes,
    leaf: str | None = None,
) -> Placement:
    """Walk the rules in order and give each name the mesh axes still free in this tensor.

    mesh: {axis: ranks}. sizes: known sizes by name; a name without a size is taken to divide.
    Raises ValueError, naming leaf, dim, size, axis and the nearest legal choice, where a required rule does not divide.
    """
    given: dict[str, list[str]] = {name: [] for name in names}
    taken: set[str] = set()
    ruled: set[str] = set()  # names that have axes of lines of their own: only others are padded, at the end of the whole dim

    def shards(name: str) -> int:
        return math.prod(mesh[axis] for axis in given[name])

    def divides(name: str, axis: str) -> bool:
        size = sizes.get(name)
        if size is None:
            return True
        total = shards(name) * mesh[axis]
        return (size.padded(total) if isinstance(size, Size) else size) % total == 0

    for name, axes in rules:
        for text in axes:
            axis, optional = text.rstrip("?"), text.endswith("?")
            if mesh.get(axis, 1) == 1 or axis in taken:
                continue
            if name == "*":
                target = _largest(names, given, sizes, mesh, axis) or _padded(names, given, ruled, sizes, mesh, axis)
                if target is not None:
                    given[target].append(axis)
                    taken.add(axis)
            elif name in given:
                if optional and name not in sizes:
                    raise ValueError(f"rule ({name!r}, {text!r}) is optional, so the size of {name!r} must be known: bind it")
                if divides(name, axis):
                    given[name].append(axis)
                    ruled.add(name)
                elif not optional:
                    raise ValueError(_indivisible(leaf, names, name, sizes[name], axis, mesh[axis], shards(name)))
                taken.add(axis)  # also where skipped: the tensor is then replicated on this axis
    pads = tuple(-_whole(sizes[name]) % shards(name) if given[name] and name not in ruled else 0 for name in names)
    return Placement(names, tuple(tuple(given[name]) for name in names), pads=pads if any(pads) else ())


def _whole(size: int | Size) -> int:
    return size.padded() if isinstance(size, Size) else size


UNSHARDED = ("layers", "router_expert")  # the wildcard leaves these whole: a block takes slices of them, or all of few


def _largest(
    names: tuple[str, ...], given: Mapping[str, list[str]], sizes: Sizes, mesh: Mapping[str, int], axis: str
) -> str | None:
    """The largest dim that a wildcard may put on `axis`; None where no dim divides."""
    best, best_size = None, 0
    for name in names:
        size = sizes.get(name)
        if size is None or name in UNSHARDED:
            continue
        whole = _whole(size)
        shards = math.prod(mesh[a] for a in given[name])
        if whole % (shards * mesh[axis]) == 0 and whole // shards > best_size:
            best, best_size = name, whole // shards
    return best


def _padded(
    names: tuple[str, ...], given: Mapping[str, list[str]], ruled: set[str], sizes: Sizes, mesh: Mapping[str, int], axis: str
) -> str | None:
    """The largest dim that a wildcard may put on `axis` with pads; None where each has fewer elements than ranks."""
    best, most = None, mesh[axis] - 1
    for name in names:
        size = sizes.get(name)
        if size is None or name in UNSHARDED or name in ruled:
            continue
        here = _whole(size) // math.prod(mesh[a] for a in given[name])
        if here > most:
            best, most = name, here
    return best


def _indivisible(
    leaf: str | None, names: tuple[str, ...], name: str, size: int | Size, axis: str, ranks: int, others: int
) -> str:
    """One line: what does not divide, and the nearest sizes of the mesh axis that do."""
    n = size.n if isinstance(size, Size) else size
    legal = [k for k in range(1, n + 1) if n % (k * others) == 0]
    nearest = sorted(legal, key=lambda k: (abs(k - ranks), k))[:2]
    where = f"{leaf}: " if leaf else ""
    over = f" (and {others} shards of other axes)" if others > 1 else ""
    hint = " or ".join(f"{axis}={k}" for k in sorted(nearest))
    hint = f"{hint}, or" if hint else ""
    return (
        f"{where}dim {name!r} of [{' '.join(names)}] has size {n}, which does not divide over mesh axis {axis!r} of "
        f"{ranks}{over}: use {hint} make the rule optional ({axis + '?'!r})"
    )
