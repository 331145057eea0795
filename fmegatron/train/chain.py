"""One forward and backward walk over a model's chain of nodes, with its own say on memory and communication.

    forward    for node in chain:            gather its parameters, run it, keep its graph (or only what it read)
    backward   for node in reversed(chain):  its gradients, given away at once

Not keeping a node's graph is remat, gathering early is prefetch, keeping elsewhere what it saved is offload. A node that may
be cut into parts (the loss) runs backward part by part in the forward walk, so that one part's logits are all that ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fmegatron import random, tree
from fmegatron.models.model import Node, Values
from fmegatron.offload import Offload, Saved, Stash, unpack, watching
from fmegatron.sharding import Sharding
from fmegatron.sharding.moments import joined, numbered
from fmegatron.split import Halves
from fmegatron.train.gradients import Gradients
from fmegatron.train.remat import Remat
from fmegatron.train.weights import Weights
from fmegatron.transforms import FUNC, Engine, Kind, Pullback
from fmegatron.tree import Tree


@dataclass
class Step:
    """What a walk needs beside the batch: set up once a microbatch."""

    sh: Sharding
    engine: Engine
    weights: Weights
    gradients: Gradients
    seeds: Mapping[str, Tensor]
    key: Tensor | None
    offload: Offload = field(default_factory=Offload)  # that of its walk
    cotangents: dict[str, Tensor] = field(default_factory=dict)
    taps: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Ran:
    """A node that ran forward: its parameters, and how to go back."""

    node: Node
    own: Tree
    pullback: Pullback | None
    stash: Stash | None


@dataclass
class Segment:
    """A piece of the chain that ran forward: its nodes' pullbacks, or what it read and will be run again with."""

    nodes: list[Node]
    again: bool
    saved: Mapping[str, Tensor | Saved]
    moving: frozenset[str]
    ran: list[Ran]
    stash: Stash | None


def backward_visits(chain: Sequence[Node], remat: Remat, weights: Weights) -> list[Node]:
    """The order in which a backward walk asks for the nodes' parameters, those left out that are still there."""
    order: list[Node] = []
    for segment, again in reversed(remat.segments(chain)):
        if again:
            order += [node for node in segment if not weights.keeps(node)]
        else:
            order += [node for node in reversed(segment) if weights.frees(node)]
    return order


def visits(chain: Sequence[Node], remat: Remat, weights: Weights) -> list[Node]:
    """The order in which a whole walk asks for them: each node forward, then backward."""
    return list(chain) + backward_visits(chain, remat, weights)


def walk(chain: Sequence[Node], step: Step, batch: Values, remat: Remat, carries: Sequence[str] = ()) -> tuple[Values, Values]:
    """Add the gradients of the loss over a batch to `step.gradients`; returns {"loss.TERM": local sum}, and what it carries."""
    values, _, tape = walk_forward(chain, step, dict(batch), frozenset(), remat)
    losses = {name: x for name, x in values.items() if name.startswith("loss.")}
    carried = carried_of(carries, values)
    del values
    walk_backward(tape, step)
    return losses, carried


def carried_of(carries: Sequence[str], values: Values) -> Values:
    """What the next microbatch is given, of those values that there are."""
    return {name: values[name].detach() for name in carries if name in values}


def walk_forward(
    chain: Sequence[Node], step: Step, values: Values, moving: frozenset[str], remat: Remat
) -> tuple[Values, frozenset[str], list[Segment]]:
    """Run nodes; all values, the names of those that depend on parameters, and what the backward needs."""
    tape: list[Segment] = []
    step.offload = remat.offload(chain)
    for nodes, again in remat.segments(chain):
        reads = {name for node in nodes for name in node.reads} if again else set()
        stash = step.offload.open([x for name, x in values.items() if name not in moving]) if again else None
        saved = {name: stash.pack(x) if stash else x for name, x in values.items() if name in reads}
        tape.append(segment := Segment(nodes, again, saved, moving, [], stash))
        for node in nodes:
            values, moving, done = forward(node, step, values, moving, kept=not again)
            if not again:
                segment.ran.append(done)
            step.weights.leave(node, done.own)
        step.offload.close(stash, values.values())
    step.cotangents.update({name: step.seeds[name.removeprefix("loss.")] for name in values if name.startswith("loss.")})
    return values, moving, tape


