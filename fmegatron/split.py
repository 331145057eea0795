"""A block's backward in two halves: the gradients that others wait for, then those of its own parameters.

    values, moving, pullback = SPLIT.vjp(block, {"own": weights, "reads": inputs}, rest)
    grads = pullback.early(cotangents)     {"reads": ...}    of the inputs; no product that only a weight needs
    grads = pullback.late()                {"own": ...}      of the weights; no product that an input needed

The autograd graph is cut where the way to a weight leaves the way to an input: at a product x w both need the cotangent of
the result, which `early` computes and keeps, and each half then runs one of the two products. A weight that several
products use has its gradient early. (Zero bubble: Qi 2023, arXiv 2401.10241; torch.distributed.pipelining does it with hooks.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fmegatron import tree
from fmegatron.transforms import Autograd, Block, Derivative, Engine
from fmegatron.tree import Tree

Edge = tuple[Node, int]  # into a node of the graph: the node, and which of its inputs in the backward


def edge_of(x: Tensor) -> Edge:
    """The edge on which a tensor's gradient travels."""
    return get_gradient_edge(x)[:2]


def gradients(roots: Sequence[Edge], asked: Sequence[Edge], given: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What arrives at the asked edges when `given` starts at the roots; the graph can be used again."""
    start, end = ([GradientEdge(*edge) for edge in edges] for edges in (roots, asked))
    return torch.autograd.grad(start, end, given, allow_unused=True, retain_graph=True)


@dataclass(frozen=True)
class Split(Autograd):
    """Autograd whose pullback is a `Halves`, over blocks whose `wrt` is {"own": ..., "reads": ...}."""

    @property
    def light(self) -> Engine:
        """Itself."""
        return self

    def vjp(self, fn: Block, wrt: Tree, rest: Tree, kind: Hashable = None) -> Derivative:
        """As Autograd's."""
        leaves, spec = tree.flatten(wrt)
        leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
        with torch.enable_grad():
            out = self.call(fn, spec, leaves, rest, kind)
        outputs = {name: y for name, y in out.items() if y.requires_grad}
        late = len(tree.leaves(wrt["own"]))  # keys are sorted: own comes before reads
        return {name: y.detach() for name, y in out.items()}, frozenset(outputs), Halves(outputs, leaves, spec, late)


class Halves:
    """A pullback that can be run in two halves, once; or whole, by a call."""

    def __init__(self, outputs: dict[str, Tensor], leaves: list[Tensor], spec: Any, late: int) -> None:
        self.outputs, self.leaves, self.spec = outputs, leaves, spec
        self.own, self.reads = leaves[:late], leaves[late:]
        self.grads: list[Tensor | None] = [None] * len(leaves)
        self.done: set[int] = set()
        self.kept: list[tuple[list[Edge], list[Edge], list[Tensor]]] = []
        self.direct: list[tuple[Edge, Tensor]] = []

    def __call__(self, cotangents: Mapping[str, Tensor]) -> Tree:
        """All gradients at once."""
        names = [name for name in self.outputs if name in cotangents]
        moving = [i for i, leaf in enumerate(self.leaves) if leaf.requires_grad]
        found = torch.autograd.grad(
            [self.outputs[name] for name in names],
            [self.leaves[i] for i in moving],
            [cotangents[name].to(self.outputs[name].dtype) for name in names],
            allow_unused=True,
        )
        for i, x in zip(moving, found, strict=True):
            self.grads[i] = x
        return self._tree()

    def _tree(self) -> Tree:
        filled = [torch.zeros_like(leaf) if x is None else x for x, leaf in zip(self.grads, self.leaves, strict=True)]
        return tree.unflatten(self.spec, filled)

    def early(self, cotangents: Mapping[str, Tensor]) -> Tree:
        """Gradients of "reads"; of "own", those that could not wait, and zeros."""
        names = [name for name in self.outputs if name in cotangents]
        roots = [edge_of(self.outputs[name]) for name in names]
        given = [cotangents[name].to(self.outputs[name].dtype) for name in names]
        cut = cut_graph(roots, *([edge_of(x) for x in xs if x.requires_grad] for xs in (self.reads, self.own)))
        now = [i for i, x in enumerate(self.leaves) if x.requires_grad and (i >= len(self.own) or edge_of(x) in cut.shared)]
        asked = [edge_of(self.leaves[i]) for i in now] + [edge for edges, _ in cut.products for edge in edges]
        values = dict(zip(asked, gradients(roots, asked, given) if asked else (), strict=True))
        for i in now:
            self.grads[i] = values[edge_of(self.leaves[i])]
        self.done = set(now)
        for edges, children in cut.products:
            pairs = [(edge, x) for edge in edges if (x := values[edge]) is not None]
            if pairs:
                self.kept.append(([edge for edge, _ in pairs], children, [x for _, x in pairs]))
        self.direct = [(roots[i], given[i]) for i in cut.direct]
        return self._tree()

    def late(self) -> Tree:
        """Gradients of "own"."""
        reached = list(self.direct)
        for edges, children, given in self.kept:
            found = gradients(edges, children, given)
            reached += [(edge, x) for edge, x in zip(children, found, strict=True) if x is not None]
        moving = [i for i, leaf in enumerate(self.own) if leaf.requires_grad and i not in self.done]
        if reached and moving:
            roots, given = [edge for edge, _ in reached], [x for _, x in reached]
            asked = [edge_of(self.own[i]) for i in moving]
            for i, x in zip(moving, gradients(roots, asked, given), strict=True):
                self.grads[i] = x
        self.kept, self.direct, self.outputs = [], [], {}
        return self._tree()


@dataclass(frozen=True)
class Cut:
    """products: (edges into a node that leads to both kinds of leaves, its edges on the way to late ones only).

    shared: late leaves that several products lead to, by their edges. direct: numbers of roots that lead to late leaves only.
    """

    products: list[tuple[list[Edge], list[Edge]]]
    shared: frozenset[Edge]
    direct: list[int]


def cut_graph(roots: Sequence[Edge], early: Sequence[Edge], late: Sequence[Edge]) -> Cut:
    """Where a graph is cut between the ways to early and to late leaves."""
    order = _topological(root[0] for root in roots)
    leads = {kind: {node for node, _ in leaves} for kind, leaves in (("early", early), ("late", late))}
    for node in reversed(order):  # children come before their parents
        for nodes in leads.values():
            if any(child in nodes for child, _ in node.next_functions if child is not None):
                nodes.add(node)
    entries: dict[Node, dict[int, None]] = {}
    for child, slot in [*roots, *(edge for node in order for edge in node.next_functions)]:
        if child is not None:
            entries.setdefault(child, {})[slot] = None
    aside = {node: [(child, slot) for child, slot in dict.fromkeys(node.next_functions)
                    if child is not None and child in leads["late"] and child not in leads["early"]]
             for node in order if node in leads["early"]}  # fmt: skip
    uses = Counter(node for edges in aside.values() for node in set(_topological(edge[0] for edge in edges)))
    tangled = set(_topological(node for edges in aside.values() for node, _ in edges if uses[node] > 1))
    products = []
    for node, edges in aside.items():
        if own := [edge for edge in edges if edge[0] not in tangled]:
            products.append(([(node, slot) for slot in entries[node]], own))
    direct = [i for i, root in enumerate(roots) if root[0] in leads["late"] and root[0] not in leads["early"]]
    return Cut(products, frozenset(edge for edge in late if edge[0] in tangled), direct)


def _topological(roots: Iterable[Node]) -> list[Node]:
    """All nodes that roots lead to, each before its children."""
    done: dict[Node, None] = {}
    stack = [(root, False) for root in roots]
    while stack:
        node, left = stack.pop()
        if left:
            done[node] = None
        elif node not in done:
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None and child not in done]
    return list(done)[::-1]


SPLIT = Split()
