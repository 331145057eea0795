"""Where gradients gather: one buffer a leaf, in the parameter's dtype, over all microbatches of a step.

A leaf that the optimizer holds sharded gets its gradient by reduce_scatter as soon as a block has it; a leaf held whole is
added up locally and reduced once, at the end. How many collectives that is, is written in the leaves' plans.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fmegatron import tree
from fmegatron.models.model import Node
from fmegatron.sharding import Sharding
from fmegatron.sharding.bucket import Wire, run_together, start
from fmegatron.train.leaves import BUCKET, Leaf
from fmegatron.train.precision import PLAIN, Precision, inverse
from fmegatron.train.weights import node_leaves
from fmegatron.tree import Tree


class Gradients:
    """Accumulators for a step; `add` a node's gradients, microbatch by microbatch, then `finish`."""

    def __init__(
        self,
        sh: Sharding,
        leaves: dict[str, Leaf],
        params: dict[str, Tensor],
        wire: Wire | None = None,
        precision: Precision = PLAIN,
        behind: bool = True,
    ) -> None:
        self.sh, self.leaves, self.wire, self.behind = sh, leaves, wire, behind
        self.dtypes = {path: precision.sums(x.dtype) for path, x in params.items()}
        self.sums: dict[str, Tensor] = {}
        self.seen: set[tuple[str, int | None]] = set()
        self.owned: set[str] = set()  # unstacked leaves whose sum is a tensor of our own
        self.pending: Callable[[], None] | None = None

    def add(self, node: Node, grads: Tree) -> None:
        """Add one node's gradients, as they lie in use; a reduce_scatter goes on until the next call, or ends here.

        The caller gives them away: their bytes go as soon as they are in their bucket.
        """
        own = node_leaves(node, self.leaves)
        values = tree.to_paths(grads)
        del grads
        self.flush()  # before another bucket is made: two would be memory
        given = ((values.pop(name), leaf) for name, leaf in own.items())
        shards = (x.to(self.dtypes[leaf.path]) if leaf.scatter else x for x, leaf in given)
        finish = start(shards, [leaf.scatter for leaf in own.values()], self.sh.rank, wire=self.wire)

        def store() -> None:
            for leaf, x in zip(own.values(), finish(None), strict=True):
                self._store(leaf, node.layer if leaf.stacked else None, x)

        if self.behind and any(leaf.scatter for leaf in own.values()):
            self.pending = store
        else:
            store()

    def moves(self, node: Node) -> bool:
        """Whether `add` communicates for a node."""
        return any(leaf.scatter for leaf in node_leaves(node, self.leaves).values())

    def flush(self) -> None:
        """Wait for the reduction under way."""
        if self.pending is not None:
            self.pending()
            self.pending = None

    def _store(self, leaf: Leaf, layer: int | None, x: Tensor) -> None:
        path, dtype = leaf.path, self.dtypes[leaf.path]
        first = (path, layer) not in self.seen
        self.seen.add((path, layer))
        if layer is None and first:
            self.sums[path] = x.to(dtype)  # no copy of what may be a whole table; it may be seen elsewhere, so ...
            return
        if layer is None and path not in self.owned:
            self.sums[path] = self.sums[path] + x.to(dtype)  # ... the first sum is a new tensor, and is added to from then on
            self.owned.add(path)
            return
        if path not in self.sums:
            # made from a gradient: under a vmap it then has every dim that gradients have
            self.sums[path] = x.new_empty((leaf.param.layers or 0, *x.shape), dtype=dtype)
        total = self.sums[path] if layer is None else self.sums[path][layer]
        if first:
            total.copy_(x)
        else:
            total.add_(x)

    def finish(self, like: Tree, scale: Tensor | None = None) -> Tree:
        """The step's gradients, as the optimizer holds its state, in a tree like `like`; divided by the loss's scale."""
        self.flush()
        paths = list(self.leaves)
        missing = [path for path in paths if path not in self.sums]
        assert not missing, f"no node reads the parameter(s) {', '.join(missing)}"
        sums, plans = [self.sums[p] for p in paths], [self.leaves[p].finish for p in paths]
        done = run_together(sums, plans, self.sh.rank, BUCKET, self.wire)
        if scale is not None:
            self.sums.clear()
            del sums
            by = inverse(scale)
            for i, x in enumerate(done):  # one leaf's memory more, not all of them
                done[i] = x * by.to(x.dtype)
                del x
        return tree.unflatten(tree.flatten(like)[1], done)