def walk_backward(tape: list[Segment], step: Step, pull: Callable[[Ran, Step, bool], None] | None = None) -> None:
    """Pull the step's cotangents back through what ran, the last first, and empty the tape. pull: in place of `backward`."""
    pull = pull or backward
    while tape:
        segment = tape.pop()
        again, nodes, moving, ran, stash = segment.again, segment.nodes, segment.moving, segment.ran, segment.stash
        step.offload.ready(stash)
        saved = {name: unpack(x) for name, x in segment.saved.items()}
        del segment
        for node in nodes if again else ():
            saved, moving, done = forward(node, step, saved, moving, again=True)
            ran.append(done)
        del saved
        while ran:
            one = ran.pop()
            step.offload.ready(one.stash)
            pull(one, step, not again)
            step.offload.done(one.stash)
        step.offload.done(stash)


def forward(
    node: Node, step: Step, values: Values, moving: frozenset[str], again: bool = False, kept: bool = False
) -> tuple[Values, frozenset[str], Ran]:
    """Run one node. moving: names of values that depend on parameters. again: it ran before, and its taps are known. kept:
    until the backward walk, and so are its residuals.
    """
    own = step.weights.take(node)
    reads = node.given(values)
    if node.chunks:
        losses = in_parts(node, step, own, reads, moving)
        return {**values, **losses}, moving, Ran(node, own, None, None)
    fixed = [*tree.leaves(own), *(x for name, x in reads.items() if name not in moving)]
    stash = step.offload.open(fixed) if kept and node.layer is not None else None
    with watching(stash):
        out, moved, pullback = differentiate(node, step, own, reads, moving, again)
    if not again:
        add_taps(step.taps, out, node.index)
    new = {node.outside(name): x for name, x in out.items() if not name.startswith("tap.")}
    if step.engine is not FUNC and (lost := moved & set(new) - set(node.writes)):
        said = f"node {node.index} returns {min(lost)!r}, which depends on parameters"
        raise ValueError(f"{said}: name it among its writes ({', '.join(node.writes)}), or its gradient is lost")
    values = {**values, **new}
    step.offload.close(stash, values.values())
    return values, (moving - set(new)) | (moved & set(new)), Ran(node, own, pullback, stash)


def differentiate(
    node: Node, step: Step, own: Tree, reads: Values, moving: frozenset[str], again: bool = False
) -> tuple[Values, frozenset[str], Pullback | None]:
    """A node's values, the names among them that depend on parameters, and its pullback (None: nothing does). again: nothing
    is watched."""
    key = None if step.key is None else random.fold_in(step.key, node.index)
    wrt: Tree = {"own": own, "reads": {name: x for name, x in reads.items() if name in moving}}
    rest = {"reads": {name: x for name, x in reads.items() if name not in moving}, "rank": step.sh.rank, "key": key}
    inside = step.sh.of_layer(node.index)
    inside = inside.watching(frozenset()) if again and inside.watch else inside

    def block(wrt: Tree, rest: Tree) -> Values:
        taps: dict[str, tuple[str, Tensor]] = {}
        sh = inside.at(rest["rank"]) if rest["rank"] is not None else inside
        out = node.fn(sh.tapping(taps), wrt["own"], {**rest["reads"], **wrt["reads"]}, rest["key"])
        return {**out, **{f"tap.{op}.{name}": x for name, (op, x) in taps.items()}}

    if not tree.leaves(wrt):
        return block(wrt, rest), frozenset(), None
    engine = step.engine.light if node.light else step.engine
    how = (step.sh.recompute, step.sh.chunks, step.sh.kernels, *sorted(inside.watch))
    kind = Kind(node.fn, (inside.layout, *how), f"{node.index} {how}")
    return engine.vjp(block, wrt, rest, kind)


