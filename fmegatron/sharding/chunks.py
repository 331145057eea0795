"""A global tensor as the pieces of it that lie here: boxes inside the true shape, with no mesh and no rules in them.

Files and meshes meet in this form: what any placement wrote as boxes, any other placement reads into its own. A virtual
mesh, which holds every rank's pieces in one process, is the same case as one rank of many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fmegatron.sharding.mesh import Mesh
from fmegatron.sharding.placement import Placement

Offsets = tuple[int, ...]
Box = tuple[Offsets, tuple[int, ...]]  # offsets, sizes


@dataclass(frozen=True, eq=False)
class Chunks:
    """One global tensor, and the pieces of it that this process holds.

    shape: the true (unpadded) global shape. pieces: (offsets, tensor) boxes inside it: none, one or many; also views.
    To save, the pieces of all processes together hold each element once: a replicated piece is given by one owner.
    To load, any boxes, also overlapping ones; they are filled in place.
    """

    shape: tuple[int, ...]
    pieces: tuple[tuple[Offsets, Tensor], ...]

    def boxes(self, key: str) -> list[Box]:
        """Where the pieces lie; ValueError, naming `key`, where one does not lie inside the shape."""
        for offsets, tensor in self.pieces:
            if not len(offsets) == tensor.ndim == len(self.shape) or any(
                start < 0 or start + length > size
                for start, length, size in zip(offsets, tensor.shape, self.shape, strict=True)
            ):
                piece = f"piece of shape {tuple(tensor.shape)} at {tuple(offsets)}"
                raise ValueError(f"{key}: a {piece} does not lie inside the global shape {tuple(self.shape)}")
        return [(tuple(offsets), tuple(tensor.shape)) for offsets, tensor in self.pieces]


def whole(tensor: Tensor) -> Chunks:
    """The chunks of a tensor that lies here in one piece."""
    return Chunks(tuple(tensor.shape), (((0,) * tensor.ndim, tensor),))


def chunks_of(x: Tensor, place: Placement, true: tuple[int, ...], mesh: Mesh, copies: bool = False) -> Chunks:
    """The boxes of a global tensor of shape `true` that lie here as `place` says, pads cut off.

    Where one process holds all ranks x is [ranks, *local]. What several ranks hold is given by the one whose coordinate
    is 0 on every unplaced axis; copies: by all of them, as loading wants it.
    """
    found = []
    for coordinates, local in _ranks(x, mesh):
        if not copies and any(at and axis not in place.placed for axis, at in coordinates.items()):
            continue
        offsets = []
        for dim, (axes, size) in enumerate(zip(place.axes, true, strict=True)):
            shard = 0
            for axis in axes:
                shard = shard * mesh[axis].size + coordinates[axis]
            start = min(shard * local.shape[dim], size)
            local = local.narrow(dim, 0, min(local.shape[dim], size - start))
            offsets.append(start)
        found.append((tuple(offsets), local))
    return Chunks(true, tuple(found))


def _ranks(x: Tensor, mesh: Mesh) -> Iterator[tuple[dict[str, int], Tensor]]:
    """(coordinates, local tensor) of every rank that this process holds."""
    if mesh.stacked:
        yield from ((mesh.coordinates(rank), x[rank]) for rank in range(mesh.size))
    else:
        yield ({} if mesh.rank is None else mesh.coordinates(mesh.rank)), x


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None where that is nothing."""
    starts = tuple(map(max, a[0], b[0]))
    sizes = tuple(min(i + n, j + m) - at for i, n, j, m, at in zip(*a, *b, starts, strict=True))
    return (starts, sizes) if all(n > 0 for n in sizes) else None


def inside(box: Box, outer: Offsets) -> tuple[slice, ...]:
    """Slices of a box inside a piece that starts at `outer`."""
    return tuple(slice(start - at, start - at + n) for start, n, at in zip(*box, outer, strict=True))


def check_tiling(key: str, shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """ValueError unless each element lies in one box: no two boxes overlap, and their volumes sum to the whole."""
    axis = max(range(len(shape)), key=lambda dim: len({offsets[dim] for offsets, _ in boxes}), default=None)
    if axis is not None:
        active: list[Box] = []  # boxes that the sweep along `axis` has not left yet
        for box in sorted(boxes, key=lambda box: box[0][axis]):
            active = [other for other in active if other[0][axis] + other[1][axis] > box[0][axis]]
            for other in active:
                if overlap(box, other) is not None:
                    places = f"{other[0]}+{other[1]} and {box[0]}+{box[1]}"
                    raise ValueError(f"{key}: the pieces {places} overlap; a replicated piece has one owner")
            active.append(box)
    volume, total = sum(math.prod(sizes) for _, sizes in boxes), math.prod(shape)
    if volume != total:
        raise ValueError(f"{key}: the pieces hold {volume} of the {total} elements of {tuple(shape)}")
