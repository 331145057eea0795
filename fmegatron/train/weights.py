"""A block's parameters in use, for as long as it runs: gathered a block ahead, freed behind.

`Weights` walks the visits that a step will make to nodes, in order. Each visit hands out the node's parameters as they lie
in use; the gather of the next visit's is already under way. What was gathered (or cast) is freed when the node is left:
its bytes go, its tensors stay, so that a backward graph that saved them works again once `restore` has filled them.
Weights of products of 8 bits travel in 8 bits where their scales allow it (lowgather.py).
A `Reshard` names the nodes that are not freed before their backward is over: memory for half of the gathers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.kernels.quantize import Recipe, eight_bits, largest_of, tops
from fmegatron.models.lower import AMAX
from fmegatron.models.model import Node
from fmegatron.nn.lowbits import PAYLOAD, TOP
from fmegatron.sharding import Sharding
from fmegatron.sharding.bucket import Finish, start
from fmegatron.train.leaves import Leaf
from fmegatron.train.lowgather import EIGHT, Counts, gathered_tops, travels, travels_low
from fmegatron.tree import Tree

Key = tuple[str, int | None]  # a leaf's path, and the layer where it is stacked


def node_leaves(node: Node, leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    """{path inside the node's parameters: leaf}, for what a node reads."""
    own: dict[str, Leaf] = {}
    for name, path in node.params:
        for full, leaf in leaves.items():
            if full == path or full.startswith(path + "."):
                inner = full[len(path) + 1 :]
                own[".".join(part for part in (name, inner) if part)] = leaf
    return own


def gathered_low(sh: Sharding, chain: Sequence[Node], leaves: dict[str, Leaf]) -> dict[str, tuple[str, ...]]:
    """{path: a note} for leaves that are multiplied in few bits and gathered: whether they travel so."""
    found: dict[str, tuple[str, ...]] = {}
    for node in chain:
        own = node_leaves(node, leaves)
        for name, recipe in node.low:
            if own[name].gather:
                how = travels(sh, recipe, own[name])
                found[own[name].path] = (f"gathered whole: {how}" if isinstance(how, str) else EIGHT,)
    return found


@dataclass(frozen=True)
class Reshard:
    """Which nodes' gathered parameters are freed after the forward: the embedding's and the first `layers` layers'."""

    layers: float = float("inf")  # 0: none at all

    def frees(self, node: Node) -> bool:
        """Whether it is freed after its forward."""
        return self.layers > 0 and node.index <= self.layers


ALWAYS = Reshard()


def parse_reshard(text: str) -> Reshard:
    """The policy of a name; raises ValueError naming the legal ones."""
    count = text.removeprefix("first-")
    if text.startswith("first-") and count.isdigit() and int(count) > 0:
        return Reshard(int(count))
    if text not in ("always", "never"):
        raise ValueError(f"reshard is always, never, or first-K (first-8: the later layers stay gathered), not {text!r}")
    return ALWAYS if text == "always" else Reshard(0)


class Weights:
    """Parameters of the planned visits' nodes, one visit after the other, gathered `ahead` visits early."""

    def __init__(
        self,
        sh: Sharding,
        leaves: dict[str, Leaf],
        params: dict[str, Tensor],
        dtype: torch.dtype | None,
        ahead: int,
        free: bool,
        reshard: Reshard = ALWAYS,
        hold: bool = False,
    ) -> None:
        self.sh, self.leaves, self.params, self.dtype, self.free = sh, leaves, params, dtype, free
        self.reshard, self.hold = reshard, hold
        self.kept: dict[int, Tree] = {}  # by a node's number: gathered, and not freed before its backward
        self.visits: deque[Node] = deque()
        self.ahead = ahead
        self.pending: deque[tuple[Node, Finish]] = deque()
        self.whole: dict[str, Tensor] = {}  # leaves that need no gather, cast once for the whole step
        self.tops: dict[Key, tuple[Tensor, Tensor]] = {}  # largest values of what goes, and comes, in 8 bits

    def plan(self, visits: Sequence[Node]) -> None:
        """Add visits to come."""
        self.visits.extend(visits)
        low, histories = dict[Key, tuple[Leaf, Counts]](), dict[Key, tuple[Leaf, Tensor, Recipe]]()
        for node in visits:
            own = node_leaves(node, self.leaves)
            for name, leaf in own.items():
                how, key = travels_low(self.sh, node, name, leaf), (leaf.path, node.layer)
                if how is not None and key not in self.tops:
                    low[key] = leaf, how[1]
                    if how[0].name == "delayed":
                        history = own[name + AMAX]
                        histories[key] = history, self._local(history, node.layer), how[0]
        if low:
            mine = {key: largest_of(self._cast(tops(self._local(leaf, key[1]), counts), leaf))
                    for key, (leaf, counts) in low.items()}  # fmt: skip
            self.tops |= gathered_tops(self.sh, mine, low, histories)

    def _local(self, leaf: Leaf, layer: int | None) -> Tensor:
        x = self.params[leaf.path]
        return x[layer] if leaf.stacked and layer is not None else x

    def _sent(self, name: str, leaf: Leaf, node: Node) -> Tensor:
        x, how = self._stored(leaf, node), travels_low(self.sh, node, name, leaf)
        return x if how is None else eight_bits(x, self.tops[leaf.path, node.layer][0], how[0])

    def _stored(self, leaf: Leaf, node: Node) -> Tensor:
        x = self.params[leaf.path]
        if not leaf.gather:
            if leaf.path not in self.whole:
                self.whole[leaf.path] = self._cast(x, leaf)
            x = self.whole[leaf.path]
        if leaf.stacked:
            assert node.layer is not None
            x = x[node.layer]
        return self._cast(x, leaf)

    def _cast(self, x: Tensor, leaf: Leaf) -> Tensor:
        return x.to(self.dtype) if self.dtype is not None and x.is_floating_point() and not leaf.param.exact else x

    def _start_more(self) -> None:
        while self.visits and len(self.pending) <= self.ahead:
            node = self.visits.popleft()
            own = node_leaves(node, self.leaves)
            shards = [self._sent(name, leaf, node) for name, leaf in own.items()]
            self.pending.append((node, start(shards, [leaf.gather for leaf in own.values()], self.sh.rank)))

    def take(self, node: Node) -> Tree:
        """The parameters of the next visit, which must be to `node`; or what was kept of its last one."""
        if node.index in self.kept:
            return self.kept[node.index]
        found: dict[str, Tensor] = {}
        for (name, leaf), x in zip(node_leaves(node, self.leaves).items(), self._next(node)(None), strict=True):
            if travels_low(self.sh, node, name, leaf) is None:
                found[name] = x
            else:  # in place of the weight stands what has its shape and gradient, without memory
                found[name + PAYLOAD], found[name + TOP] = x, (top := self.tops[leaf.path, node.layer][1])
                dtype = self.dtype or self.params[leaf.path].dtype
                found[name] = torch.zeros_like(top.reshape(-1)[0], dtype=dtype).expand(x.shape)
        own: Tree = tree.from_paths(found)
        if self.keeps(node):
            self.kept[node.index] = own
        return own

    def leave(self, node: Node, own: Tree, done: bool = False) -> None:
        """Free the bytes of what was gathered for a node; of one that is kept, once its backward is done (hold: never)."""
        if self.keeps(node) and (self.hold or not done):
            return
        self.kept.pop(node.index, None)
        for x in self._freeable(node, own):
            x.untyped_storage().resize_(0)

    def restore(self, node: Node, own: Tree) -> None:
        """Gather a node's parameters again, into the tensors that were freed."""
        finish, freed = self._next(node), self._freeable(node, own)
        for x in freed:
            last = x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            x.untyped_storage().resize_(int(last + 1) * x.element_size())
        ready = iter(freed)
        finish([next(ready) if leaf.gather else None for leaf in node_leaves(node, self.leaves).values()])

    def _next(self, node: Node) -> Finish:
        """The gather of the next visit, which must be to `node`, and which is under way; others are started behind it."""
        self._start_more()
        planned, finish = self.pending.popleft()
        assert planned is node, "the step left its planned order of visits"
        return finish

    def _freeable(self, node: Node, own: Tree) -> list[Tensor]:
        if not self.free:
            return []
        values: dict[str, Any] = tree.to_paths(own)
        every = node_leaves(node, self.leaves).items()
        low = {name for name, leaf in every if travels_low(self.sh, node, name, leaf)}
        return [values[name + PAYLOAD if name in low else name] for name, leaf in every if leaf.gather]

    def keeps(self, node: Node) -> bool:
        """Whether a node's parameters stay gathered from its forward to its backward."""
        return self._needs_again(node) and not self.reshard.frees(node)

    def frees(self, node: Node) -> bool:
        """Whether a node's backward finds its parameters gone and needs them again."""
        return self._needs_again(node) and self.free and self.reshard.frees(node)

    def _needs_again(self, node: Node) -> bool:
        gathers = any(leaf.gather for leaf in node_leaves(node, self.leaves).values())
        return gathers and not node.linear and not node.chunks