def backward(ran: Ran, step: Step, freed: bool) -> None:
    """Pull cotangents back through a node, and give its gradients away; freed: whether its parameters were left."""
    if ran.pullback is None:
        return
    pullback, ran.pullback = ran.pullback, None
    step.gradients.add(ran.node, probed(ran.node, step, _pull(ran, step, freed, pullback)["own"]))


def _pull(ran: Ran, step: Step, freed: bool, pullback: Pullback) -> Tree:
    if freed and step.weights.frees(ran.node):
        step.weights.restore(ran.node, ran.own)
    mine = {name: step.cotangents.pop(name) for name in ran.node.writes if name in step.cotangents}
    grads = pullback(mine)
    step.weights.leave(ran.node, ran.own, done=True)
    for name, x in grads["reads"].items():
        step.cotangents[name] = step.cotangents[name] + x if name in step.cotangents else x
    return grads


def backward_inputs(ran: Ran, step: Step, freed: bool) -> None:
    """The half of `backward` that others wait for: the cotangents of what a node read. Needs the engine SPLIT."""
    if ran.pullback is not None:
        assert isinstance(ran.pullback, Halves)
        _pull(ran, step, freed, ran.pullback.early)


def backward_weights(ran: Ran, step: Step) -> None:
    """The other half: a node's own gradients, from what `backward_inputs` kept."""
    if ran.pullback is not None:
        assert isinstance(ran.pullback, Halves)
        if step.weights.frees(ran.node):
            step.weights.restore(ran.node, ran.own)
        grads = ran.pullback.late()["own"]
        ran.pullback = None
        step.weights.leave(ran.node, ran.own, done=True)
        step.gradients.add(ran.node, probed(ran.node, step, grads))


def probed(node: Node, step: Step, own: Tree) -> Tree:
    """A node's gradients; what its probes say is tapped."""
    if not node.probes:
        return own
    found = tree.to_paths(own)
    for path, name in node.probes:
        add_taps(step.taps, {f"tap.max.{name}": found[path].amax()}, node.index)
        found[path] = torch.zeros_like(found[path])
    rest: Tree = tree.from_paths(found)
    return rest


def in_parts(node: Node, step: Step, own: Tree, reads: Values, moving: frozenset[str]) -> Values:
    """Run a node forward and backward, part by part along dim 1 of what it reads; returns the sums of its values."""
    length = next(iter(reads.values())).shape[1]
    parts = max(n for n in range(1, node.chunks + 1) if length % n == 0)
    total: Values = {}
    cotangents: dict[str, list[Tensor]] = {}
    own_grads: Tree = None  # summed here where they travel, so that they travel once
    for i in range(parts):
        part = {name: x.narrow(1, i * (length // parts), length // parts).contiguous() for name, x in reads.items()}
        out, _, pullback = differentiate(node, step, own, part, moving)
        assert pullback is not None, "a node in parts depends on parameters"
        add_taps(step.taps, out, node.index)
        out = {name: x for name, x in out.items() if not name.startswith("tap.")}
        grads = pullback({name: step.seeds[name.removeprefix("loss.")] for name in out})
        grads["own"] = probed(node, step, grads["own"])
        del pullback
        if own_grads is not None:
            own_grads = tree.map(torch.add, own_grads, grads["own"])
        elif i + 1 < parts and step.gradients.moves(node):
            own_grads = grads["own"]
        else:
            step.gradients.add(node, grads["own"])
        for name, x in grads["reads"].items():
            cotangents.setdefault(name, []).append(x)
        total = {name: x + total[name] if name in total else x for name, x in out.items()}
    if own_grads is not None:
        step.gradients.add(node, own_grads)
    for name, pieces in cotangents.items():
        whole = torch.cat(pieces, 1)
        step.cotangents[name] = step.cotangents[name] + whole if name in step.cotangents else whole
    return total


def add_taps(total: dict[str, Tensor], values: Values, number: int | None = None) -> None:
    """Join what was tapped, among other values, to what was tapped before; number: of the node that tapped."""
    for name, x in values.items():
        if name.startswith("tap."):
            name = name if number is None else numbered(name, number)
            total[name] = joined(name.split(".")[1], total[name], x) if name in total else x
