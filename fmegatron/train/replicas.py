"""Whether ranks that should hold the same parameters do: a hash of each leaf, compared over the axes it is not placed on.

A bit that flipped in one replica's memory, or a rank that updated otherwise, trains on unseen: losses look fine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.kernels.bits import same_bits
from fmegatron.models.model import Model
from fmegatron.sharding import Sharding, spmd
from fmegatron.sharding.collectives import Pmax
from fmegatron.sharding.relayout import run
from fmegatron.train.leaves import Leaf, plan_leaves
from fmegatron.train.pipeline.stages import Placed
from fmegatron.train.state import over_ranks
from fmegatron.train.together import together
from fmegatron.tree import Tree

PIECE = 1 << 22  # elements hashed at a time: their indices are 64 bit


def make_check(model: Model, sh: Sharding, placed: Placed | None = None) -> Callable[[Tree], None]:
    """`check(params)` on local shards: RuntimeError, on every rank, naming the leaves and mesh axes whose copies differ.

    placed: of stages on processes of their own, whose model and sharding these are.
    """
    sh = sh.bind(model.sizes)
    leaves = plan_leaves(model, sh)

    def on_rank(here: Sharding, params: Tree) -> Tensor:
        return over_ranks(here, disagreements(here, leaves, params).long(), Pmax)

    run_check = spmd(sh, on_rank)

    def check(params: Tree) -> None:
        with torch.no_grad():
            wrong = run_check(params)
        wrong = wrong[0] if sh.mesh.stacked else wrong
        found = [(path, axis.name) for (path, row) in zip(leaves, wrong, strict=True)
                 for axis, bad in zip(sh.mesh.axes, row.tolist(), strict=True) if bad]  # fmt: skip
        if placed is not None and placed.rank is not None:
            found = together(lambda: (found, shared_hashes(placed, params)), between_stages)
        if found:
            path, axis = found[0]
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            where = f"{path} is not the same on all ranks of mesh axis {axis!r}{more}"
            raise RuntimeError(f"replicas differ: {where}; go back to the last checkpoint")

    return check


Found = list[tuple[str, str]]  # leaf, mesh axis
Hashes = dict[tuple[str, tuple[int, ...]], int]


def shared_hashes(placed: Placed, params: Tree) -> Hashes:
    """{(leaf, coordinates on all axes but pp): hash} of what several stages hold, as this process has it."""
    here = placed.mesh.coordinates(placed.mesh.rank or 0)
    place = tuple(at for axis, at in here.items() if axis != "pp")
    return {(path, place): int(hash_of(x)) for path, x in tree.to_paths(params).items() if path in placed.holders}


def between_stages(said: list[tuple[Found, Hashes]]) -> Found:
    """What every process found, and the leaves whose copies differ from stage to stage."""
    first: Hashes = {}
    found = [one for own, _ in said for one in own]
    for _, hashes in said:
        found += [(key[0], "pp") for key, value in hashes.items() if first.setdefault(key, value) != value]
    return list(dict.fromkeys(found))


def disagreements(sh: Sharding, leaves: dict[str, Leaf], params: Tree) -> Tensor:
    """[leaves, axes] bool on one rank: whether copies of a stored leaf along an axis have different bits."""
    hashes = torch.stack([hash_of(x) for x in tree.leaves(params)])
    differs = []
    for axis in sh.mesh.axes:
        highest, lowest = (sign * run(sign * hashes, sh.rank, [Pmax(axis)] if axis.size > 1 else []) for sign in (1, -1))
        whole = [axis.name not in leaf.storage.placed and axis.name != sh.rules.apart for leaf in leaves.values()]
        differs.append((highest != lowest) & torch.tensor(whole, device=hashes.device))
    return torch.stack(differs, 1)


def hash_of(x: Tensor) -> Tensor:
    """A 62-bit hash of a tensor's bits and their order: 0-D int64; not cryptographic."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    total = x.new_zeros((), dtype=torch.int64)
    for number, piece in enumerate(same_bits(x.contiguous(), words).reshape(-1).split(PIECE)):
        index = torch.arange(piece.shape[0], device=x.device) + number * PIECE
        odd = (index * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E019) | 1  # a factor of its own for each place
        total = total + ((piece.long() + 0x5851F42D4C957F2D) * odd).sum()
    return total >> 2  # its negative must exist
